"""The contract of a loss implementation."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from heads_lightning.batch import IGNORE
from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.losses import Feature, LossOptions, LossSum, Projection, loss_module
from heads_lightning.testing.base import TOLERANCE, Device, assert_near, gradients


def reference_logits(hidden: Tensor, projection: Projection) -> Tensor:
    """Logits in fp64, the soft cap included."""
    bias_V = 0 if projection.bias_V is None else projection.bias_V[: projection.classes].double()
    logits = hidden.double() @ projection.weight_VD[: projection.classes].double().T + bias_V
    return logits if projection.softcap is None else projection.softcap * torch.tanh(logits / projection.softcap)


def reference_loss(
    logits_NV: Tensor, labels_N: Tensor, *, z: float, smoothing: float, weights_N: Tensor | None = None, classes_V: Tensor | None = None
) -> LossSum:
    """The definition in losses/base.py, spelled out in fp64: [N] each, gradients by autograd. z_loss is never None."""
    logits_NV, valid_N, label_N = logits_NV.double(), labels_N != IGNORE, labels_N.clamp(min=0)
    lse_N = logits_NV.logsumexp(1)
    c_V = torch.ones_like(logits_NV[0]) if classes_V is None else classes_V.double()
    w_N = valid_N.double() * (1 if weights_N is None else weights_N.double())
    nll_NV = lse_N.unsqueeze(1) - logits_NV
    nll_N = nll_NV.gather(1, label_N.unsqueeze(1)).squeeze(1)
    ce_N = w_N * ((1 - smoothing) * c_V[label_N] * nll_N + smoothing / len(c_V) * (nll_NV * c_V).sum(1))
    z_N = w_N * z * c_V[label_N] * lse_N**2
    hits_N = ((logits_NV.argmax(1) == label_N) & valid_N).double()
    return LossSum(ce_N + z_N, ce_N.detach(), z_N.detach(), hits_N, (torch.special.entr(logits_NV.softmax(1)).sum(1) * valid_N).detach())


def check_loss(implementation: LMLossImplementation | str | ModuleType, *, device: Device = "cpu") -> str | None:
    """losses.base.LossImplementation: values, metrics and gradients of every feature; rows without a target, whatever stands there.

    Not here: a vocabulary that several processes share (Feature.vocab_parallel; tests/test_loss_vocab_parallel.py).

    Takes a name, or a module that is to become one. Returns None when everything was checked; else why it cannot run here.
    """
    module = implementation if isinstance(implementation, ModuleType) else loss_module(implementation)
    name = module.__name__.rpartition(".")[2]
    assert frozenset(Feature) >= module.FEATURES, f"{name}.FEATURES holds more than members of Feature"
    if (reason := module.unavailable()) is not None:
        for word in (f"head.loss_implementation={name}", "head.loss_implementation=chunked"):
            assert word in reason, f"{name}: why it cannot run must be said with {word}, not {reason!r}"
        return reason
    everything = frozenset(Feature) - {Feature.vocab_parallel}
    for on in (frozenset(), *map(frozenset, ([f] for f in everything)), everything - {Feature.float64, Feature.frozen_hidden}, everything):
        for masked in (0.0, 0.4, 1.0):
            _check_loss(module, on, masked, device, f"{name} with {', '.join(sorted(on)) or 'no feature'}, {masked:.0%} ignored")
    return None


def _check_loss(module: ModuleType, on: frozenset[Feature], masked: float, device: Device, what: str) -> None:
    g, dtype = torch.Generator().manual_seed(0), torch.float64 if Feature.float64 in on else torch.float32
    made = [torch.randn(shape, generator=g).to(device, dtype) for shape in ((41, 16), (101, 16), (101,))]
    hidden, weight, bias = made[0].requires_grad_(Feature.frozen_hidden not in on), made[1].requires_grad_(), made[2].requires_grad_()
    leaves = [leaf for leaf, used in ((hidden, hidden.requires_grad), (weight, True), (bias, Feature.bias in on)) if used]
    labels = torch.randint(0, 90, (41,), generator=g).masked_fill(torch.rand(41, generator=g) < masked, IGNORE).to(device)
    w_N, c_V = torch.rand(41, generator=g).to(device, dtype), torch.rand(101, generator=g).to(device, dtype) + 0.5
    cap, classes = 3.0 if Feature.softcap in on else None, 92 if Feature.padded_vocabulary in on else None
    projection = Projection(weight, bias if Feature.bias in on else None, cap, classes)
    weights_N, classes_V = w_N if Feature.token_weights in on else None, c_V[:classes] if Feature.class_weights in on else None
    z, smoothing, each = 1e-2 * (Feature.z_loss in on), 0.1 * (Feature.label_smoothing in on), Feature.per_token in on
    options = LossOptions(IGNORE, z, smoothing, classes_V, each, Feature.token_metrics in on, all_targets=masked == 0)
    spoiled, before = torch.where((labels == IGNORE).unsqueeze(1), math.nan, hidden), [leaf.detach().clone() for leaf in leaves]
    got = module.linear_cross_entropy_sum(spoiled, projection, labels, options, weights_N)
    want = reference_loss(reference_logits(hidden, projection), labels, z=z, smoothing=smoothing, weights_N=weights_N, classes_V=classes_V)
    want = {part: value if each else value.sum() for part, value in want._asdict().items()}
    assert got.total.dtype == dtype, f"{what}: the loss is {got.total.dtype}, its maths must be {dtype}"
    assert (got.z_loss is None) == (z == 0), f"{what}: z_loss is None exactly when it is off"
    assert (got.correct is None) <= (Feature.token_metrics not in on), f"{what}: no metrics"
    for part, value in got._asdict().items():
        if value is not None:
            assert_near(value, want[part], TOLERANCE[dtype], f"{what}: {part}")
    upstream = w_N + 0.25 if each else w_N.new_tensor(0.75)  # not what expected_grad says, which is a hint
    grads = zip(leaves, before, gradients(got.total, leaves, upstream), gradients(want["total"], leaves, upstream), strict=True)
    for leaf, old, got_grad, want_grad in grads:
        assert_near(got_grad, want_grad, TOLERANCE[dtype], f"{what}: gradient of the operand {list(leaf.shape)}")
        assert torch.equal(leaf, old), f"{what}: the operand {list(leaf.shape)} was changed in place"
