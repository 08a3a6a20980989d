"""Tokenizers: text to ids and back (`tokenizer=…`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heads_lightning.configs.base import Option
from heads_lightning.registry import Registry


@dataclass
class TokenizerConfig(Option):
    """Base of every tokenizer."""

    group: ClassVar[str] = "tokenizer"

    name: str = ""
    num_sentinels: int = 100
    """Sentinel tokens `<|extra_id_0|>` … for span corruption, beside the tokens for end of document, padding, mask and infilling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_sentinels >= 0, "num_sentinels", "0 or more")


tokenizers: Registry[TokenizerConfig] = Registry("tokenizer", TokenizerConfig)

NUM_NAMED_SPECIALS = 7
"""End of document, padding, mask, and four for infilling (prefix, suffix, middle, end of middle)."""


@tokenizers.register("bpe")
@dataclass
class BPEConfig(TokenizerConfig):
    """Byte-level byte-pair encoding, trained on the training documents in seconds."""

    name: str = "bpe"
    vocab_size: int = 4096
    """Entries, special tokens and the 256 bytes included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 256 + NUM_NAMED_SPECIALS + self.num_sentinels
        self.require(
            self.vocab_size >= least,
            "vocab_size",
            f"{least} or more (256 bytes, {NUM_NAMED_SPECIALS} special tokens, {self.num_sentinels} sentinels); "
            f"or fewer sentinels: tokenizer.num_sentinels=0",
        )


@tokenizers.register("byte")
@dataclass
class ByteConfig(TokenizerConfig):
    """One token per byte of UTF-8."""

    name: str = "byte"


@tokenizers.register("huggingface")
@dataclass
class HuggingFaceTokenizerConfig(TokenizerConfig):
    """A `tokenizer.json` file, or a folder that holds one. Special tokens that it lacks are added after its own."""

    name: str = "huggingface"
    path: str = "???"
    """The file or folder."""
