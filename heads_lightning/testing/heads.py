"""The contract of a head over a vocabulary."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from heads_lightning.batch import IGNORE
from heads_lightning.configs.base import DType, LayerNormConfig, NormType
from heads_lightning.configs.head import LMHeadConfig, LMLossImplementation
from heads_lightning.losses import unavailable
from heads_lightning.registry import ConfigError
from heads_lightning.testing.base import Device, assert_near, check_module, gradients
from heads_lightning.testing.losses import reference_logits, reference_loss


def check_head(config: LMHeadConfig, *, d_model: int = 16, vocab_size: int = 53, device: Device = "cpu") -> None:
    """heads.base.LMHead: the fp64 definition with every loss implementation that runs here, gradients included; every common option."""
    check_module(lambda init_device: _model(config, d_model, vocab_size, init_device)["head"], config.num_params(d_model, vocab_size))
    norm = LayerNormConfig(name=NormType.layer_norm, bias=True)
    for field, value in (("bias", True), ("bias", False), ("layer_norm", norm), ("tie_embeddings", True), ("logit_softcap", 0.5)):
        _check_head_option(config, field, value, d_model, vocab_size)
    _check_head_option(config, "dtype", DType.bfloat16, d_model, vocab_size)
    plain = replace(config, dtype=DType.float32)
    for implementation in LMLossImplementation:
        if unavailable(implementation) is None:
            _check_head_loss(replace(plain, loss_implementation=implementation), d_model, vocab_size, device)
    head, x = _model(plain, 64, 512)["head"], torch.randn(2, 16, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head(x, labels=torch.zeros(2, 16, dtype=torch.long), return_logits=True).loss.backward()
    counted, said = counter.get_total_flops() / 32, head.num_flops_per_token()
    assert abs(said - counted) <= 0.02 * counted, f"num_matmul_params: {said} operations a token, PyTorch counts {counted}"


def _model(config: LMHeadConfig, d_model: int, vocab_size: int, device: str = "cpu") -> Any:
    """{head}, and {embedding} where they are tied."""
    embedding = nn.Embedding(vocab_size, d_model, device=device) if config.is_tied else None
    head = config.build(d_model=d_model, vocab_size=vocab_size, init_device=device, embedding=embedding)
    return nn.ModuleDict({"head": head} if embedding is None else {"head": head, "embedding": embedding})


def _check_head_option(config: LMHeadConfig, field: str, value: Any, d_model: int, vocab_size: int) -> None:
    """An option that every head has acts, or is refused by name."""
    what, x = f"head={config.name} head.{field}={value}", 100 * torch.randn(2, 3, d_model)
    changed, refusal = None, ""
    try:
        changed = replace(config, **{field: value})
    except ConfigError as error:
        refusal = str(error)
    if changed is None:
        assert f"head.{field}" in refusal, f"{what} is refused without naming the field: {refusal}"
        return
    model, declared = _model(changed, d_model, vocab_size), changed.num_params(d_model, vocab_size)
    head, built = model["head"], sum(p.numel() for p in model["head"].parameters())
    assert built == declared, f"{what}: num_params says {declared}, but {built} are built"
    if field == "bias":
        acts = (head.projection().bias_V is not None) == value
    elif field == "layer_norm":
        acts = declared != replace(config, layer_norm=None).num_params(d_model, vocab_size)
    elif field == "tie_embeddings":
        head(x, labels=torch.zeros(2, 3, dtype=torch.long)).loss.backward()
        acts = model["embedding"].weight.grad is not None and callable(getattr(head, "tie", None))
    elif field == "logit_softcap":
        acts = bool((head(x).abs() <= value + 1e-6).all())
    else:
        acts = {p.dtype for p in head.parameters()} <= {getattr(torch, value)}
    assert acts, f"{what} is accepted and ignored; refuse it in the config's __post_init__ or let it act"


def _check_head_loss(config: LMHeadConfig, d_model: int, vocab_size: int, device: Device) -> None:
    what, g = f"head={config.name} head.loss_implementation={config.loss_implementation}", torch.Generator().manual_seed(0)
    model = _model(config, d_model, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the zeros and ones of a new head
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
    model, exact = model.to(device), copy.deepcopy(model).double().to(device)
    x = torch.randn(2, 12, d_model, generator=g).to(device).requires_grad_()
    labels = torch.randint(0, vocab_size, (2, 12), generator=g)
    labels = labels.masked_fill(torch.rand(2, 12, generator=g) < 0.4, IGNORE).to(device)
    assert_near(model["head"](x)[:, 3:4], model["head"](x[:, 3:4]), 1e-5, f"{what}: a position by itself, against among others")
    X = x.detach().double().requires_grad_()
    logits = reference_logits(exact["head"].prepare(X.view(-1, d_model)), exact["head"].projection())
    want = reference_loss(logits, labels.view(-1), z=1e-2, smoothing=config.label_smoothing)
    _check_slope(copy.deepcopy(exact), X.detach().view(-1, d_model), labels.view(-1), what)
    for reduction, count in (("sum", 1), ("mean", int((labels != IGNORE).sum())), ("none", 1)):
        parts = [part.view(2, 12) if reduction == "none" else part.sum() / count for part in want[:3]]  # pyright: ignore
        want_grads = gradients(parts[0], [X, *exact.parameters()], torch.full_like(parts[0], 0.5))
        for with_logits in (False, True):
            # another value where there is no target: NaN, unless logits are made of it (autograd would multiply it by 0)
            given = torch.where((labels == IGNORE).unsqueeze(2), 7.0 if with_logits else math.nan, x)
            out = model["head"](given, labels=labels, loss_reduction=reduction, z_loss_multiplier=1e-2, return_logits=with_logits)
            for field, got, part in zip(("loss", "ce_loss", "z_loss"), out[1:4], parts, strict=True):
                assert_near(got, part, 1e-5, f"{what}: {field} ({reduction})")
            grads = gradients(out.loss, [x, *model.parameters()], torch.full_like(out.loss, 0.5))
            for i, (got, grad) in enumerate(zip(grads, want_grads, strict=True)):
                assert_near(got, grad, 1e-5, f"{what}: gradient {i} of [hidden states, *parameters] ({reduction})")
    nothing = model["head"](x, labels=torch.full_like(labels, IGNORE), return_logits=False).loss
    assert float(nothing.detach()) == 0, f"{what}: no targets must give a loss of 0, not {float(nothing.detach())}"
    if nothing.requires_grad:
        grads = gradients(nothing, [x, *model.parameters()], torch.ones_like(nothing))
        assert not any(bool(grad.any()) for grad in grads), f"{what}: no targets must give gradients of 0"


def _check_slope(exact: Any, hidden_ND: Tensor, labels_N: Tensor, what: str) -> None:
    """The gradient is that of the values, also through what the head computes itself: central differences in fp64, along one direction."""
    leaves, step = [hidden_ND.clone().requires_grad_(), *exact.parameters()], 1e-5

    def loss() -> Tensor:
        logits = reference_logits(exact["head"].prepare(leaves[0]), exact["head"].projection())
        return reference_loss(logits, labels_N, z=1e-2, smoothing=0.0).total.sum()

    g = torch.Generator().manual_seed(5)
    ways = [torch.randn(leaf.shape, generator=g, dtype=torch.float64).to(leaf.device) for leaf in leaves]
    slope = sum((grad * way).sum() for grad, way in zip(gradients(loss(), leaves, torch.ones(())), ways, strict=True))
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for leaf, way in zip(leaves, ways, strict=True):
                leaf.add_(sign * step * way)
            values.append(loss())
    measured = (values[0] - values[1]) / (2 * step)
    assert_near(torch.as_tensor(slope), measured, 1e-5, f"{what}: the slope in fp64 (rounding to fewer digits, or a gradient of its own)")
