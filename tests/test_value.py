"""Value targets, losses and the head: exact vectors, masks, reductions, contract."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heads_lightning.batch import IGNORE, Attention, Batch
from heads_lightning.composition import compose
from heads_lightning.configs.base import LayerNormConfig
from heads_lightning.configs.value import (
    ValueConfig,
    ValueHeadConfig,
    ValueInit,
    ValueLoss,
    ValueReduction,
)
from heads_lightning.losses.value import ValueStatistics, ValueTargets, decode, gauss_bins, value_losses, value_statistics
from heads_lightning.objectives.value import Scored, Value, gae
from heads_lightning.registry import ConfigError
from heads_lightning.testing import byte_vocabulary
from heads_lightning.testing.base import check_module

D = 16


def targets(values: Any, mask: Any = None, old: Any = None) -> ValueTargets:
    values = torch.tensor(values, dtype=torch.float32)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    return ValueTargets(mask, values, None if old is None else torch.tensor(old, dtype=torch.float32))


def mean_loss(scores: list[float], config: ValueConfig, **given: Any) -> tuple[float, list[float], Any]:
    """Mean over the mask, its gradient, and the losses."""
    x = torch.tensor([scores], requires_grad=True)
    wanted = targets(**{k: None if v is None else [v] for k, v in given.items()})
    found = value_losses(x.unsqueeze(-1), wanted, config)
    loss = found.losses_BS.sum() / max(int(wanted.mask_BS.sum()), 1)
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad[0].tolist(), found


# -- targets (O1, O2) -----------------------------------------------------------------------------------------------------

R3, V3, ALL3 = np.array([[0, 0, 1.0]]), np.array([[0.5, 0.4, 0.3]]), np.ones((1, 3), bool)


@pytest.mark.parametrize(
    ("gamma", "lam", "returns"),
    [(1, 0, [0.4, 0.3, 1]), (1, 0.95, [0.93675, 0.965, 1]), (1, 1, [1, 1, 1]), (0.9, 0.95, [0.7605675, 0.8685, 1])],
)
def test_gae(gamma: float, lam: float, returns: list[float]) -> None:
    """O1."""
    advantages_BS, returns_BS = gae(R3, V3, ALL3, gamma=gamma, lam=lam)
    assert returns_BS[0] == pytest.approx(returns, abs=1e-6)
    assert advantages_BS[0] == pytest.approx(np.array(returns) - V3[0], abs=1e-6)


def test_gae_carries_over_masked_tokens() -> None:
    """O2; and a reward at a masked token is not lost."""
    mask = np.array([[1, 1, 0, 0, 1]], bool)
    for hidden in (9.0, np.nan, np.inf):
        values = np.array([[0.5, 0.4, hidden, hidden, 0.3]])
        with np.errstate(invalid="ignore"):
            advantages, returns = gae(np.array([[0, 0, hidden * 0, 0, 1.0]]), values, mask, gamma=1, lam=0.95)
        assert advantages[0] == pytest.approx([0.43675, 0.565, 0, 0, 0.7], abs=1e-6)
        assert returns[0] == pytest.approx([0.93675, 0.965, 0, 0, 1], abs=1e-6)
    moved = gae(np.array([[0, 0, 0.25, 0, 1.0]]), np.zeros((1, 5)), mask, gamma=1, lam=1)[1]
    assert moved[0] == pytest.approx([1.25, 1.25, 0, 0, 1], abs=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_gae_is_its_definition_and_packed_sequences_are_apart(seed: int) -> None:
    """Against the double sum of the paper, each sequence by itself; what masked tokens earn is the token's before them."""
    rng = np.random.default_rng(seed)
    gamma, lam = rng.uniform(0.5, 1, 2)
    length, cut = 12, int(rng.integers(2, 10))
    rewards, values, mask = rng.normal(size=(1, length)), rng.normal(size=(1, length)), rng.random((1, length)) < 0.7
    segments = (np.arange(length) >= cut).astype(np.int32)[None]
    found = gae(rewards, values, mask, gamma=gamma, lam=lam, segments_BS=segments)[0][0]
    wanted = np.zeros(length)
    for part in (range(cut), range(cut, length)):
        acts = [t for t in part if mask[0, t]]
        v = [values[0, t] for t in acts] + [0.0]
        earned = [rewards[0, t:end].sum() for t, end in zip(acts, [*acts[1:], part.stop], strict=True)] if acts else []
        deltas = [earned[i] + gamma * v[i + 1] - v[i] for i in range(len(acts))]
        for i, t in enumerate(acts):
            wanted[t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    assert found == pytest.approx(wanted, abs=1e-5)


# -- losses (O3 to O7) ----------------------------------------------------------------------------------------------------

CLIPPED = ValueConfig(loss=ValueLoss.clipped_mse, clip=0.2)


def test_clipped_and_plain() -> None:
    """O3."""
    given = {"values": [0.9, 0.9, 0.0], "mask": [1, 1, 0], "old": [0.5, 0.5, 0.0]}
    loss, grad, found = mean_loss([1.0, 0.2, 5.0], CLIPPED, **given)
    assert loss == pytest.approx(0.1325, abs=1e-6)
    assert grad == pytest.approx([0, -0.35, 0], abs=1e-6)
    assert int(found.clipped_BS.sum()) / 2 == 0.5
    loss, grad, _ = mean_loss([1.0, 0.2, 5.0], ValueConfig(), values=given["values"], mask=given["mask"])
    assert loss == pytest.approx(0.125, abs=1e-6)
    assert grad == pytest.approx([0.05, -0.35, 0], abs=1e-6)


@pytest.mark.parametrize("loss", [member for member in ValueLoss if member != ValueLoss.bradley_terry])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_masked_does_not_matter(loss: ValueLoss, bad: float) -> None:
    """O4, O5: NaN and inf in scores, targets and old values; then everything masked."""
    config = ValueConfig(loss=loss)
    x = torch.zeros(1, 3, config.num_outputs)
    x[0, 1] = bad
    for mask in ([1, 0, 1], [0, 0, 0]):
        scores = x.clone().requires_grad_()
        found = value_losses(scores, targets([[0.5, bad, 0.5]], [mask], [[0.1, bad, 0.2]]), config)
        found.losses_BS.sum().backward()
        assert scores.grad is not None
        assert found.losses_BS.isfinite().all()
        assert scores.grad.isfinite().all()
        assert not scores.grad[0, 1].any()
        if not any(mask):
            assert found.losses_BS.sum() == 0
            assert not scores.grad.any()


def test_other_losses_by_hand() -> None:
    assert mean_loss([0.3, -1.0], ValueConfig(loss=ValueLoss.bce), values=[1.0, 0.25])[0] == pytest.approx(
        (math.log1p(math.exp(-0.3)) + 0.25 * math.log1p(math.exp(1)) + 0.75 * math.log1p(math.exp(-1))) / 2, rel=1e-6
    )
    assert mean_loss([0.3, 5.0], ValueConfig(loss=ValueLoss.huber, huber_delta=0.5), values=[0.0, 1.0])[0] == pytest.approx(
        (0.5 * 0.09 + 0.5 * (4 - 0.25)) / 2, rel=1e-6
    )
    pairs = ValueConfig(loss=ValueLoss.bradley_terry, centre=0.1)
    _, grad, found = mean_loss([2.0, 9.0, 0.5, 1.0, 3.0], pairs, values=[0.25, 0, 0.25, 0, 0], mask=[1, 0, 1, 1, 1])
    first, second = math.log1p(math.exp(-1.25)) + 0.1 * 2.5**2, math.log1p(math.exp(2)) + 0.1 * 4**2
    assert found.losses_BS[0].tolist() == pytest.approx([first, 0, 0, second, 0], rel=1e-6)
    assert grad[1] == 0
    with pytest.raises(ValueError, match="3 sequences are no pairs"):
        mean_loss([1.0, 2, 3], pairs, values=[0.0, 0, 0])
    with pytest.raises(ValueError, match="needs old_values"):
        mean_loss([1.0], CLIPPED, values=[0.0])
    with pytest.raises(ValueError, match="do not fit targets"):
        value_losses(torch.zeros(1, 2, 1), targets([[1.0]]), ValueConfig())


def test_hl_gauss() -> None:
    """The mass is 1, the mean of the bins is the target, and the loss is least there (arXiv 2403.03950, section 3.1)."""
    config = ValueConfig(loss=ValueLoss.hl_gauss, num_bins=41, value_min=-1, value_max=1)
    wanted = torch.tensor([-0.5, 0.0, 0.3])
    mass = gauss_bins(wanted, config)
    assert mass.sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert mass[1, 20].item() == pytest.approx(0.49503, abs=1e-4)  # P(|Z| < 0.5 / 0.75): half a bin to either side, in deviations
    assert decode(mass.log().clamp(min=-80)[None], config)[0].tolist() == pytest.approx(wanted.tolist(), abs=2e-3)
    right = value_losses(mass.log().clamp(min=-80)[None], targets([wanted.tolist()]), config).losses_BS
    wrong = value_losses(mass.flip(0).log().clamp(min=-80)[None], targets([wanted.tolist()]), config).losses_BS
    assert (right[0, [0, 2]] < wrong[0, [0, 2]]).all()
    assert right[0, 0].item() == pytest.approx(torch.special.entr(mass[0]).sum().item(), rel=1e-4)
    assert gauss_bins(torch.tensor([7.0]), config)[0, -1] > 0.5  # beyond the range counts in the end bin


def statistics_of(values: list[float], wanted: list[float], **config: Any) -> dict[str, float]:
    vector = value_statistics(torch.tensor([values]).unsqueeze(-1), targets([wanted]), ValueConfig(**config))
    assert len(vector) == ValueStatistics.size()
    return ValueStatistics.from_vector(vector.tolist()).metrics()


def test_explained_variance_and_calibration() -> None:
    """O6, and bins by hand."""
    found = statistics_of([1, 2, 3, 5], [1, 2, 3, 4], value_min=0, value_max=5)
    assert found["explained_variance"] == pytest.approx(0.85)
    assert (found["value_mean"], found["target_mean"]) == (2.75, 2.5)
    assert found["calibration_error"] == pytest.approx(0.25)
    assert found["accuracy"] == 1.0
    assert "explained_variance" not in statistics_of([1, 2], [3, 3])
    calibrated = statistics_of([0.25] * 4 + [0.75] * 4, [0, 0, 0, 1, 0, 1, 1, 1])
    assert calibrated["calibration_error"] == pytest.approx(0)
    assert calibrated["accuracy"] == 0.75
    pair = ValueConfig(loss=ValueLoss.bradley_terry)
    vector = value_statistics(torch.tensor([[2.0, 1.0, 0.0, 3.0]]).unsqueeze(-1), targets([[0.0] * 4]), pair).tolist()
    assert ValueStatistics.from_vector(vector).metrics()["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("reduction", "wanted"),
    [(ValueReduction.token_mean, 1.4), (ValueReduction.seq_mean_token_mean, 2.0), (ValueReduction.seq_mean_token_sum, 3.5)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_reductions(reduction: ValueReduction, wanted: float, packed: bool) -> None:
    """O7: a sequence of four tokens with loss 1 each, one of one token with loss 3; in two rows or in one."""
    objective = Value(ValueConfig(reduction=reduction), byte_vocabulary())
    segments = np.array([[0, 0, 0, 0, 1]] if packed else [[0] * 5] * 2, np.int32)
    mask = np.array([[1, 1, 1, 1, 1]] if packed else [[1, 1, 1, 1, 0], [0, 0, 1, 0, 0]], bool)
    goal = np.array([[1, 1, 1, 1, 3]] if packed else [[1] * 5, [3] * 5], np.float32)
    nothing = np.zeros(segments.shape, np.float32)
    made = objective.scored_examples(Scored(np.full(segments.shape, 120), segments, mask, np.sqrt(2 * goal), nothing, nothing))
    batch = Batch.from_examples(made, Attention.causal)
    head = ValueHeadConfig(init=ValueInit.zero).build(d_model=D, objective=objective.config)
    hidden = torch.randn(*segments.shape, D)
    assert head.loss(hidden, batch, divisor=batch.counted).loss.item() == pytest.approx(wanted, rel=1e-6)
    held_out = head.loss(hidden, batch, divisor=None)
    assert held_out.loss.sum().item() / batch.counted == pytest.approx(wanted, rel=1e-6)


# -- head -----------------------------------------------------------------------------------------------------------------

HEADS = {
    "linear": ValueHeadConfig(init=ValueInit.reward),
    "hidden": ValueHeadConfig(hidden_dim=8, bias=False, init=ValueInit.default),
    "norm": ValueHeadConfig(layer_norm=LayerNormConfig(), init=ValueInit.normal),
    "joint": ValueHeadConfig(init=ValueInit.reward, lm_weight=0.5),
}


def batch_of(values: Tensor, mask: Tensor, labels: Tensor | None = None, **given: Any) -> Batch:
    labels = torch.where(mask, torch.full_like(mask, 3, dtype=torch.long) if labels is None else labels, IGNORE)
    return Batch(torch.zeros_like(labels), labels, Attention.causal, int(mask.sum()), int(mask.sum()), values_BS=values, **given)


@pytest.mark.parametrize("name", HEADS)
def test_head_contract(name: str) -> None:
    """Meta, reset, number of parameters; gradients; one loss from both modes; a bf16 and an autocast call are fp32."""
    config = HEADS[name]
    check_module(lambda device: config.build(d_model=D, vocab_size=31, init_device=device), config.num_params(D, 31))
    head = config.build(d_model=D, vocab_size=31)
    hidden, mask = torch.randn(2, 5, D, requires_grad=True), torch.rand(2, 5) < 0.6
    batch = batch_of(torch.randn(2, 5), mask)
    found = head.loss(hidden, batch, divisor=4.0)
    apart = head.loss(hidden, batch, divisor=None)
    assert found.loss.item() == pytest.approx(apart.loss.sum().item() / 4, rel=1e-5)
    assert found.sums["loss"].item() == pytest.approx(apart.loss.sum().item(), rel=1e-5)
    assert not apart.loss[~mask].any()
    assert apart.statistics is not None
    assert len(apart.statistics) == head.num_statistics
    found.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad[mask].any()
    assert not hidden.grad[~mask].any()
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad is not None, parameter_name
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden).dtype == torch.float32
    head.to(torch.bfloat16)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert head(hidden.bfloat16()).dtype == torch.float32
    if name == "joint":
        only = replace(config, lm_weight=0.0).build(d_model=D)
        only.load_state_dict({k: v for k, v in head.state_dict().items() if not k.startswith("lm_head")})
        rest = apart.loss - only.loss(hidden, batch, divisor=None).loss
        lm = head.lm_head(hidden, labels=batch.labels_BS, loss_reduction="none", return_logits=False).loss
        assert torch.allclose(rest, 0.5 * lm, atol=1e-5)


def test_head_initialisations() -> None:
    for init, std in ((ValueInit.normal, 0.3), (ValueInit.reward, 4097**-0.5), (ValueInit.zero, 0.0)):
        summary = ValueHeadConfig(init=init, init_std=0.3).build(d_model=4096).summary
        assert summary.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not summary.bias.any()
    assert ValueHeadConfig(init=ValueInit.default).build(d_model=D).summary.bias.any()


def test_detached_trunk_and_nan_in_hidden_states() -> None:
    """V18 and O4 for the head: what stands at a masked position reaches nothing."""
    for detach in (False, True):
        head = ValueHeadConfig(detach_trunk=detach, init=ValueInit.reward).build(d_model=D)
        hidden = torch.randn(1, 4, D)
        hidden[0, 2] = math.nan
        hidden.requires_grad_()
        mask = torch.tensor([[True, True, False, True]])
        head.loss(hidden, batch_of(torch.ones(1, 4), mask), divisor=3.0).loss.backward()
        assert head.summary.weight.grad.isfinite().all()
        assert head.summary.weight.grad.any()
        assert (hidden.grad is not None and bool(hidden.grad.any())) != detach
        assert hidden.grad is None or bool(hidden.grad.isfinite().all())


def test_regression_on_the_last_state() -> None:
    """O10: a linear function of hidden states is found, also as bins and through a hidden layer."""
    generator = torch.Generator().manual_seed(0)
    hidden, w = torch.randn(64, 8, D, generator=generator), torch.randn(D, generator=generator) / D**0.5
    values = hidden @ w + 0.5
    batch = batch_of(values, torch.ones(64, 8, dtype=torch.bool))
    for loss in (ValueLoss.mse, ValueLoss.huber, ValueLoss.hl_gauss):
        objective = ValueConfig(loss=loss, value_min=-4, value_max=5)
        head = ValueHeadConfig().build(d_model=D, objective=objective)
        head.reset_parameters(generator)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.1 if loss == ValueLoss.hl_gauss else 0.03)
        for _ in range(400):
            optimizer.zero_grad()
            head.loss(hidden, batch, divisor=batch.counted).loss.backward()
            optimizer.step()
        statistics = head.loss(hidden, batch, divisor=None).statistics
        assert head.metrics(statistics.tolist())["explained_variance"] > 0.99, loss
        assert (head.values(hidden) - values).abs().mean() < 0.15


def test_contradictions_are_refused_in_one_line() -> None:
    for overrides, message in (
        (["head=default"], r"objective=value predicts a value, but head=default scores a token; use head=value"),
        (["objective=fim", "head=value"], r"head=value scores a value; use head=default.*or objective=value"),
        (["head=value", "objective.target=gae"], r"objective.target=gae needs numbers that data=stdlib does not hold: use data=jsonl"),
        (["head=value", "objective.loss=clipped_mse"], r"clipped_mse needs numbers"),
        (["head=value", "objective.bidirectional=true", "objective.alignment=state_before_action"], r"scores a token before it is read"),
        (["head=value", "objective.loss=bradley_terry", "objective.reduction=seq_mean_token_sum"], r"has no meaning for pairs"),
        (["head=value", "objective.loss=bce", "objective.value_max=2"], r"scores probabilities"),
        (["head=value", "objective.gamma=1.5"], r"objective.gamma=1.5 is out of range"),
        (["head=value", "head.tie_embeddings=true"], r"has no projection to tie"),
        (["head=value", "head.lm_weight=1", "objective.bidirectional=true"], r"predicts the next token, which has no meaning"),
        (["head=value", "objective.loss=msee"], r"objective.loss=msee"),
    ):
        with pytest.raises(ConfigError, match=message) as refusal:
            compose([o for o in ["objective=value", *overrides] if not (o == "objective=value" and "objective=fim" in overrides)])
        assert "\n" not in str(refusal.value)
