"""What is `chunked`'s own: chunks, blocks, and the rounding in them. (test_losses.py holds it to the reference with all the others.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import D, N, assert_same, make_case, reference, run

from heads_lightning import onednn
from heads_lightning.losses import chunked, chunked_blocks, chunked_kernels
from heads_lightning.testing.base import TOLERANCE, assert_near


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    v=st.integers(2, 70),
    block=st.sampled_from([8, 16, 2048]),
    rows=st.sampled_from([1, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_chunks_and_blocks_of_any_size_agree(n: int, v: int, block: int, rows: int, seed: int) -> None:
    """In fp64: the gradient of a bias over two classes may cancel to a thousandth of its terms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_blocks, "BLOCK_COLUMNS", block)
        patch.setattr(chunked, "WORKSPACE_BYTES", rows)
        case = make_case(torch.float64, n=n, v=v, seed=seed, bias=seed % 2 == 0, weights=seed % 3 == 0)
        want = reference(case, reduction="mean", z=1e-3, smoothing=0.1, softcap=None, upstream=None)
        assert_same(run("chunked", case, z_loss_multiplier=1e-3, label_smoothing=0.1), want, 1e-11, (n, v))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("few", [1, chunked_kernels.FEW_CHUNKS])
def test_bf16_weight_gradients_are_as_exact_over_chunks_as_in_one(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks, dW added up in bf16 or in fp32: within half as much again of what one chunk leaves by rounding."""
    case = make_case(torch.bfloat16, n=64, masked=0.0)
    want = reference(case, reduction="mean", z=0.0, smoothing=0.0, softcap=None, upstream=None).grads["weight"]
    monkeypatch.setattr(chunked_kernels, "FEW_CHUNKS", few)

    def error(workspace: int) -> float:
        monkeypatch.setattr(chunked, "WORKSPACE_BYTES", workspace)
        return float((run("chunked", case).grads["weight"].double() - want).norm() / want.norm())

    assert error(1) < 1.5 * error(1 << 20)


@pytest.mark.usefixtures("small_chunks")
def test_gradients_rounded_in_passing_as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.bfloat16, weights=True)
    monkeypatch.setattr(chunked_kernels, "rounds_in_passing", lambda device: True)
    want = reference(case, reduction="mean", z=1e-2, smoothing=0.0, softcap=None, upstream=None)
    assert_same(run("chunked", case, z_loss_multiplier=1e-2), want, TOLERANCE[torch.bfloat16], "one pass", metrics=False)


@pytest.mark.usefixtures("small_chunks")
def test_a_confident_model_keeps_its_small_gradients() -> None:
    """softmax − one-hot cancels when the label is nearly certain; and a label in an improbable block must not overflow."""
    case = make_case(masked=0.0)
    likely = case.weight.double() @ case.hidden.double().t()
    for labels, scale in ((likely.argmax(0), 8.0), (likely.argmin(0), 60.0)):
        sharp = case._replace(labels=labels, hidden=case.hidden * scale)
        want = reference(sharp, reduction="sum", z=0.0, smoothing=0.0, softcap=None, upstream=None)
        got = run("chunked", sharp, reduction="sum")
        assert_near(got.total, want.total, 1e-4, "loss")
        for name in ("hidden", "weight"):
            assert_near(got.grads[name], want.grads[name], 1e-4, name)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)], ids=str)
def test_a_label_too_improbable_for_its_probability_to_tell_the_normaliser(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    """Logits of ±128, exact in either type: e⁻²⁵⁶ is zero in fp32. The losses are those of the logits all the same."""
    case = make_case(dtype, bias=bias, masked=0.0)
    case = case._replace(weight=case.weight.sign(), hidden=128 * torch.eye(D, dtype=dtype)[torch.arange(N) % D])
    worst = case._replace(labels=(case.hidden @ case.weight.t()).argmin(1))
    want, got = reference(worst, reduction="mean", z=0.0, smoothing=0.0, softcap=None, upstream=None), run("chunked", worst)
    assert float(want.total) > 250
    assert_near(got.total, want.total, 1e-6, "loss")
    for name, grad in got.grads.items():
        assert_near(grad, want.grads[name], tolerance, ("gradient of", name))


def test_large_fp32_products_by_either_library_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(n=300, v=5003, bias=True)
    want = reference(case, reduction="mean", z=1e-3, smoothing=0.1, softcap=None, upstream=None)
    monkeypatch.setattr(chunked, "PROBE_FLOP", 0)
    for wins in (True, False):
        monkeypatch.setattr(onednn, "is_faster", lambda wins=wins: wins)
        assert_same(run("chunked", case, z_loss_multiplier=1e-3, label_smoothing=0.1), want, 1e-5, wins)
