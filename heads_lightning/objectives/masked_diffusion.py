"""Masked diffusion in continuous time (MDLM, arXiv 2406.07524, eq. 10; LLaDA, arXiv 2502.09992, eq. 3).

Each row draws a time t in (0, 1]; each of its tokens is replaced by the mask token with probability t; the hidden ones are predicted from
both sides with weight 1/t. The mean over *all* tokens that could have been hidden (`Examples.counts_B`) bounds the nats per token of the
text from above, so it is comparable with a left-to-right loss.

Choices:
- Times of consecutive samples spread evenly over (0, 1] (`SampleRandom.spread`): the low-variance sampling of MDLM without a batch to know
  about. A row stays a function of its own sample.
- Special tokens, the marker between documents too, are neither hidden nor counted: the bound is of the text given where documents begin.
- A row in which nothing happens to be hidden has no targets. Forcing one would bias the bound; the tokens counted keep the mean defined.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from heads_lightning.batch import IGNORE, Attention, Examples
from heads_lightning.configs.objective import MaskedDiffusionConfig
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window, document_segments, ordinary_ids, require_roles


class MaskedDiffusion(Objective):
    """Hide a random share of the tokens; predict them with the inverse of the share as weight."""

    attention: ClassVar[Attention] = Attention.bidirectional
    counts_apart = True

    def __init__(self, config: MaskedDiffusionConfig, vocabulary: Vocabulary) -> None:
        (self._mask,) = require_roles(vocabulary, config.special_tokens, config.name)
        self.config = config
        self.vocabulary = vocabulary
        self._ordinary_V = ordinary_ids(vocabulary, config.name)

    def window(self, sequence_length: int) -> Window:
        return Window(stride=sequence_length, length=sequence_length)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        least = self.config.min_time
        time_B1 = (least + (1 - least) * rng.spread(sequence_length))[:, None]
        tokens_BS = tokens_BR.astype(np.int64)
        ordinary_BS = self._ordinary_V.take(tokens_BR)
        hidden_BS = (rng.uint32(sequence_length) < time_B1 * 2.0**32) & ordinary_BS
        return Examples(
            tokens_BS=np.where(hidden_BS, self._mask, tokens_BS),
            labels_BS=np.where(hidden_BS, tokens_BS, IGNORE),
            segments_BS=document_segments(tokens_BS, self.vocabulary.end_of_document),
            weights_BS=np.broadcast_to(1 / time_B1, tokens_BS.shape).astype(np.float32),
            counts_B=ordinary_BS.sum(axis=1),
        )
