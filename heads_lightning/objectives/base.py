"""What an objective is: a pure function from windows of raw tokens and randomness to examples. Numpy only: no tensors, no model.

The data is one long stream of ids in which every document is preceded by the end-of-document token. That token opens a segment: it is
read as "a document begins here" and predicted as "the document ends here". An objective sees a batch of windows of the stream, so that
it can be vectorised; each row is nevertheless a function of its own sample alone (`SampleRandom` is keyed by seed, epoch and index),
whatever the batch around it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

from heads_lightning.batch import Attention, Examples
from heads_lightning.registry import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """What objectives need to know of a tokenizer. Ids of roles that a tokenizer lacks are None."""

    size: int
    """Entries: every id is below it."""
    end_of_document: int
    padding: int
    mask: int | None = None
    fim_prefix: int | None = None
    fim_suffix: int | None = None
    fim_middle: int | None = None
    fim_end: int | None = None
    """End of an infilled middle: where generation stops."""
    fim_format: str = "own"
    """Family of the infilling tokens: a name in configs.fim_format."""
    sentinels: tuple[int, ...] = ()
    """Of span corruption, in order of use."""
    added: tuple[int, ...] = ()
    """Special tokens that a tokenizer of others did not have: a trained model has not met them."""
    special_V: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool [V]: ids that are not text: never masked, never drawn as a replacement."""
    token_bytes: tuple[bytes, ...] = ()
    """UTF-8 bytes of each id; empty for special ids."""
    word_start_V: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool [V]: ids that begin a word wherever they stand (leading white space or punctuation)."""
    encode: Callable[[str], list[int]] = field(default=lambda text: [], repr=False)
    """Ids of a text that stands alone, no special tokens added."""


class Window(NamedTuple):
    """How much of the stream a sample covers."""

    stride: int
    """Tokens from the start of one window to the start of the next."""
    length: int
    """Tokens of a window; those past `stride` are seen by the next window too (a label needs one token more than the input)."""


class Rows(NamedTuple):
    """Whole documents side by side, padded at the end."""

    tokens_BS: np.ndarray
    """int64 [B, S]: a marker and the document after it, or a piece of a document that is longer than a row; 0 where padded."""
    next_BS: np.ndarray
    """int64 [B, S]: what follows each in the stream; after a document, the marker of the next one."""
    segments_BS: np.ndarray
    """int32 [B, S]: number of the document in its row; PADDING where padded."""


_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = np.uint64(_GOLDEN)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): a bijection of uint64 whose output bits look independent."""
    x = x ^ (x >> _SHIFTS[0])
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x


def _mix_one(x: int) -> int:
    """_mix of one number: arithmetic of Python, since numpy takes ten times as long over a scalar."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


class SampleRandom:
    """Counter-based random numbers for a batch of samples: row b depends on (seed, epoch, indices[b]) and the order of the calls alone.

    Order of access, batch, worker and rank counts and resuming therefore change nothing.

    Args:
        seed: of the experiment.
        epoch: of the pass over the data.
        indices: int [B], numbers of the samples.
        trained: int [B], positions that training has read before each sample: what schedules depend on. It follows from seed, epoch and
            index, because the order of samples does. None: after all schedules have ended (validation, evaluation).
    """

    def __init__(self, seed: int, epoch: int, indices: np.ndarray, trained: np.ndarray | None = None) -> None:
        self._run_key = _mix_one((seed + _GOLDEN) & _WORD)
        self._epoch_key = _mix_one((self._run_key + epoch * _GOLDEN) & _WORD)
        self._indices_B = np.asarray(indices)
        self.trained_B = None if trained is None else np.asarray(trained, np.int64)
        self._drawn = 0

    @cached_property
    def _key_B(self) -> np.ndarray:
        return _mix(np.uint64(self._epoch_key) + self._indices_B.astype(np.uint64) * _STEP)

    @property
    def rows(self) -> int:
        """Samples in the batch."""
        return len(self._key_B)

    def select(self, rows: np.ndarray) -> SampleRandom:
        """Fresh numbers (none drawn yet) of some of the samples."""
        chosen = object.__new__(SampleRandom)
        chosen._run_key, chosen._epoch_key, chosen._drawn = self._run_key, self._epoch_key, 0
        chosen._indices_B, chosen.trained_B = self._indices_B[rows], None if self.trained_B is None else self.trained_B[rows]
        return chosen

    def spread(self, sequence_length: int) -> np.ndarray:
        """float64 [B], uniform in [0, 1) and spread evenly over any run of samples in the order of training (of validation: by index).

        The multiples of the golden ratio, modulo 1, from a random beginning: n consecutive ones leave no gap beyond 1.7 / n. A batch
        thereby covers [0, 1) evenly, and yet each row is a function of its own sample alone.
        """
        number_B = self._indices_B if self.trained_B is None else self.trained_B // sequence_length
        return _fraction(np.uint64(self._run_key) + number_B.astype(np.uint64) * _STEP)

    def bits(self, count: int) -> np.ndarray:
        """uint64 [B, count], uniform."""
        counter = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64) * _STEP
        self._drawn += count
        return _mix(self._key_B[:, None] + counter)

    def uniform(self, count: int) -> np.ndarray:
        """float64 [B, count], uniform in [0, 1)."""
        return _fraction(self.bits(count))

    def uint16(self, count: int) -> np.ndarray:
        """uint16 [B, count], uniform: a quarter of the cost of uniform, for one draw a token."""
        return self.bits(-(-count // 4)).view(np.uint16)[:, :count]

    def uint32(self, count: int) -> np.ndarray:
        """uint32 [B, count], uniform."""
        return self.bits(-(-count // 2)).view(np.uint32)[:, :count]

    def bits_at(self, rows: np.ndarray, slots: np.ndarray, stream: int = 0) -> np.ndarray:
        """uint64, uniform: the number in slot `slots[…]` of row `rows[…]` (broadcast together), whatever was drawn before.

        For a few draws at places that depend on the data. A `stream` is apart from every other stream and from `bits`.
        """
        key_B = self._key_B ^ np.uint64(_mix_one((stream + 1) * _GOLDEN & _WORD))
        return _mix(key_B[rows] + (np.asarray(slots) + 1).astype(np.uint64) * _STEP)

    def uniform_at(self, rows: np.ndarray, slots: np.ndarray, stream: int = 0) -> np.ndarray:
        """float64, uniform in [0, 1): see bits_at."""
        return _fraction(self.bits_at(rows, slots, stream))


def _fraction(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1): the upper 53 bits."""
    return (bits >> np.uint64(11)) * 2.0**-53


class Ramp(NamedTuple):
    """A number that goes linearly from `start` to `end` over the first `tokens` positions of training, and stays there."""

    start: float
    end: float
    tokens: int = 0
    """0: `end` from the beginning."""

    @property
    def largest(self) -> float:
        """What it never exceeds."""
        return max(self.start, self.end) if self.tokens else self.end

    def at(self, rng: SampleRandom) -> np.ndarray:
        """float64 [B]: its value for each sample."""
        if rng.trained_B is None or not self.tokens:
            return np.full(rng.rows, self.end)
        return self.start + (self.end - self.start) * np.minimum(rng.trained_B / self.tokens, 1.0)


class Objective(ABC):
    """Interface of every objective."""

    attention: ClassVar[Attention]
    """Which positions may see which."""
    parts: tuple[str, ...] = ()
    """Names of the components that the loss is also reported by (Examples.part_BS indexes them). Empty: no split."""
    steps_ahead: int = 0
    """Steps beyond the next token that are predicted too. Labels, weights and parts are then [B, (1 + steps_ahead)·S]: a block of S for
    each step, the next token's first."""
    counts_apart: bool = False
    """True: the loss is a mean over Examples.counts_B, with weights_BS, and not over its targets."""
    rewrites_stream: bool = False
    """True: `rewrite` changes the stream before windows are cut (document-level transforms, kept for comparison)."""
    whole_documents: bool = False
    """True: rows are whole documents, read by `examples_of_documents`, and not windows of the stream."""

    @abstractmethod
    def window(self, sequence_length: int) -> Window:
        """Raw tokens that fill `sequence_length` positions."""

    def decoder_length(self, sequence_length: int) -> int:
        """Positions of Examples.tokens_BS. For an encoder-decoder `sequence_length` is the encoder's, and the decoder's may be another."""
        return sequence_length

    @abstractmethod
    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        """Examples of `sequence_length` positions from windows [B, R] of the stream (R = window(sequence_length).length).

        The windows have the type of the stream, uint16 as a rule: arithmetic on ids wants `astype(np.int64)` first.
        """

    def examples_of_documents(self, rows: Rows, rng: SampleRandom) -> Examples:
        """Examples from rows of whole documents. Only with whole_documents."""
        raise NotImplementedError("this objective reads windows of the stream")

    def counters(self) -> dict[str, int]:
        """What has been counted so far and is worth logging, by name (`…_share` is made of two: see FIM)."""
        return {}

    def rewrite(self, stream: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The stream of one epoch, at least as long as `stream`. Only with rewrites_stream."""
        raise NotImplementedError("this objective does not rewrite the stream")


def gather_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: the indices start, start + 1, …, start + length - 1 of every range, one range after the other."""
    ends = lengths.cumsum()
    indices = (starts - (ends - lengths)).repeat(lengths)
    indices += counting(len(indices))
    return indices


_counted = np.arange(0)


def counting(count: int) -> np.ndarray:
    """int64 [count], read only: 0, 1, 2, … without writing them anew each time (up to 8 MB of them)."""
    global _counted
    if count > len(_counted):
        if count > 1 << 20:
            return np.arange(count)
        fresh = np.arange(max(2 * count, 1 << 16))
        fresh.flags.writeable = False
        _counted = fresh
    return _counted[:count]


def require_roles(vocabulary: Vocabulary, roles: tuple[str, ...], objective: str) -> tuple[int, ...]:
    """Ids of the special tokens `roles` (names of fields of Vocabulary); refuses a vocabulary that lacks one."""
    ids = {role: getattr(vocabulary, role) for role in roles}
    if missing := [role for role, token in ids.items() if token is None]:
        raise ConfigError(f"objective={objective} needs the special tokens {', '.join(missing)}, which the tokenizer lacks; add them to it")
    return tuple(ids.values())


def ordinary_ids(vocabulary: Vocabulary, objective: str) -> np.ndarray:
    """bool [V]: ids that are text, which alone may be hidden or drawn; refuses a vocabulary that has none."""
    ordinary_V = np.ones(vocabulary.size, bool)
    ordinary_V[: len(vocabulary.special_V)] = ~vocabulary.special_V
    named = (vocabulary.mask, vocabulary.padding, vocabulary.end_of_document)
    ordinary_V[[token for token in named if token is not None]] = False
    if not ordinary_V.any():
        raise ConfigError(f"objective={objective} needs a vocabulary with ordinary tokens; every id of this tokenizer is special")
    return ordinary_V


def document_segments(tokens_BR: np.ndarray, end_of_document: int) -> np.ndarray:
    """int32 [B, R]: number of the document that each position belongs to, from 0 in each row; the marker opens its document."""
    rows, width = tokens_BR.shape
    opens = tokens_BR == end_of_document
    opens[:, 0] = True
    starts = np.flatnonzero(opens)  # few: a repeat of runs costs half of a running sum over every position
    row = starts // width
    number = counting(len(starts)) - np.flatnonzero(starts == row * width)[row]
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = rows * width - starts[-1:]
    return np.repeat(number.astype(np.int32), lengths).reshape(rows, width)
