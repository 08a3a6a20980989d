"""Data: where documents come from, and how long a training sequence is (`data=…`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from heads_lightning.configs.base import Option, from_mapping
from heads_lightning.registry import ConfigError, Registry

if TYPE_CHECKING:
    from heads_lightning.data.sources import Source


class Share(NamedTuple):
    """What a source contributes to training."""

    weight: float
    max_epochs: float | None
    """Passes over the source, at most."""


@dataclass
class DataConfig(Option):
    """Base of every data source."""

    group: ClassVar[str] = "data"
    tokenized: ClassVar[bool] = False
    """Its documents are ids already, not text: a tokenizer cannot be trained on them."""
    has_records: ClassVar[bool] = False
    """A document is a record that may hold more than its text: objective=value reads numbers from it."""

    name: str = ""
    sequence_length: int = 512
    """Positions of a training sequence, sentinels included."""
    length_start: int | None = None
    """Positions of a sequence at the beginning of training: sequence_length divided by a power of two. Lengths double up to
    sequence_length; every step reads equally many positions, in more and shorter sequences. None: no warm-up."""
    length_warmup_steps: int = 0
    """Optimizer steps until sequence_length is reached."""
    validation_fraction: float = 0.05
    """Share of documents held out, by a hash of the document's name: a document never changes side."""
    validation_sequences: int = 128
    """Sequences scored at each validation: always the same ones."""
    cache_dir: str = "${run_root}/data"
    """Where prepared tokens are kept; shared by all runs below it."""
    prepare_processes: int | None = None
    """Processes that tokenise. None: one per processor. The result does not depend on it."""
    drop_duplicates: bool = True
    """Keep the first of documents with exactly the same text."""
    min_characters: int = 1
    """Shorter documents are left out."""
    max_characters: int | None = None
    """Longer documents are left out. None: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.sequence_length >= 3, "sequence_length", "3 or more (nothing can be cut out of less)")
        if (self.length_start is None) != (self.length_warmup_steps == 0):
            raise ConfigError(
                f"data.length_start={self.length_start} with data.length_warmup_steps={self.length_warmup_steps} is half a warm-up; "
                f"give both, e.g. data.length_start={max(self.sequence_length // 4, 3)} data.length_warmup_steps=1000, or neither"
            )
        if self.length_start is not None:
            halvings = [self.sequence_length >> k for k in range(1, 20) if self.sequence_length % (1 << k) == 0]
            self.require(self.length_start in halvings, "length_start", f"{', '.join(map(str, halvings)) or 'none'} (half, a quarter, …)")
            self.require(self.length_warmup_steps > 0, "length_warmup_steps", "1 or more")
        self.require(0 < self.validation_fraction < 1, "validation_fraction", "0 < validation_fraction < 1")
        self.require(self.validation_sequences >= 1, "validation_sequences", "1 or more")
        self.require(self.prepare_processes is None or self.prepare_processes >= 1, "prepare_processes", "1 or more")
        self.require(self.min_characters >= 1, "min_characters", "1 or more")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ConfigError(f"data.max_characters={self.max_characters} is below data.min_characters={self.min_characters}")

    def content(self) -> dict[str, Any]:
        """What decides which tokens are prepared: all fields but those of how they are read."""
        return {k: v for k, v in asdict(self).items() if k not in NOT_CONTENT}

    def shares(self) -> dict[str, Share] | None:
        """What each group of shards contributes to training. None: every token as often as any other."""
        return None

    def build_source(self) -> Source:
        """The documents."""
        raise NotImplementedError  # abstract


NOT_CONTENT = ("sequence_length", "length_start", "length_warmup_steps", "validation_sequences", "cache_dir", "prepare_processes")
"""Fields of DataConfig that leave the prepared tokens as they are."""


data_sources: Registry[DataConfig] = Registry("data", DataConfig)


@data_sources.register("stdlib")
@dataclass
class StdlibConfig(DataConfig):
    """Python's own standard library: about 450 files, 8.8 MB of code on every machine, no download.

    Generated and near-duplicate parts are left out: with them, looking a line up in the training files "infills" 14 % of lines.
    """

    name: str = "stdlib"
    include_tests: bool = False
    """Also the library's own tests: three times as much, worth it beyond 10 M tokens."""

    def build_source(self) -> Source:
        from heads_lightning.data.sources import Stdlib

        return Stdlib(self)


@data_sources.register("files")
@dataclass
class FilesConfig(DataConfig):
    """Text or code files below a folder, one document a file (UTF-8)."""

    name: str = "files"
    root: str = "."
    """Folder that the patterns are relative to."""
    include: list[str] = field(default_factory=lambda: ["**/*.py"])
    """Glob patterns of files to read."""
    exclude: list[str] = field(default_factory=lambda: ["**/.*/**", "**/site-packages/**", "**/node_modules/**"])
    """Glob patterns of files to leave out; hidden folders and installed packages unless changed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.include:
            raise ConfigError("data.include=[] names no files; give glob patterns, e.g. data.include=[**/*.py]")

    def build_source(self) -> Source:
        from heads_lightning.data.sources import Files

        return Files(self)


@data_sources.register("repeat")
@dataclass
class RepeatConfig(DataConfig):
    """Synthetic documents of three lines of random letters, the third a copy of the second, which its suffix alone therefore tells.

    Left to right the second line can only be guessed, so it proves a fill-in-the-middle pipeline end to end in seconds: a lost suffix,
    a truncated middle or a shifted label fails it.
    """

    name: str = "repeat"
    sequence_length: int = 64
    """Positions of a training sequence, sentinels included."""
    num_documents: int = 20000
    """Documents to generate."""
    word_length: int = 6
    """Letters of a line; no letter occurs twice in it."""
    seed: int = 0
    """Seed of the letters (not of training)."""
    drop_duplicates: bool = False
    """Keep the first of documents with exactly the same text; off, because short words repeat by chance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.word_length <= 26, "word_length", "1 to 26")
        self.require(self.num_documents >= 2, "num_documents", "2 or more")

    def build_source(self) -> Source:
        from heads_lightning.data.sources import Repeat

        return Repeat(self)


@data_sources.register("jsonl")
@dataclass
class JsonlConfig(DataConfig):
    """Lines of JSON, one document a line, plain or gzipped."""

    has_records: ClassVar[bool] = True

    name: str = "jsonl"
    root: str = "."
    """Folder that the patterns are relative to."""
    include: list[str] = field(default_factory=lambda: ["**/*.jsonl", "**/*.jsonl.gz"])
    """Glob patterns of files to read."""
    exclude: list[str] = field(default_factory=lambda: ["runs/**"])
    """Glob patterns of files to leave out; the records of runs, which lie in `runs`, unless changed."""
    text_field: str = "text"
    """Key of the document's text."""

    def build_source(self) -> Source:
        from heads_lightning.data.records import Jsonl

        return Jsonl(self)


@data_sources.register("parquet")
@dataclass
class ParquetConfig(DataConfig):
    """Parquet files, one document a row. Needs pyarrow (it comes with mlflow)."""

    has_records: ClassVar[bool] = True

    name: str = "parquet"
    root: str = "."
    """Folder that the patterns are relative to."""
    include: list[str] = field(default_factory=lambda: ["**/*.parquet"])
    """Glob patterns of files to read."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns of files to leave out."""
    text_field: str = "text"
    """Column of the document's text."""

    def build_source(self) -> Source:
        from heads_lightning.data.records import Parquet

        return Parquet(self)


@data_sources.register("huggingface")
@dataclass
class HuggingFaceDataConfig(DataConfig):
    """A dataset of the `datasets` library: a folder written by save_to_disk, files that it reads, or a name on the hub."""

    name: str = "huggingface"
    path: str = "???"
    """Folder, or name on the hub."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Which split to read; the held-out documents are taken from it, by name."""
    revision: str | None = None
    """Commit, branch or tag on the hub. Name a commit: what is prepared once is not read again when a branch moves."""
    text_field: str = "text"
    """Column of the document's text."""
    streaming: bool = False
    """Read while downloading, without the library's cache: for datasets larger than the disk."""

    def build_source(self) -> Source:
        from heads_lightning.data.huggingface import HuggingFace

        return HuggingFace(self)


class TokenDType(StrEnum):
    """Type of the ids in a raw file."""

    uint16 = "uint16"
    uint32 = "uint32"
    int32 = "int32"
    int64 = "int64"


@data_sources.register("tokens")
@dataclass
class TokensConfig(DataConfig):
    """Files of token ids made by others: OLMo and nanoGPT (raw), numpy's .npy, llm.c (.bin with a header), Megatron (.bin with .idx).

    They are copied once, into shards with a marker before every document. Needs the tokenizer that they were made with.
    """

    tokenized: ClassVar[bool] = True

    name: str = "tokens"
    root: str = "."
    """Folder that the patterns are relative to."""
    include: list[str] = field(default_factory=lambda: ["**/*.npy", "**/*.bin"])
    """Glob patterns of files to read."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns of files to leave out."""
    dtype: TokenDType = TokenDType.uint16
    """Type of the ids in files without a header."""
    separator: int | None = None
    """Id that ends or begins each document in the files. None: the tokenizer's end-of-document token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_characters > 1 or self.max_characters is not None:
            raise ConfigError("data.min_characters and data.max_characters count characters, and data=tokens has none; leave them out")

    def build_source(self) -> Source:
        from heads_lightning.data.tokens import Tokens

        return Tokens(self)


@data_sources.register("mixture")
@dataclass
class DataMixtureConfig(DataConfig):
    """Several sources with weights. One tokenizer, one hold-out rule and one removal of duplicates for all: the first source keeps them."""

    name: str = "mixture"
    parts: Any = None  # a mapping; a default that is none is replaced by what is given, where Hydra would merge two mappings
    """Sources by a name of your choice (letters, digits, _): the source's `name`, its `weight` (share of the training sequences relative to
    the others, 1 if not given), `max_epochs` (passes over it, at most; its share then goes to the others), and its own fields. None:
    stdlib alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts is None:
            self.parts = {"stdlib": {"name": "stdlib"}}
        if not self.parts:
            raise ConfigError("data.parts={} has no source; give one, e.g. 'data.parts={a:{name:stdlib},b:{name:files,root:src,weight:2}}'")
        configs = self.part_configs()
        self.tokenized = all(config.tokenized for config in configs.values())  # pyright: ignore[reportAttributeAccessIssue]

    def part_configs(self) -> dict[str, DataConfig]:
        """The sources' own configs, validated."""
        assert self.parts is not None
        shared = {f.name for f in fields(DataConfig)}
        configs = {}
        for part, given in self.parts.items():
            place = f"data.parts.{part}"
            if not str(part).isidentifier():
                raise ConfigError(f"{place}: {part!r} names files; use letters, digits and _")
            if not isinstance(given, Mapping) or "name" not in given:
                raise ConfigError(f"{place}={given} names no source; write {{name: stdlib, weight: 1}}")
            if given["name"] == "mixture":
                raise ConfigError(f"{place}.name=mixture is a mixture in a mixture; list its sources here instead")
            weight, most = given.get("weight", 1), given.get("max_epochs")
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or weight <= 0:
                raise ConfigError(f"{place}.weight={weight} is out of range; a weight is more than 0 (leave the source out instead of 0)")
            if most is not None and (not isinstance(most, (int, float)) or isinstance(most, bool) or most <= 0):
                raise ConfigError(f"{place}.max_epochs={most} is out of range; it takes more than 0, or null")
            settings = {key: value for key, value in given.items() if key not in ("name", "weight", "max_epochs")}
            configs[str(part)] = from_mapping(data_sources[given["name"]], settings, place, without=shared)
        return configs

    def content(self) -> dict[str, Any]:
        assert self.parts is not None
        read_only = ("weight", "max_epochs")
        parts = {part: {k: v for k, v in given.items() if k not in read_only} for part, given in self.parts.items()}
        return super().content() | {"parts": parts}

    def shares(self) -> dict[str, Share] | None:
        assert self.parts is not None
        return {part: Share(float(given.get("weight", 1)), given.get("max_epochs")) for part, given in self.parts.items()}

    def build_source(self) -> Source:
        from heads_lightning.data.sources import Mixture

        return Mixture({part: config.build_source() for part, config in self.part_configs().items()})
