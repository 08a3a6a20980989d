"""UL2's mixture of denoisers (arXiv 2205.05131, 3.1): short spans (R), prefixes (S), long or many spans (X).

R hides 15 % in spans of 3 or 8 tokens; X 50 % in spans of 3 or 8, and 15 % or 50 % in spans of 64; S predicts the end of each document, a
quarter of it on average. The denoisers of a kind share its weight. With mode tokens (3.1.2: [R], [S], [X]), each piece that the model reads
opens with the token of its kind: the last three of the tokenizer's sentinels, which then hide nothing.
"""

from __future__ import annotations

from dataclasses import replace

from heads_lightning.configs.objective import PrefixLMConfig, SpanCorruptionConfig, UL2Config
from heads_lightning.objectives.base import Ramp, Vocabulary
from heads_lightning.objectives.mixture import Mixture, Part
from heads_lightning.objectives.prefix_lm import PrefixLM
from heads_lightning.objectives.span_corruption import SpanCorruption

_SPANS = {"r": [(3, 0.15), (8, 0.15)], "x": [(3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]}
"""(mean tokens of a span, share hidden) of each denoiser: UL2, table 1."""


KINDS = ("r", "s", "x")
"""Kinds of denoising, in the order of their mode tokens."""


def mode_tokens(config: UL2Config, vocabulary: Vocabulary) -> dict[str, int]:
    """Mode token by kind; empty without them."""
    return dict(zip(KINDS, vocabulary.sentinels[-len(KINDS) :], strict=True)) if config.mode_tokens else {}


def ul2(config: UL2Config, vocabulary: Vocabulary) -> Mixture:
    """The mixture with the weights of `config`."""
    parts, modes = [], mode_tokens(config, vocabulary)
    whole, vocabulary = vocabulary, replace(vocabulary, sentinels=vocabulary.sentinels[: len(vocabulary.sentinels) - len(modes)])
    for kind, weight in (("r", config.r_weight), ("x", config.x_weight)):
        for mean, rate in _SPANS[kind]:
            spans = SpanCorruption(SpanCorruptionConfig(form=config.form, rate=rate, mean_length=mean, edges=config.edges), vocabulary)
            share = weight / len(_SPANS[kind])
            parts.append(Part(f"{kind}_{mean}_{round(100 * rate)}", Ramp(share, share), spans, modes.get(kind)))
    prefixes = PrefixLM(PrefixLMConfig(form=config.form, prefix_min=0.5), vocabulary)
    parts.append(Part("s", Ramp(config.s_weight, config.s_weight), prefixes, modes.get("s")))
    return Mixture([part for part in parts if part.weight.largest > 0], config.attention, whole)
