"""One fill-in-the-middle piece by its sentinels: the prompt that asks for a middle, and a laid out piece back in the order of the source.

The layouts are those of objectives/fim.py, which makes whole batches of them.
"""

from __future__ import annotations

import numpy as np

from heads_lightning.configs.objective import FIMConfig, SPMLayout
from heads_lightning.objectives.base import Vocabulary, require_roles
from heads_lightning.registry import ConfigError


def fim_sentinels(vocabulary: Vocabulary, *, needs_middle: bool) -> tuple[int, int, int, int]:
    """PRE, SUF, MID, END; suffix-first pieces need no MID: where there is none, SUF stands for it and is not used."""
    if not needs_middle and vocabulary.fim_middle is None:
        pre, suf, end = require_roles(vocabulary, ("fim_prefix", "fim_suffix", "fim_end"), "fim")
        return pre, suf, suf, end
    pre, suf, mid, end = require_roles(vocabulary, FIMConfig.special_tokens, "fim")
    return pre, suf, mid, end


def fim_prompt(
    prefix_ids: np.ndarray,
    suffix_ids: np.ndarray,
    vocabulary: Vocabulary,
    layout: str = "psm",
    spm_variant: SPMLayout = SPMLayout.variant2,
    document_start: bool = True,
    mode: int | None = None,
) -> np.ndarray:
    """int64 ids after which the middle follows, laid out as in training.

    Args:
        prefix_ids, suffix_ids: int, each tokenised as a text that stands alone.
        layout: `psm` or `spm`.
        spm_variant: which of the layouts called SPM.
        document_start: whether the prefix begins at the document's beginning (then a marker stands in front).
        mode: the mode token that pieces of this kind opened with in a mixture.
    """
    needs_middle = layout == "psm" or spm_variant != SPMLayout.suffix_first
    pre, suf, mid, _ = ([token] for token in fim_sentinels(vocabulary, needs_middle=needs_middle))
    opening = [mode] if mode is not None else [vocabulary.end_of_document] * document_start
    if layout not in ("psm", "spm"):
        raise ConfigError(f"layout={layout} of an infilling prompt does not exist; it is psm or spm")
    if layout == "psm":
        parts = [pre, prefix_ids, suf, suffix_ids, mid]
    elif spm_variant == SPMLayout.variant1:
        parts = [suf, suffix_ids, pre, prefix_ids, mid]
    elif spm_variant == SPMLayout.suffix_first:
        parts = [suf, suffix_ids, pre, prefix_ids]
    else:
        parts = [pre, suf, suffix_ids, mid, prefix_ids]
    return np.concatenate([opening, *parts]).astype(np.int64)


def invert(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The ids of a piece in the order of the source: prefix, middle, suffix; sentinels and end marker dropped, its opening marker kept.

    A piece that is not transformed comes back as it is. The bytes are those of the source; ids around the cuts may differ.
    """
    ids = np.asarray(ids)
    body = int(len(ids) > 0 and ids[0] == vocabulary.end_of_document)  # which may be the end of a middle, too
    where = {
        role: body + np.flatnonzero(ids[body:] == getattr(vocabulary, f"fim_{role}")) for role in ("prefix", "suffix", "middle", "end")
    }
    if not len(where["prefix"]):
        return ids
    suffix_first = not len(where["middle"]) and len(where["suffix"]) == 1 and where["suffix"][0] < where["prefix"][0]
    if suffix_first:
        where["middle"] = where["suffix"]  # is not there
    if any(len(found) != 1 for found in where.values()) or where["end"][0] != len(ids) - 1:
        places = {role: found.tolist() for role, found in where.items()}
        raise ValueError(f"not one whole infilling piece: sentinels at {places}")
    pre, suf, mid, end = (int(found[0]) for found in where.values())
    if suffix_first:
        return np.concatenate([ids[:body], ids[pre + 1 : end], ids[suf + 1 : pre]])
    if pre < suf:  # PSM, and SPM variant 2: that is PSM with nothing between PRE and SUF, and prefix and middle in one
        return np.concatenate([ids[:body], ids[pre + 1 : suf], ids[mid + 1 : end], ids[suf + 1 : mid]])
    return np.concatenate([ids[:body], ids[pre + 1 : mid], ids[mid + 1 : end], ids[suf + 1 : pre]])
