"""Heads and their losses: every head x loss x feature, positions, metrics, divisors."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from head_batches import HEADS, LOSSES, B, D, S, V, build, inputs
from torch import Tensor
from torch.nn import functional as F

from heads_lightning.heads import LMHead, LMOutputWithLoss, LMOutputWithMetrics, MLMHead, NormalizedLMHead
from heads_lightning.testing.base import assert_near


def logits_by_hand(head: LMHead, x: Tensor) -> Tensor:
    """Each head's formula."""
    p = dict(head.named_parameters())
    if isinstance(head, MLMHead):
        x = F.rms_norm(F.gelu(F.linear(x, p["dense.weight"], p["dense.bias"])), (D,), p["norm.weight"], 1e-5)
    logits = x @ p["w_out.weight"].t()
    logits = p["sz"] * math.sqrt(D) * logits if isinstance(head, NormalizedLMHead) else logits + p.get("w_out.bias", 0.0)
    cap = head.config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def loss_by_hand(head: LMHead, x: Tensor, labels: Tensor, *, reduction: str, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, z-loss) from torch's own cross_entropy."""
    logits = logits_by_hand(head, x).reshape(-1, V)
    flat, valid = labels.reshape(-1), labels.reshape(-1) != -100
    ce = F.cross_entropy(logits, flat, reduction="none", ignore_index=-100, label_smoothing=head.config.label_smoothing)
    z_loss = z * logits.logsumexp(1) ** 2 * valid
    if reduction == "none":
        ce, z_loss = ce.view(labels.shape), z_loss.view(labels.shape)
    else:
        divide = max(int(valid.sum()), 1) if reduction == "mean" else 1
        ce, z_loss = ce.sum() / divide, z_loss.sum() / divide
    return ce + z_loss, ce, z_loss


@pytest.mark.parametrize("implementation", [name for name in LOSSES if name != "auto"])
@pytest.mark.parametrize("name", HEADS)
def test_matrix_of_heads_losses_and_features(name: str, implementation: str) -> None:
    grid = itertools.product(
        ("mean", "sum", "none"), (0.0, 1e-2), (0.0, 0.1), (None, 3.0), (0.0, 0.4, 2.0), ("", "hidden", "head"), (None, False)
    )
    heads_by_option = {(e, c): build(name, implementation, label_smoothing=e, logit_softcap=c) for e in (0.0, 0.1) for c in (None, 3.0)}
    for number, (reduction, z, smoothing, softcap, masked, frozen, return_logits) in enumerate(grid):
        if z == 0.0 and number % 2:
            z = None  # both are off
        if implementation == "fused_linear" and number % 13 and not torch.cuda.is_available():
            continue  # Triton's interpreter is slow
        what = (reduction, z, smoothing, softcap, masked, frozen, return_logits)
        head = heads_by_option[smoothing, softcap].requires_grad_(frozen != "head")
        head.zero_grad()
        exact = copy.deepcopy(head).double()
        x, labels = inputs(masked)
        x.requires_grad_(frozen != "hidden")
        X = x.detach().double().requires_grad_(frozen != "hidden")
        out = head(x, labels=labels, loss_reduction=reduction, z_loss_multiplier=z, return_logits=return_logits)
        loss, ce, z_loss = loss_by_hand(exact, X, labels, reduction=reduction, z=z or 0.0)
        upstream = torch.arange(1.0, B * S + 1).view(B, S) if reduction == "none" else torch.tensor(0.5)
        out.loss.backward(upstream)
        loss.backward(upstream.double())
        assert out.loss.shape == loss.shape
        assert_near(out.loss, loss, 1e-5, what)
        assert_near(out.ce_loss, ce, 1e-5, what)
        assert (out.z_loss is None) == (not z), what
        assert out.z_loss is None or not out.z_loss.requires_grad
        if z:
            assert_near(out.z_loss, z_loss, 1e-5, what)
        assert (out.logits is not None) == (implementation == "default" and return_logits is None)
        if frozen != "hidden":
            assert_near(x.grad, X.grad, 1e-5, what)
        for (key, got), want in zip(head.named_parameters(), exact.parameters(), strict=True):
            assert (got.grad is None) == (frozen == "head"), (what, key)
            if got.grad is not None:
                assert_near(got.grad, want.grad, 1e-5, (what, key))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("implementation", LOSSES)
def test_rows_without_a_target_are_dropped_before_the_head(name: str, implementation: str) -> None:
    head, seen = build(name, implementation), []
    x, labels = inputs(0.8)
    prepare = type(head).prepare
    head.prepare = lambda hidden: seen.append(hidden.shape) or prepare(head, hidden)
    head(x, labels=labels, return_logits=False)
    assert seen == [(int((labels != -100).sum()), D)]


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize("name", HEADS)
class TestPositions:
    """logits_to_keep (case A5): each form equals slicing beforehand."""

    def test_each_form_equals_slicing(self, name: str, implementation: str) -> None:
        head = build(name, implementation)
        x, labels = inputs()
        rows = torch.tensor([[3, 1, 1], [0, 11, 5]])
        mask = torch.rand(B, S) < 0.5
        take = torch.arange(B).unsqueeze(1)
        for keep, index in (
            (0, (slice(None), slice(None))),
            (5, (slice(None), slice(-5, None))),
            (99, (slice(None), slice(None))),
            (torch.tensor([4, 2]), (slice(None), [4, 2])),
            (rows, (take, rows)),
            (rows.int(), (take, rows)),
        ):
            torch.testing.assert_close(head(x, logits_to_keep=keep), head(x[index]))
            for reduction in ("mean", "none"):
                got = head(x, labels=labels, logits_to_keep=keep, loss_reduction=reduction)
                want = head(x[index].contiguous(), labels=labels[index].contiguous(), loss_reduction=reduction)
                torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(head(x, logits_to_keep=mask), head(x)[mask])
        got = head(x, labels=labels, logits_to_keep=mask, loss_reduction="sum").loss
        want = head(x, labels=torch.where(mask, labels, -100), loss_reduction="sum").loss
        torch.testing.assert_close(got, want)

    def test_none_kept_is_zero(self, name: str, implementation: str) -> None:
        x, labels = inputs()
        out = build(name, implementation)(x, labels=labels, logits_to_keep=torch.zeros(B, 0, dtype=torch.long))
        assert float(out.loss.detach()) == 0


@pytest.mark.parametrize(
    "keep",
    [
        -1,
        True,
        torch.tensor([-1]),
        torch.tensor([S]),
        torch.tensor(3),
        torch.tensor([1.0]),
        torch.zeros(B + 1, 2).long(),
        torch.ones(S).bool(),
    ],
    ids=str,
)
def test_positions_that_mean_nothing_are_refused(keep: Any) -> None:
    with pytest.raises(ValueError, match="logits_to_keep"):
        build("default")(inputs()[0], logits_to_keep=keep)


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize("name", HEADS)
def test_logits_on_request_are_part_of_the_graph(name: str, implementation: str) -> None:
    head = build(name, implementation, logit_softcap=5.0)
    x, labels = inputs()
    out = head(x, labels=labels, return_logits=True)
    torch.testing.assert_close(out.logits, logits_by_hand(head, x))
    assert out.logits.requires_grad
    torch.testing.assert_close(out.loss, head(x, labels=labels, return_logits=False).loss)
    torch.testing.assert_close(head(x), out.logits)
    with pytest.raises(RuntimeError, match="return_logits=False without labels"):
        head(x, return_logits=False)


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize("name", HEADS)
def test_metrics_need_no_logits(name: str, implementation: str) -> None:
    head = build(name, implementation)
    x, labels = inputs()
    plain = head(x, labels=labels)
    assert type(plain) is LMOutputWithLoss
    assert len(plain) == 4
    logits = logits_by_hand(head, x)
    valid = labels != -100
    hits = (logits.argmax(-1) == labels) & valid
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1) * valid
    for return_logits in (False, True):
        out = head(x, labels=labels, token_metrics=True, return_logits=return_logits)
        assert type(out) is LMOutputWithMetrics
        assert float(out.correct) == float(hits.sum())
        torch.testing.assert_close(out.entropy, entropy.sum())
        each = head(x, labels=labels, token_metrics=True, return_logits=return_logits, loss_reduction="none")
        torch.testing.assert_close(each.correct, hits.float())
        torch.testing.assert_close(each.entropy, entropy.detach())


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize("name", HEADS)
def test_divisors_weights_and_counts(name: str, implementation: str) -> None:
    head = build(name, implementation, z_loss_multiplier=1e-2)
    x, labels = inputs()
    targets = int((labels != -100).sum())
    total = head(x, labels=labels, loss_reduction="sum")
    mean = head(x, labels=labels)
    each = head(x, labels=labels, loss_reduction="none")
    for part in ("loss", "ce_loss", "z_loss"):
        torch.testing.assert_close(getattr(mean, part), getattr(total, part) / targets)
        torch.testing.assert_close(getattr(each, part).sum(), getattr(total, part))
        for factor in (targets, float(targets), torch.tensor(targets), torch.tensor([float(targets)]).squeeze()):
            by_factor = head(x, labels=labels, loss_reduction="sum", loss_div_factor=factor, num_targets=targets)
            torch.testing.assert_close(getattr(by_factor, part), getattr(mean, part))
    torch.testing.assert_close(head(x, labels=labels, loss_div_factor=4.0).loss, mean.loss / 4)
    factors = torch.arange(1.0, B * S + 1).view(B, S)
    torch.testing.assert_close(head(x, labels=labels, loss_reduction="none", loss_div_factor=factors).loss, each.loss / factors)
    weights = torch.rand(B, S)
    torch.testing.assert_close(head(x, labels=labels, weights=weights).loss, (each.loss * weights).sum() / targets)
    torch.testing.assert_close(head(x, labels=labels, weights=weights, return_logits=True).loss, (each.loss * weights).sum() / targets)
    classes = torch.rand(V) + 0.5
    want = F.cross_entropy(logits_by_hand(head, x).view(-1, V), labels.view(-1), weight=classes)
    torch.testing.assert_close(head(x, labels=labels, class_weights=classes).ce_loss, want.detach())


@pytest.mark.parametrize("implementation", LOSSES)
def test_padding_changes_nothing(implementation: str) -> None:
    """Case A2: rows labelled -100 leave loss and z-loss unchanged, summed and averaged."""
    head = build("default", implementation)
    x, labels = inputs(0.0)
    padded_x, padded = torch.cat([x, torch.randn(B, 3, D)], 1), torch.cat([labels, torch.full((B, 3), -100)], 1)
    for reduction in ("mean", "sum"):
        short = head(x, labels=labels, loss_reduction=reduction, z_loss_multiplier=1e-3)[1:]
        long = head(padded_x, labels=padded, loss_reduction=reduction, z_loss_multiplier=1e-3)[1:]
        for a, b in zip(short, long, strict=True):
            assert a.shape == ()
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("implementation", [name for name in LOSSES if name != "default"])
def test_parity_with_default(name: str, implementation: str) -> None:
    """Case A3: d 256, V 1024, z 1e-3, sum over a divisor; every part and every gradient at torch's default tolerances."""
    torch.manual_seed(0)
    x, labels = torch.randn(2, 32, 256), torch.randint(0, 1024, (2, 32))
    labels[0, :9] = -100
    results = []
    for chosen in ("default", implementation):
        head = build(name, chosen, d_model=256, vocab_size=1024)
        h = x.clone().requires_grad_()
        out = head(h, labels=labels, loss_reduction="sum", z_loss_multiplier=1e-3, loss_div_factor=2 * 32)
        out.loss.backward()
        results.append([*out[1:], h.grad, *(p.grad for p in head.parameters())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_labels_are_checked_by_position() -> None:
    x, labels = inputs()
    labels[1, 4] = V
    with pytest.raises(ValueError, match=rf"label {V} at position \(1, 4\) is outside 0\.\.{V - 1}"):
        build("default")(x, labels=labels)
    with pytest.raises(ValueError, match="do not fit"):
        build("default")(x, labels=labels[:, :-1])
    with pytest.raises(ValueError, match="whole numbers"):
        build("default")(x, labels=labels.float())
    with pytest.raises(ValueError, match=r"\[B, S, D\]"):
        build("default")(x[0])
    with pytest.raises(ValueError, match="bogus is not a valid value for reduction"):
        build("default")(x, labels=inputs()[1], loss_reduction="bogus")
