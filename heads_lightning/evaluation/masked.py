"""Asking models that predict hidden tokens from both sides: masked bits per byte, and what a masked diffusion model gives to text.

The masked score is at one rate and with one seed for every model, because losses at different rates are no comparison. It is not a bound
on anything. The diffusion bound is: with l uniform over 1 … L and l random tokens of L hidden, L/l times their nats is on average no less
than the nats of all L (LLaDA, arXiv 2502.09992, eq. 6: the form of the bound with the least variance). The numbers l of a text are spread
evenly, so few passes suffice; all draws are fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from heads_lightning.batch import IGNORE, Attention
from heads_lightning.configs.objective import MaskedDiffusionConfig, MixtureConfig, MLMConfig, ObjectiveConfig
from heads_lightning.evaluation.abilities import check_length
from heads_lightning.evaluation.likelihood import Row, encode_around, score_rows, score_tokens
from heads_lightning.evaluation.protocol import HiddenLine, bits_per_byte, clip_context, held_out_windows
from heads_lightning.experiment import TrainedModel
from heads_lightning.generation import denoise
from heads_lightning.objectives.base import SampleRandom, document_segments
from heads_lightning.registry import ConfigError

RATE = 0.15
"""Share of tokens hidden for the masked score, whatever a model was trained with."""
SEED = 20_190_524
WINDOW_DRAWS, LINE_DRAWS = 2, 8
"""Passes over each window, and over each hidden line, for the bound."""


def _parts(config: ObjectiveConfig) -> list[ObjectiveConfig]:
    return [*config.part_configs().values()] if isinstance(config, MixtureConfig) else [config]


def can_fill_masks(model: TrainedModel) -> bool:
    """True for models that predict hidden tokens from both sides."""
    return any(isinstance(part, MLMConfig | MaskedDiffusionConfig) for part in _parts(model.config.objective))


def is_diffusion(model: TrainedModel) -> bool:
    """True for models trained at every share of hidden tokens: only those bound the likelihood and write text."""
    return writes_by_masks(model.config.objective)


def writes_by_masks(objective: ObjectiveConfig) -> bool:
    """True for what hides every share of tokens."""
    return any(isinstance(part, MaskedDiffusionConfig) for part in _parts(objective))


def _mask(model: TrainedModel) -> int:
    mask = model.tokenizer.vocabulary.mask
    assert mask is not None  # an objective that hides tokens refuses a tokenizer without
    return mask


def _ordinary(model: TrainedModel, tokens_BS: np.ndarray) -> np.ndarray:
    return ~model.tokenizer.vocabulary.special_V[tokens_BS]


def _byte_counts(model: TrainedModel) -> np.ndarray:
    return np.array([len(text) for text in model.tokenizer.vocabulary.token_bytes])


def masked_bits_per_byte(model: TrainedModel, stream: np.ndarray, max_tokens: int) -> float:
    """Bits per byte of hidden tokens of held-out text, at RATE."""
    vocabulary, sizes = model.tokenizer.vocabulary, _byte_counts(model)
    nats, num_bytes = 0.0, 0
    for first, windows in held_out_windows(stream, model.config.data.sequence_length, max_tokens):
        tokens_BS = windows[:, 1:]  # the tokens that left-to-right models are scored on
        rng = SampleRandom(SEED, 0, first + np.arange(len(tokens_BS)))
        hidden_BS = (rng.uniform(tokens_BS.shape[1]) < RATE) & _ordinary(model, tokens_BS)
        scores = score_tokens(
            model,
            np.where(hidden_BS, _mask(model), tokens_BS),
            np.where(hidden_BS, tokens_BS, IGNORE),
            segments_BS=document_segments(tokens_BS, vocabulary.end_of_document),
            attention=Attention.bidirectional,
        )
        nats += scores.nats_BS.sum()
        num_bytes += int(sizes[tokens_BS[hidden_BS]].sum())
    return bits_per_byte(nats, num_bytes)


def bound_bits_per_byte(model: TrainedModel, stream: np.ndarray, max_tokens: int) -> float:
    """Upper bound on the bits per byte of held-out text, of a masked diffusion model."""
    vocabulary, sizes = model.tokenizer.vocabulary, _byte_counts(model)
    nats, num_bytes = 0.0, 0
    for first, windows in held_out_windows(stream, model.config.data.sequence_length, max_tokens):
        tokens_BS = windows[:, 1:]
        segments_BS = document_segments(tokens_BS, vocabulary.end_of_document)
        ordinary_BS = _ordinary(model, tokens_BS)
        for draw in range(WINDOW_DRAWS):
            rng = SampleRandom(SEED + 1, 0, WINDOW_DRAWS * (first + np.arange(len(tokens_BS))) + draw)
            hidden_BS, factor_B = _hide(ordinary_BS, rng)
            scores = score_tokens(
                model,
                np.where(hidden_BS, _mask(model), tokens_BS),
                np.where(hidden_BS, tokens_BS, IGNORE),
                segments_BS=segments_BS,
                attention=Attention.bidirectional,
            )
            nats += float((scores.nats_BS.sum(axis=1) * factor_B).sum()) / WINDOW_DRAWS
        num_bytes += int(sizes[tokens_BS[ordinary_BS]].sum())
    return bits_per_byte(nats, num_bytes)


def _hide(may_BS: np.ndarray, rng: SampleRandom) -> tuple[np.ndarray, np.ndarray]:
    """(bool [B, S], float [B]): l of the L positions that may be hidden, l spread evenly over 1 … L; and L / l."""
    total_B = may_BS.sum(axis=1)
    count_B = 1 + (rng.spread(may_BS.shape[1]) * total_B).astype(np.int64)
    keys_BS = np.where(may_BS, rng.uniform(may_BS.shape[1]), 2.0)
    rank_BS = keys_BS.argsort(axis=1).argsort(axis=1)
    return may_BS & (rank_BS < count_B[:, None]), total_B / np.minimum(count_B, np.maximum(total_B, 1))


def _around(model: TrainedModel, question: HiddenLine, length: int, *, with_suffix: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids before and after a hole of `length` tokens: as much as leaves it inside the length of training."""
    prefix, suffix = encode_around(model.tokenizer, question if with_suffix else question._replace(suffix=""))
    prefix_kept, suffix_kept = clip_context(prefix, suffix, room=max(model.config.data.sequence_length - length - 1, 0))
    begins = question.begins_document and len(prefix_kept) == len(prefix)
    return np.concatenate([[model.tokenizer.vocabulary.end_of_document] * begins, prefix_kept]).astype(np.int64), suffix_kept


def bound_of_lines(model: TrainedModel, questions: Sequence[HiddenLine], *, with_suffix: bool) -> float:
    """Upper bound on the bits per byte of hidden lines given what is around them, of a masked diffusion model. Their length is given."""
    mask, rows, factors = _mask(model), [], []
    for number, question in enumerate(questions):
        line = model.tokenizer.encode_inside(question.line)
        before, after = _around(model, question, len(line), with_suffix=with_suffix)
        rng = SampleRandom(SEED + 2, 0, LINE_DRAWS * number + np.arange(LINE_DRAWS))
        hidden_BS, factor_B = _hide(np.ones((LINE_DRAWS, len(line)), bool), rng)
        for hidden in hidden_BS:
            labels = np.full(len(before) + len(line) + len(after), IGNORE, np.int64)
            labels[len(before) : len(before) + len(line)] = np.where(hidden, line, IGNORE)
            rows.append(Row(np.concatenate([before, np.where(hidden, mask, line), after]), labels))
        factors += factor_B.tolist()
    scores = score_rows(model, rows, attention=Attention.bidirectional)
    nats = sum(float(s.nats_BS.sum()) * factor for s, factor in zip(scores, factors, strict=True)) / LINE_DRAWS
    return bits_per_byte(nats, sum(len(q.line.encode()) for q in questions))


def fill(
    model: TrainedModel,
    prefix: str,
    suffix: str,
    *,
    new_tokens: int,
    steps: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """`new_tokens` tokens between two texts, written by a masked diffusion model in any order.

    Raises:
        ConfigError: the model was not trained for it, or the answer is longer than its sequences.
    """
    if not is_diffusion(model):
        raise ConfigError(f"objective={model.config.objective.name} was not trained to write from masks; objective=masked_diffusion is")
    check_length(model, new_tokens, always=0)  # the masks are all there from the beginning
    mask, special_V = _mask(model), model.tokenizer.vocabulary.special_V
    question = HiddenLine(prefix, "", suffix, "", "", begins_document=True)
    before, after = _around(model, question, new_tokens, with_suffix=bool(suffix))
    tokens = [*before.tolist(), *[mask] * new_tokens, *after.tolist()]
    filled = denoise(
        model.backbone,
        model.head,
        [tokens],
        mask=mask,
        steps=steps or new_tokens,
        temperature=temperature,
        seed=seed,
        forbidden_ids=np.flatnonzero(special_V).tolist(),
    )[0]
    return model.tokenizer.decode(filled[len(before) : len(before) + new_tokens])
