"""A mixture: each sample is given to one of several objectives, drawn by weight; the loss of each is reported on its own.

Choices:
- A sample belongs to a part by a draw of its own, so the shares hold in the long run and nothing depends on the batch.
- The parts read windows of different lengths. Windows begin at the shortest stride, so that no token is skipped; a part that reads more
  sees some tokens of the next window too.
- The mode of a part is a token that opens each of its pieces: in place of the end-of-document marker where the piece has one, in front
  where it begins inside a document. It is read, never predicted. Mode tokens are the last of the tokenizer's sentinels.
- Parts must agree on attention. Causal parts fit beside prefix parts: their prefix is empty. The decoder of an encoder-decoder is as long
  as its longest part's; the others are padded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from heads_lightning.batch import IGNORE, PADDING, Attention, Examples
from heads_lightning.objectives.base import Objective, Ramp, SampleRandom, Vocabulary, Window

_CHOICE = 1 << 20
"""Stream of the draws that choose the part: apart from those of the parts."""


class Part(NamedTuple):
    """One objective of a mixture."""

    name: str
    weight: Ramp
    objective: Objective
    mode: int | None = None
    """Token that opens its pieces."""


class Mixture(Objective):
    """Several objectives, one for each sample."""

    def __init__(self, components: list[Part], attention: Attention, vocabulary: Vocabulary) -> None:
        self.components = components
        self.vocabulary = vocabulary
        self.attention = attention  # pyright: ignore[reportAttributeAccessIssue]  # that of its parts
        self.parts = tuple(
            f"{part.name}_{inner}" if inner else part.name for part in components for inner in (part.objective.parts or ("",))
        )
        counts = [max(1, len(part.objective.parts)) for part in components]
        self._first_part = np.cumsum([0, *counts[:-1]])
        self._counts = any(part.objective.counts_apart for part in components)

    @property
    def counts_apart(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._counts

    def window(self, sequence_length: int) -> Window:
        windows = [part.objective.window(self._room(part, sequence_length)) for part in self.components]
        return Window(min(w.stride for w in windows), max(w.length for w in windows))

    def counters(self) -> dict[str, int]:
        return {f"{part.name}_{name}": count for part in self.components for name, count in part.objective.counters().items()}

    def _room(self, part: Part, sequence_length: int) -> int:
        """Positions that a part fills: a mode token may need one."""
        return sequence_length - (part.mode is not None)

    def _choose(self, rng: SampleRandom) -> np.ndarray:
        """int [B]: the part of each sample."""
        weights_BP = np.stack([part.weight.at(rng) for part in self.components], axis=1)
        edges_BP = np.cumsum(weights_BP, axis=1)
        rows = np.arange(rng.rows)
        draw_B = rng.uniform_at(rows, np.zeros_like(rows), _CHOICE)
        return (draw_B[:, None] >= edges_BP[:, :-1] / edges_BP[:, -1:]).sum(axis=1)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        chosen_B = self._choose(rng)
        out = self._blank(len(tokens_BR), sequence_length)
        for number, part in enumerate(self.components):
            which = np.flatnonzero(chosen_B == number)
            if len(which):
                room = self._room(part, sequence_length)
                width = part.objective.window(room).length
                made = part.objective.examples(np.ascontiguousarray(tokens_BR[which, :width]), rng.select(which), room)
                if part.mode is not None:
                    made = open_with(made, part.mode, self.vocabulary)
                self._put(out, which, made, int(self._first_part[number]))
        return out

    def decoder_length(self, sequence_length: int) -> int:
        return max(part.objective.decoder_length(sequence_length) for part in self.components)

    def _blank(self, rows: int, sequence_length: int) -> Examples:
        """Examples of padding."""
        shape, encodes = (rows, self.decoder_length(sequence_length)), self.attention is Attention.encoder_decoder
        return Examples(
            tokens_BS=np.full(shape, self.vocabulary.padding, np.int64),
            labels_BS=np.full(shape, IGNORE, np.int64),
            segments_BS=np.full(shape, PADDING if encodes else 0, np.int32),
            prefix_BS=np.zeros(shape, bool) if self.attention is Attention.prefix else None,
            encoder_tokens_BT=np.full((rows, sequence_length), self.vocabulary.padding, np.int64) if encodes else None,
            encoder_segments_BT=np.full((rows, sequence_length), PADDING, np.int32) if encodes else None,
            weights_BS=np.ones(shape, np.float32) if self._counts else None,
            part_BS=np.zeros(shape, np.int8),
            counts_B=np.zeros(rows, np.int64) if self._counts else None,
        )

    def _put(self, out: Examples, rows: np.ndarray, made: Examples, first_part: int) -> None:
        for name, array in made._asdict().items():
            target = getattr(out, name)
            if array is not None and target is not None:
                target[(rows, slice(array.shape[1])) if array.ndim == 2 else rows] = array
        assert out.part_BS is not None
        out.part_BS[rows] += np.int8(first_part)
        if out.counts_B is not None and made.counts_B is None:
            out.counts_B[rows] = (made.labels_BS != IGNORE).sum(axis=1)


class _Opened:
    """Where the positions of rows go when a token opens every piece: one longer, or in the place of the marker that is there."""

    def __init__(self, tokens_BS: np.ndarray, segments_BS: np.ndarray, mode: int, vocabulary: Vocabulary) -> None:
        width = tokens_BS.shape[1]
        marked_B = tokens_BS[:, 0] == vocabulary.end_of_document
        source_BS = np.arange(width + 1) - ~marked_B[:, None]  # which position each comes from: -1 the new first
        self._added_BS = (source_BS < 0) | (source_BS >= width)
        self._source_BS = np.clip(source_BS, 0, width - 1)
        self._front_BS = self._added_BS & ~marked_B[:, None]
        self.segments_BS = self.moved(segments_BS, 0, PADDING)
        self.segments_BS[:, 0] = segments_BS[:, 0]  # the new first position belongs to the piece that it opens
        self.tokens_BS = self.moved(tokens_BS, mode, vocabulary.padding)
        opens_BS = np.diff(self.segments_BS, axis=1, prepend=PADDING) > 0
        self.tokens_BS[opens_BS & (self.tokens_BS == vocabulary.end_of_document)] = mode

    def moved(self, array_BS: np.ndarray, front: int, back: int) -> np.ndarray:
        """Another array of the rows, with what stands at a new first and at a new last position."""
        taken_BS = np.take_along_axis(array_BS, self._source_BS, axis=1)
        taken_BS[self._added_BS] = back
        taken_BS[self._front_BS] = front
        return taken_BS


def open_with(made: Examples, mode: int, vocabulary: Vocabulary) -> Examples:
    """Examples one position longer, in which `mode` opens every piece; of an encoder-decoder, every piece of the encoder's input.

    A row that begins with an end-of-document marker has the place for the token already: its extra position is padding, at the end.
    """
    if made.encoder_tokens_BT is not None:
        assert made.encoder_segments_BT is not None
        encoder = _Opened(made.encoder_tokens_BT, made.encoder_segments_BT, mode, vocabulary)
        return made._replace(encoder_tokens_BT=encoder.tokens_BS, encoder_segments_BT=encoder.segments_BS)
    segments_BS = np.zeros(made.tokens_BS.shape, np.int32) if made.segments_BS is None else made.segments_BS
    opened = _Opened(made.tokens_BS, segments_BS, mode, vocabulary)
    fronts = {"weights_BS": (0, 0), "prefix_BS": (1, 0), "part_BS": (0, 0)}
    others = {name: opened.moved(array, *fronts[name]) for name in fronts if (array := getattr(made, name)) is not None}
    return made._replace(
        tokens_BS=opened.tokens_BS,
        segments_BS=opened.segments_BS,
        labels_BS=opened.moved(made.labels_BS, IGNORE, IGNORE),
        **others,
    )
