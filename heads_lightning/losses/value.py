"""Losses of values: scores against numbers, in fp32, per position and undivided. Ours, not an implementation of cross-entropy.

Positions without a target are taken out with `where`, never by multiplying: NaN times zero is NaN. Pairs (bradley_terry) stand one after
the other: of the positions with a target, in order of rows and places, the first is chosen and the second rejected, and so on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from heads_lightning.configs.value import ValueConfig, ValueLoss
from heads_lightning.precision import widest_float


class ValueTargets(NamedTuple):
    """What scores are judged by."""

    mask_BS: Tensor
    """bool [B, S]: positions with a target."""
    values_BS: Tensor
    """fp32 [B, S]: the targets; of pairs, the margin. Anything where the mask is false."""
    old_values_BS: Tensor | None = None
    """fp32 [B, S]: scores when the data was made (clipped_mse)."""


class ValueLosses(NamedTuple):
    """Losses of a batch, undivided. Exactly 0, gradient included, where there is no target."""

    losses_BS: Tensor
    """fp32 [B, S]; a pair's stands at its first position."""
    clipped_BS: Tensor | None = None
    """bool [B, S]: the clipped error is the larger one (clipped_mse)."""


def value_losses(outputs_BSK: Tensor, targets: ValueTargets, config: ValueConfig) -> ValueLosses:
    """How far scores are from their targets.

    Args:
        outputs_BSK: fp32 [B, S, K]: what the head returns; K is config.num_outputs.
        targets: what they must reach.
        config: which loss, and its numbers.

    Raises:
        ValueError: clipped_mse without old values, an odd number of sequences in pairs, a shape that does not fit.
    """
    if outputs_BSK.shape != (*targets.values_BS.shape, config.num_outputs):
        raise ValueError(
            f"scores {list(outputs_BSK.shape)} do not fit targets {list(targets.values_BS.shape)} and {config.num_outputs} outputs"
        )
    mask_BS = targets.mask_BS
    outputs_BSK = torch.where(mask_BS.unsqueeze(-1), outputs_BSK, 0.0)
    values_BS = torch.where(mask_BS, targets.values_BS, 0.0)
    if config.loss == ValueLoss.bradley_terry:
        return ValueLosses(_pair_losses(outputs_BSK.squeeze(-1), values_BS, mask_BS, config.centre))
    if config.loss == ValueLoss.hl_gauss:
        losses_BS = F.cross_entropy(outputs_BSK.movedim(-1, 1), gauss_bins(values_BS, config).movedim(-1, 1), reduction="none")
        return ValueLosses(torch.where(mask_BS, losses_BS, 0.0))
    scores_BS = outputs_BSK.squeeze(-1)
    if config.loss == ValueLoss.clipped_mse:
        return _clipped(scores_BS, values_BS, targets, config.clip)
    if config.loss == ValueLoss.bce:
        losses_BS = F.binary_cross_entropy_with_logits(scores_BS, values_BS, reduction="none")
    elif config.loss == ValueLoss.huber:
        losses_BS = F.huber_loss(scores_BS, values_BS, reduction="none", delta=config.huber_delta)
    else:
        losses_BS = 0.5 * (scores_BS - values_BS).square()
    return ValueLosses(torch.where(mask_BS, losses_BS, 0.0))


def _clipped(scores_BS: Tensor, values_BS: Tensor, targets: ValueTargets, clip: float) -> ValueLosses:
    if targets.old_values_BS is None:
        raise ValueError("objective.loss=clipped_mse needs old_values with the targets; use objective.loss=mse without them")
    old_BS = torch.where(targets.mask_BS, targets.old_values_BS, 0.0)
    near_BS = torch.clamp(scores_BS, old_BS - clip, old_BS + clip)
    plain_BS, clipped_BS = (scores_BS - values_BS).square(), (near_BS - values_BS).square()
    losses_BS = torch.where(targets.mask_BS, 0.5 * torch.maximum(plain_BS, clipped_BS), 0.0)
    return ValueLosses(losses_BS, (clipped_BS > plain_BS) & targets.mask_BS)


def _pair_losses(scores_BS: Tensor, margins_BS: Tensor, mask_BS: Tensor, centre: float) -> Tensor:
    places_N = mask_BS.reshape(-1).nonzero().squeeze(1)
    if len(places_N) % 2:
        raise ValueError(f"{len(places_N)} sequences are no pairs: each row must hold a chosen one and then its rejected one")
    chosen_P, rejected_P = scores_BS.reshape(-1)[places_N].view(-1, 2).unbind(1)
    margin_P = margins_BS.reshape(-1)[places_N[::2]]
    losses_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    if centre:
        losses_P = losses_P + centre * (chosen_P + rejected_P).square()
    return torch.zeros_like(scores_BS).reshape(-1).index_put((places_N[::2],), losses_P).view_as(scores_BS)


def bin_centres(config: ValueConfig, like: Tensor) -> Tensor:
    """fp32 [K]: the value that each bin of hl_gauss stands for."""
    width = (config.value_max - config.value_min) / config.num_bins
    return config.value_min + width * (torch.arange(config.num_bins, device=like.device, dtype=torch.float32) + 0.5)


def gauss_bins(values: Tensor, config: ValueConfig) -> Tensor:
    """[..., K]: mass in each bin of a Gaussian around each value, of width 0.75 bins (arXiv 2403.03950, section 3.1), cut at the ends."""
    width = (config.value_max - config.value_min) / config.num_bins
    edges = config.value_min + width * torch.arange(config.num_bins + 1, device=values.device, dtype=torch.float32)
    values = values.clamp(config.value_min, config.value_max).unsqueeze(-1)
    below = torch.special.erf((edges - values) / (0.75 * width * math.sqrt(2)))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


def decode(outputs_BSK: Tensor, config: ValueConfig) -> Tensor:
    """fp32 [B, S]: the value that the outputs stand for. Of pairs, the score: only differences mean something."""
    if config.loss == ValueLoss.hl_gauss:
        return (outputs_BSK.softmax(-1) * bin_centres(config, outputs_BSK)).sum(-1)
    scores_BS = outputs_BSK.squeeze(-1)
    return scores_BS.sigmoid() if config.loss == ValueLoss.bce else scores_BS


# -- statistics: sums that add up over batches and ranks -----------------------------------------------------------------

NUM_BINS = 10
"""Bins of the reliability picture."""


class ValueStatistics(NamedTuple):
    """Sums over targets from which explained variance and calibration are made. Of pairs: the chosen's probability against 1."""

    number: float
    """Of targets."""
    predicted: float
    target: float
    predicted_squared: float
    target_squared: float
    error: float
    error_squared: float
    right: float
    """Predictions on the same side of the middle of the range as their target."""
    bin_count: list[float]
    bin_predicted: list[float]
    bin_target: list[float]

    @classmethod
    def size(cls) -> int:
        """Numbers in all."""
        return 8 + 3 * NUM_BINS

    @classmethod
    def from_vector(cls, vector: list[float]) -> ValueStatistics:
        """From the sums in the order of the fields."""
        bins = [vector[8 + i * NUM_BINS : 8 + (i + 1) * NUM_BINS] for i in range(3)]
        return cls(*vector[:8], *bins)  # pyright: ignore[reportArgumentType]

    def metrics(self) -> dict[str, float]:
        """Explained variance 1 − Var(R − v)/Var(R), moments, and the expected calibration error (mean |v − R| of bins, by their counts)."""
        if not self.number:
            return {}
        target_variance = self.target_squared / self.number - (self.target / self.number) ** 2
        error_variance = self.error_squared / self.number - (self.error / self.number) ** 2
        off = sum(abs(p - t) for p, t in zip(self.bin_predicted, self.bin_target, strict=True))
        found = {
            "value_mean": self.predicted / self.number,
            "value_std": math.sqrt(max(self.predicted_squared / self.number - (self.predicted / self.number) ** 2, 0.0)),
            "target_mean": self.target / self.number,
            "target_std": math.sqrt(max(target_variance, 0.0)),
            "calibration_error": off / self.number,
            "accuracy": self.right / self.number,
        }
        if target_variance > 1e-12 * max(self.target_squared / self.number, 1e-30):
            found["explained_variance"] = 1 - error_variance / target_variance
        return found


@torch.no_grad()
def value_statistics(outputs_BSK: Tensor, targets: ValueTargets, config: ValueConfig) -> Tensor:
    """The sums of ValueStatistics over a batch, as one vector: fp64 where the device has it."""
    predicted_N, target_N = _predictions(outputs_BSK, targets, config)
    exact = widest_float(predicted_N.device)
    v, r = predicted_N.to(exact), target_N.to(exact)
    low, high = (0.0, 1.0) if config.pairwise else (config.value_min, config.value_max)
    middle = (low + high) / 2
    right = ((v > middle) == (r > middle)).to(exact)
    sums = [torch.ones_like(v), v, r, v * v, r * r, r - v, (r - v).square(), right]
    bins_N = ((v - low) / (high - low) * NUM_BINS).floor().clamp(0, NUM_BINS - 1).long()
    binned = [torch.zeros(NUM_BINS, dtype=exact, device=v.device).index_add(0, bins_N, values) for values in (torch.ones_like(v), v, r)]
    return torch.cat([torch.stack([values.sum() for values in sums]), *binned])


def _predictions(outputs_BSK: Tensor, targets: ValueTargets, config: ValueConfig) -> tuple[Tensor, Tensor]:
    values_N = decode(outputs_BSK, config)[targets.mask_BS]
    if not config.pairwise:
        return values_N, targets.values_BS[targets.mask_BS]
    chosen_P, rejected_P = values_N.view(-1, 2).unbind(1)
    probability_P = (chosen_P - rejected_P).sigmoid()
    return probability_P, torch.ones_like(probability_P)
