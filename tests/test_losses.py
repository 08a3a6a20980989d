"""Every loss implementation against one reference in fp64: value, parts, metrics and gradients, for every feature and their combinations.

Tolerances: fp32 results are compared by relative norm at 1e-5, thirty times the rounding of sums over a few thousand terms; bf16 at 1 %,
two units of its 8-bit mantissa, which every operand and every product is rounded to.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from loss_cases import D, N, V, assert_same, make_case, reference, run
from torch import Tensor

from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.losses import (
    Feature,
    LossOptions,
    Projection,
    chunked_kernels,
    linear_cross_entropy,
    loss_module,
    unavailable,
)
from heads_lightning.losses.base import report_fallback
from heads_lightning.registry import ConfigError
from heads_lightning.testing.base import TOLERANCE, assert_near

HERE = [name.value for name in LMLossImplementation if unavailable(name) is None]
GRID = list(
    itertools.product(
        ("mean", "sum", "none"), (0.0, 1e-2), (0.0, 0.1), (None, 3.0), (False, True), (False, True), (False, True), (0.0, 0.3)
    )
)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("implementation", [name for name in HERE if name != "auto"])
def test_value_and_gradients_equal_the_reference(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "torch" and dtype == torch.bfloat16:
        pytest.skip("PyTorch sums its loss in bf16: documented, and never chosen by auto")
    every = 1 if dtype == torch.float32 else 5  # coprime to the grid's axes: every value meets every other
    if implementation == "fused_linear" and not torch.cuda.is_available():
        every = 13  # Triton's interpreter is slow
    for reduction, z, smoothing, softcap, bias, weights, class_weights, masked in GRID[::every]:
        case = make_case(dtype, bias=bias, weights=weights, class_weights=class_weights, masked=masked)
        upstream = torch.rand(N, dtype=torch.float64) if reduction == "none" else torch.tensor(0.75)
        options: dict[str, Any] = {"softcap": softcap, "upstream": upstream, "reduction": reduction}
        want = reference(case, z=z, smoothing=smoothing, **options)
        got = run(implementation, case, z_loss_multiplier=z, label_smoothing=smoothing, **options)
        what = (reduction, z, smoothing, softcap, bias, weights, class_weights, masked)
        assert_same(got, want, TOLERANCE[dtype], what, metrics=dtype != torch.bfloat16)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_operands_get_none_and_the_others_what_they_should(implementation: str, frozen: str) -> None:
    case = make_case(bias=True)
    want = reference(case, reduction="mean", z=0.0, smoothing=0.0, softcap=None, upstream=None)
    got = run(implementation, case, frozen=frozen)
    assert set(got.grads) == {"hidden", "weight", "bias"} - {frozen}
    assert_same(got, want, 1e-5, frozen)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 7])
def test_nothing_to_predict_is_exactly_zero_with_finite_gradients(implementation: str, reduction: str, n: int) -> None:
    case = make_case(n=n, masked=2.0, bias=True)
    got = run(implementation, case, reduction=reduction, z_loss_multiplier=1e-2, label_smoothing=0.1, div_factor=0)
    assert not got.total.any()
    for name in ("hidden", "weight", "bias"):
        assert not got.grads[name].any(), name


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("all_rows", [False, True], ids=["dropped", "masked"])
def test_what_stands_at_ignored_positions_is_harmless(implementation: str, bad: float, all_rows: bool) -> None:
    case = make_case()
    hidden = case.hidden.clone()
    hidden[case.labels == -100] = bad
    spoiled = case._replace(hidden=hidden)
    if all_rows:  # an implementation called with the ignored rows still there, as under torch.compile
        module = loss_module(implementation)
        losses = []
        for h in (case.hidden, hidden):
            h = h.clone().requires_grad_()
            weight = case.weight.clone().requires_grad_()
            loss = module.linear_cross_entropy_sum(
                h, Projection(weight), case.labels, LossOptions(z_loss_multiplier=1e-3, token_metrics=True)
            )
            loss.total.backward()
            losses.append((loss.total, loss.correct, loss.entropy, weight.grad, torch.where((case.labels == -100)[:, None], h.grad, 0)))
        for clean, dirty in zip(*losses, strict=True):
            torch.testing.assert_close(clean, dirty)
        return
    assert_same(run(implementation, spoiled, z_loss_multiplier=1e-3), run(implementation, case, z_loss_multiplier=1e-3), 0, bad)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("label", [V, -1, -101, 10**9])
def test_a_label_out_of_range_is_refused_with_its_position(implementation: str, label: int) -> None:
    case = make_case()
    case.labels[5] = label
    with pytest.raises(ValueError, match=rf"label {label} at position 5 is outside 0\.\.{V - 1}"):
        run(implementation, case)


@pytest.mark.parametrize("implementation", HERE)
def test_padding_of_the_vocabulary_is_never_predicted(implementation: str) -> None:
    case = make_case(bias=True)
    real = V - 9
    case.labels[case.labels >= real] = 3
    want = reference(
        case._replace(weight=case.weight[:real], bias=case.bias[:real]),
        reduction="mean",
        z=1e-3,
        smoothing=0.1,
        softcap=None,
        upstream=None,
    )
    got = run(implementation, case, z_loss_multiplier=1e-3, label_smoothing=0.1, num_classes=real)
    for name in ("weight", "bias"):
        assert got.grads[name].shape[0] == V
        assert not got.grads[name][real:].any()
    assert_same(got._replace(grads={k: v[:real] if k != "hidden" else v for k, v in got.grads.items()}), want, 1e-5, "padded")
    with pytest.raises(ValueError, match="outside"):
        run(implementation, case._replace(labels=torch.full((N,), real)), num_classes=real)


@pytest.mark.parametrize("implementation", HERE)
def test_inputs_are_not_modified_and_a_second_backward_is_right_or_refused(implementation: str) -> None:
    case = make_case()
    before = [t.clone() for t in (case.hidden, case.weight, case.labels)]
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    for reduction in ("sum", "none"):
        hidden.grad = weight.grad = None
        loss = linear_cross_entropy(hidden, weight, case.labels, implementation=implementation, reduction=reduction).total
        loss.sum().mul(2).backward(retain_graph=True)
        first = weight.grad.clone()
        weight.grad = None
        try:
            loss.sum().mul(2).backward()
            torch.testing.assert_close(weight.grad, first)
        except RuntimeError as error:
            assert "default" in str(error)  # noqa: PT017
            assert implementation not in ("default", "auto")
    for old, new in zip(before, (hidden, weight, case.labels), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("implementation", HERE)
def test_a_second_derivative_is_right_or_refused(implementation: str) -> None:
    case = make_case(torch.float64)

    def gradient(name: str) -> Tensor:
        hidden = case.hidden.clone().requires_grad_()
        loss = linear_cross_entropy(hidden, case.weight.requires_grad_(), case.labels, implementation=name).total
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        return torch.autograd.grad(first.square().sum(), hidden)[0]

    try:
        got = gradient(implementation)
    except RuntimeError as error:
        assert "default" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(got, gradient("default"))


@pytest.mark.parametrize("implementation", [name for name in HERE if name != "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_operands_have_fp32_loss_maths(implementation: str, dtype: torch.dtype) -> None:
    """1e-4 and not 1 %: given the rounded operands, the loss is as good as fp32 products make it, averaged over rows."""
    case = make_case(dtype, n=512, v=3001)
    got = run(implementation, case)
    want = reference(case, reduction="mean", z=0.0, smoothing=0.0, softcap=None, upstream=None)
    assert got.total.dtype == torch.float32
    assert_near(got.total, want.total, 3e-4, "loss")
    assert_same(got, want, TOLERANCE[dtype], dtype, metrics=False)
    assert {k: v.dtype for k, v in got.grads.items()} == {"hidden": dtype, "weight": dtype}


@pytest.mark.parametrize("implementation", [name for name in HERE if name != "torch"])
def test_autocast_keeps_types_of_weights_and_gradients(implementation: str) -> None:
    case = make_case()
    want = reference(case, reduction="mean", z=1e-3, smoothing=0.0, softcap=None, upstream=None)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(implementation, case, z_loss_multiplier=1e-3)
    assert got.total.dtype == torch.float32
    assert {v.dtype for v in got.grads.values()} == {torch.float32}
    assert_same(got, want, 1e-2, "autocast", metrics=False)


@pytest.mark.parametrize("implementation", HERE)
def test_num_targets_is_checked_and_changes_nothing(implementation: str) -> None:
    case = make_case()
    targets = int((case.labels != -100).sum())
    assert_same(run(implementation, case, num_targets=targets), run(implementation, case), 0, "num_targets")
    with pytest.raises(ValueError, match="num_targets=3"):
        run(implementation, case, num_targets=3)


@pytest.mark.parametrize("implementation", HERE)
def test_div_factor_divides_after_the_reduction(implementation: str) -> None:
    case = make_case()
    plain = run(implementation, case)
    for factor in (4, 4.0, torch.tensor(4), torch.tensor([4.0])):
        got = run(implementation, case, div_factor=factor)
        assert_near(got.total, plain.total / 4, 1e-6, factor)
        assert_near(got.grads["weight"], plain.grads["weight"] / 4, 1e-6, factor)


@pytest.mark.parametrize("implementation", HERE)
def test_gradients_of_token_weights(implementation: str) -> None:
    case = make_case(torch.float64, weights=True)
    weights = case.weights.double().requires_grad_()
    loss = linear_cross_entropy(
        case.hidden.requires_grad_(), case.weight, case.labels, weights=weights, implementation=implementation, reduction="sum"
    )
    loss.total.backward()
    each = linear_cross_entropy(case.hidden, case.weight, case.labels, implementation="default", reduction="none").total
    torch.testing.assert_close(weights.grad, each.detach())


@pytest.mark.parametrize("implementation", HERE)
def test_no_gradient_is_formed_without_grad_mode(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    dense, formed = chunked_kernels.dense, []
    monkeypatch.setattr(chunked_kernels, "dense", lambda *arguments: formed.append(arguments[-1].need_grad) or dense(*arguments))
    with torch.no_grad():
        loss = linear_cross_entropy(case.hidden, case.weight.requires_grad_(), case.labels, implementation=implementation)
    assert not loss.total.requires_grad
    assert not any(formed)


def test_what_an_implementation_lacks_falls_back_visibly_once(caplog: pytest.LogCaptureFixture) -> None:
    report_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run("torch", make_case(), softcap=3.0)
    assert [r.getMessage() for r in caplog.records if "softcap" in r.getMessage()] == [
        "head.loss_implementation=torch does not do softcap; head.loss_implementation=chunked computes this loss"
    ]


def test_auto_says_what_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    from heads_lightning.losses import auto

    auto._report.cache_clear()
    hidden, weight, labels = torch.randn(4, 8), torch.randn(16, 8), torch.arange(4)
    with caplog.at_level(logging.INFO), torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, implementation="auto")
    assert not caplog.records  # of training alone
    with caplog.at_level(logging.INFO):
        run("auto", make_case())
        run("auto", make_case(n=400, v=4000, masked=0.0))
    said = [r.getMessage() for r in caplog.records]
    assert any("takes default" in line for line in said)
    assert any("takes chunked" in line for line in said)


@pytest.mark.parametrize("name", [name.value for name in LMLossImplementation])
def test_every_implementation_declares_features_and_says_why_it_cannot_run(name: str) -> None:
    module = loss_module(name)
    assert frozenset(Feature) >= module.FEATURES
    reason = unavailable(name)
    if reason is not None:
        assert f"head.loss_implementation={name}" in reason
        assert "head.loss_implementation=chunked" in reason
        with pytest.raises(ConfigError, match=r"head\.loss_implementation=chunked"):
            run(name, make_case())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="available: default, chunked"):
        run("chunky", make_case())
    with pytest.raises(ValueError, match="allowed: mean, sum, none"):
        run("default", make_case(), reduction="average")


def call_with(feature: Feature, implementation: str) -> None:
    """A call that asks for this feature and no other."""
    case = make_case(torch.float64 if feature == Feature.float64 else torch.float32, bias=feature == Feature.bias, v=V)
    options: dict[Feature, dict[str, Any]] = {
        Feature.softcap: {"softcap": 3.0},
        Feature.padded_vocabulary: {"num_classes": V},
        Feature.z_loss: {"z_loss_multiplier": 1e-3},
        Feature.label_smoothing: {"label_smoothing": 0.1},
        Feature.class_weights: {"class_weights": torch.ones(V)},
        Feature.token_weights: {"weights": torch.ones(N)},
        Feature.per_token: {"reduction": "none"},
        Feature.token_metrics: {"token_metrics": True},
    }
    weight, hidden = case.weight.requires_grad_(), case.hidden.requires_grad_(feature != Feature.frozen_hidden)
    if feature == Feature.padded_vocabulary:
        weight = torch.cat([weight, weight.new_zeros(3, D)])
    linear_cross_entropy(hidden, weight, case.labels, bias=case.bias, implementation=implementation, **options.get(feature, {}))


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("feature", [feature for feature in Feature if feature != Feature.vocab_parallel])
def test_declared_features_are_computed_without_falling_back(
    implementation: str, feature: Feature, caplog: pytest.LogCaptureFixture
) -> None:
    """What the capability table is made from. Shards of a vocabulary are in test_loss_vocab_parallel.py."""
    report_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        call_with(feature, implementation)
    missing = [r.getMessage() for r in caplog.records if "does not do" in r.getMessage()]
    assert bool(missing) == (feature not in loss_module(implementation).FEATURES)
    assert all(f"does not do {feature};" in message for message in missing)
