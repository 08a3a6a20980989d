"""Tokenizers: text to ids and back (`tokenizer=…`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from heads_lightning.configs.base import Option
from heads_lightning.registry import ConfigError, Registry

if TYPE_CHECKING:
    from heads_lightning.data.tokenizer import Tokenizer


@dataclass
class TokenizerConfig(Option):
    """Base of every tokenizer."""

    group: ClassVar[str] = "tokenizer"
    trained: ClassVar[bool] = False
    """It is made from the training documents, so `build` reads them."""

    name: str = ""
    num_sentinels: int = 100
    """Sentinel tokens `<|extra_id_0|>` … for span corruption, beside the tokens for end of document, padding, mask and infilling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_sentinels >= 0, "num_sentinels", "0 or more")

    def identity(self) -> str:
        """All that decides which tokenizer comes out, beside the training documents: prepared tokens are kept under it."""
        return json.dumps(asdict(self), sort_keys=True)

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer. `texts` are the training documents; read only where `trained`."""
        raise NotImplementedError  # abstract


tokenizers: Registry[TokenizerConfig] = Registry("tokenizer", TokenizerConfig)

NUM_NAMED_SPECIALS = 7
"""End of document, padding, mask, and four for infilling (prefix, suffix, middle, end of middle)."""


@tokenizers.register("bpe")
@dataclass
class BPEConfig(TokenizerConfig):
    """Byte-level byte-pair encoding, trained on the training documents in seconds."""

    trained: ClassVar[bool] = True

    name: str = "bpe"
    vocab_size: int = 4096
    """Entries, special tokens and the 256 bytes included. Very small data may yield fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 256 + NUM_NAMED_SPECIALS + self.num_sentinels
        self.require(
            self.vocab_size >= least,
            "vocab_size",
            f"{least} or more (256 bytes, {NUM_NAMED_SPECIALS} special tokens, {self.num_sentinels} sentinels); "
            f"or fewer sentinels: tokenizer.num_sentinels=0",
        )

    def build(self, texts: Iterable[str]) -> Tokenizer:
        from heads_lightning.data.tokenizer import train_bpe

        return train_bpe(texts, vocab_size=self.vocab_size, num_sentinels=self.num_sentinels)


@tokenizers.register("byte")
@dataclass
class ByteConfig(TokenizerConfig):
    """One token per byte of UTF-8."""

    name: str = "byte"

    def build(self, texts: Iterable[str]) -> Tokenizer:
        from heads_lightning.data.tokenizer import byte_tokenizer

        return byte_tokenizer(num_sentinels=self.num_sentinels)


@tokenizers.register("huggingface")
@dataclass
class HuggingFaceTokenizerConfig(TokenizerConfig):
    """A `tokenizer.json` file, or a folder that holds one. Special tokens that it lacks are added after its own."""

    name: str = "huggingface"
    path: str = "???"
    """The file or folder."""

    def file(self) -> Path:
        """The tokenizer.json, or one line that says what is missing."""
        if self.path == "???":
            raise ConfigError("tokenizer=huggingface needs a file: tokenizer.path=FOLDER_OR_tokenizer.json")
        path = Path(self.path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"tokenizer.path={self.path} does not exist or holds no tokenizer.json; give the file or its folder")
        return path

    def identity(self) -> str:
        content = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in _sidecars(self.file()) if p.is_file()}
        return json.dumps(asdict(self) | {"path": content}, sort_keys=True)

    def build(self, texts: Iterable[str]) -> Tokenizer:
        from heads_lightning.data.tokenizer import from_huggingface

        return from_huggingface(self.file(), num_sentinels=self.num_sentinels)


def _sidecars(file: Path) -> tuple[Path, Path]:
    return file, file.parent / "tokenizer_config.json"
