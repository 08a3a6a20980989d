"""Rows for tokens that a trained model has not met: the mean of the rows that it knows, and a little noise.

A new infilling sentinel with a random row has a random logit at every position and must first be unlearnt; with the mean row it starts as
an average token (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021). The noise tells new tokens apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NOISE = 0.01
"""Standard deviation of the noise, in standard deviations of each column of the known rows."""


@torch.no_grad()
def fill_new_rows(matrix: Tensor, new_ids: Sequence[int], *, generator: torch.Generator | None = None, noise: float = NOISE) -> None:
    """Fill rows of a matrix [V, D], or entries of a bias [V], in place.

    Args:
        matrix: rows by token, in any floating type; what is at `new_ids` is not looked at.
        new_ids: tokens without a row of their own.
        generator: of the noise, on the matrix's device.
        noise: its size, see NOISE.
    """
    known = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    known[list(new_ids)] = False
    if not len(new_ids) or not known.any():
        raise ValueError(f"{len(new_ids)} new tokens among {len(matrix)}: there must be new ones, and known ones to take the mean of")
    rows = matrix[known].float()
    std = rows.std(dim=0, correction=0)
    drawn = torch.randn((len(new_ids), *matrix.shape[1:]), generator=generator, device=matrix.device)
    matrix[list(new_ids)] = (rows.mean(dim=0) + noise * std * drawn).to(matrix.dtype)


def initialise_new_tokens(
    embedding: nn.Embedding,
    head: nn.Module | None,
    new_ids: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    noise: float = NOISE,
) -> None:
    """Fill the rows of new tokens in both matrices (once, where they are one) and in whatever the head has for each token.

    Args:
        embedding: of the backbone.
        head: with a linear projection `w_out`, as every built-in head over a vocabulary; its other parameters of one number a token
            (a bias, a scale) are filled too. A head that predicts no tokens has nothing to fill.
        new_ids: tokens that the model was not trained with.
        generator: of the noise.
        noise: its size, see NOISE.
    """
    tables: list[Tensor] = [embedding.weight]
    projection = getattr(head, "w_out", None)
    if head is not None and isinstance(projection, nn.Linear):
        if projection.weight is not None and projection.weight is not embedding.weight:
            tables.append(projection.weight)
        tables += [p for p in head.parameters() if p.ndim == 1 and len(p) == projection.out_features != projection.in_features]
    for table in tables:
        fill_new_rows(table, new_ids, generator=generator, noise=noise)
