"""How fill-in-the-middle is cut, laid out and spelled: one table of published families for training, infilling, evaluation and export.

A tokenizer tells its family by its special tokens (`detect`); the family travels with the tokenizer into every checkpoint. Layouts are
those of arXiv 2207.14255, section 3, with p prefix, s suffix, m middle:

    psm             PRE p SUF s MID m END        spm variant1       SUF s PRE p MID m END
    spm variant2    PRE SUF s MID p m END        spm suffix_first   SUF s PRE p m END
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from heads_lightning.registry import ConfigError, nearest


class FIMCut(StrEnum):
    """Where a document may be cut into prefix, middle and suffix."""

    char = "char"
    """Between any two characters; the parts are tokenised as if each stood alone."""
    token = "token"
    """Between two tokens."""
    line = "line"
    """Between two lines; the parts are tokenised as if each stood alone."""
    syntax = "syntax"
    """Around one node of Python's syntax tree: a place in the text is drawn, then one of the statements and expressions around it. Pieces
    that do not parse are cut between lines, and counted. A thousandth of the speed of `char`."""


class FIMLevel(StrEnum):
    """What is cut (arXiv 2207.14255, section 3)."""

    context = "context"
    """The pieces of documents in a window, after the window is chosen: no piece is ever broken."""
    document = "document"
    """Whole documents, before windows are chosen: windows break most of them (kept for comparison)."""


class SPMLayout(StrEnum):
    """The two layouts that are both called suffix–prefix–middle (arXiv 2207.14255, section 3)."""

    variant1 = "variant1"
    """SUF suffix PRE prefix MID middle END."""
    variant2 = "variant2"
    """PRE SUF suffix MID prefix middle END: prefix and middle stay one stream of text (StarCoder, Megatron)."""
    suffix_first = "suffix_first"
    """SUF suffix PRE prefix middle END: no MID (Codestral)."""


class FIMLoss(StrEnum):
    """Which positions of a transformed piece have a target."""

    all = "all"
    """All: what keeps left-to-right quality (arXiv 2207.14255)."""
    middle = "middle"
    """The middle and its end marker alone."""


class FIMLayouts(NamedTuple):
    """How transformed pieces are laid out: what a run was trained with, and what it must be asked with."""

    format: str
    spm: SPMLayout
    spm_rate: float
    """Share of transformed pieces that are suffix–prefix–middle."""

    @property
    def trained(self) -> list[str]:
        """Layouts that training shows: psm, spm or both."""
        return [name for name, shown in (("psm", self.spm_rate < 1), ("spm", self.spm_rate > 0)) if shown]


@dataclass(frozen=True)
class FIMFormat:
    """Sentinels, orders and end marker of a family of models."""

    name: str
    prefix: str
    suffix: str
    middle: str | None
    """None: nothing stands between prefix and middle (suffix_first)."""
    end: str | None = None
    """What ends a middle. None: the tokenizer's end-of-document token."""
    psm: bool = True
    """The family was trained on prefix–suffix–middle."""
    spm: SPMLayout | None = SPMLayout.variant2
    """Its suffix–prefix–middle. None: it knows none."""
    marks: tuple[str, ...] = ()
    """Further special tokens that tell the family from others with the same sentinels: any of them."""

    @property
    def spellings(self) -> tuple[str, ...]:
        """Of the sentinels, in the order of the fields."""
        return tuple(s for s in (self.prefix, self.suffix, self.middle) if s is not None)

    def fits(self, tokens: Collection[str]) -> bool:
        """Whether a vocabulary has its tokens."""
        needed = (*self.spellings, *([self.end] if self.end else []))
        return all(s in tokens for s in needed) and (not self.marks or any(s in tokens for s in self.marks))


_QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
FIM_FORMATS: dict[str, FIMFormat] = {
    known.name: known
    for known in (  # in the order in which they are looked for
        FIMFormat("own", *_QWEN, end="<|fim_end|>"),
        FIMFormat("codegemma", *_QWEN, marks=("<|file_separator|>",)),
        FIMFormat("olmo", *_QWEN, spm=SPMLayout.variant1, marks=("<|endofprompt|>",)),  # dolma's tool
        FIMFormat("qwen_coder", *_QWEN, spm=None),
        FIMFormat("starcoder", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder 1 and 2, Granite
        FIMFormat("santacoder", "<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
        FIMFormat("code_llama", "▁<PRE>", "▁<SUF>", "▁<MID>", end="▁<EOT>"),
        FIMFormat("deepseek_coder", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", spm=None),  # the "hole" opens the suffix
        FIMFormat("codestral", "[PREFIX]", "[SUFFIX]", None, psm=False, spm=SPMLayout.suffix_first),
    )
}  # fmt: skip


def register_fim_format(known: FIMFormat) -> FIMFormat:
    """Add a family, from a plugin; it is looked for before the built-in ones of the same sentinels. A taken name is refused."""
    if known.name in FIM_FORMATS:
        raise ConfigError(f"the FIM format {known.name} is registered already; choose another name")
    others = dict(FIM_FORMATS)
    FIM_FORMATS.clear()
    FIM_FORMATS.update({known.name: known} | others)
    return known


def fim_format(name: str) -> FIMFormat:
    """The family of that name, or one line with those that exist."""
    if name not in FIM_FORMATS:
        raise ConfigError(f"objective.format={name} does not exist.{nearest(name, FIM_FORMATS)} Available: {', '.join(FIM_FORMATS)}")
    return FIM_FORMATS[name]


def detect(tokens: Collection[str]) -> FIMFormat | None:
    """The family whose tokens a vocabulary has. Where families share all of them (a bare `<|fim_prefix|>`), objective.format settles it."""
    return next((known for known in FIM_FORMATS.values() if known.fits(tokens)), None)
