"""What flows between the parts: examples (numpy) become a batch (tensors).

Shape legend of the whole project, used as suffixes of variable names:

    B  rows of a (micro-)batch      S  positions of a sequence     T  positions of an encoder's sequence
    D  width of the model           V  size of the vocabulary      N  positions that have a target (rows of the loss)
    H  attention heads              K  key/value heads             E  width of one attention head
    F  width of the feed-forward    L  layers                      R  raw tokens of a window, before the objective

**Labels are already aligned.** `labels_BS[b, s]` is what position s of row b predicts; nothing downstream shifts them. -100 (`IGNORE`)
means no target. A position attends only to positions of its own segment: packed documents do not see each other, and padding
(segment -1) sees only padding, so that no row of an attention matrix is empty.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the configuration path reads Attention and must not pay for numpy or torch
    import numpy as np
    import torch

IGNORE = -100
"""Label of a position without a target."""
PADDING = -1
"""Segment of a padded position."""


class Attention(StrEnum):
    """Which positions a position may see, inside its own segment."""

    causal = "causal"
    """Itself and everything before it."""
    bidirectional = "bidirectional"
    """Everything."""
    prefix = "prefix"
    """The whole prefix (`Batch.prefix_BS`), and causally the rest."""
    encoder_decoder = "encoder_decoder"
    """An encoder that sees its whole input; a causal decoder that also sees the encoder."""


class Examples(NamedTuple):
    """A batch of training examples as numpy arrays: what an objective returns."""

    tokens_BS: np.ndarray
    """int64 [B, S]: the ids that the model reads."""
    labels_BS: np.ndarray
    """int64 [B, S]: the id that each position predicts, or IGNORE. Already aligned."""
    segments_BS: np.ndarray | None = None
    """int32 [B, S]: number of the packed piece that a position belongs to (0, 1, …); PADDING for padding. None: one segment a row."""
    weights_BS: np.ndarray | None = None
    """float32 [B, S]: weight of each target in the loss. None: all 1. The denominator of a mean does not depend on it: see counts_B."""
    prefix_BS: np.ndarray | None = None
    """bool [B, S]: positions of a bidirectional prefix (Attention.prefix only)."""
    encoder_tokens_BT: np.ndarray | None = None
    """int64 [B, T]: the encoder's input (Attention.encoder_decoder only)."""
    encoder_segments_BT: np.ndarray | None = None
    """int32 [B, T]: like segments_BS; a decoder position sees encoder positions of the same segment."""
    part_BS: np.ndarray | None = None
    """int8 [B, S]: which component of the loss a target is reported under (see Objective.parts). None: all 0."""
    values_BS: np.ndarray | None = None
    """float32 [B, S], finite: the number that each position with a label must score (objective=value); 0 elsewhere."""
    old_values_BS: np.ndarray | None = None
    """float32 [B, S], finite: its score when the data was made, which a clipped loss stays near; 0 elsewhere."""
    counts_B: np.ndarray | None = None
    """int64 [B]: what each row counts for in the divisor of the loss. None: its labels. (Pairs and sequences count once.)"""


class Batch(NamedTuple):
    """A micro-batch on the device. Fields as in Examples, as tensors (ids and labels int64)."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    attention: Attention
    num_targets: int
    """Targets in this micro-batch (Examples.counts_B), counted on the host: no loss has to synchronise with the device to know it."""
    step_targets: int
    """`counted` of this rank's share of the whole optimizer step: its sum over the ranks divides the loss."""
    segments_BS: torch.Tensor | None = None
    weights_BS: torch.Tensor | None = None
    prefix_BS: torch.Tensor | None = None
    encoder_tokens_BT: torch.Tensor | None = None
    encoder_segments_BT: torch.Tensor | None = None
    part_BS: torch.Tensor | None = None
    values_BS: torch.Tensor | None = None
    old_values_BS: torch.Tensor | None = None
    mean_over: int | None = None
    """Tokens that the loss is a mean over (Examples.counts_B). None: the targets."""
    num_padding: int = 0
    """Padded positions."""

    @property
    def counted(self) -> int:
        """Tokens that the loss of this micro-batch is a mean over."""
        return self.num_targets if self.mean_over is None else self.mean_over

    @classmethod
    def from_examples(cls, examples: Examples, attention: Attention, *, step_targets: int | None = None) -> Batch:
        """Wrap the arrays as tensors (no copy where numpy and torch agree on the type)."""
        import numpy as np
        import torch

        num_targets = int(np.count_nonzero(examples.labels_BS != IGNORE))
        arrays = examples._asdict()
        counts_B = arrays.pop("counts_B")
        mean_over = None if counts_B is None else int(counts_B.sum())
        counted = num_targets if mean_over is None else mean_over
        return cls(
            **{k: None if v is None else torch.from_numpy(v) for k, v in arrays.items()},  # pyright: ignore[reportArgumentType]
            attention=attention,
            num_targets=num_targets,
            step_targets=counted if step_targets is None else step_targets,
            mean_over=mean_over,
            num_padding=0 if examples.segments_BS is None else int(np.count_nonzero(examples.segments_BS == PADDING)),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        import torch

        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in self._asdict().items() if isinstance(v, torch.Tensor)}
        return self._replace(**moved)
