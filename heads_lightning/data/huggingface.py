"""Datasets of the `datasets` library: a folder written by save_to_disk, files that the library reads, or a name on the hub.

A document is named by its split and row, so the hold-out does not depend on how the rows are cut into parts. A streamed dataset has as
many parts as files; rows are then numbered within each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from heads_lightning.configs.data import HuggingFaceDataConfig
from heads_lightning.data.sources import Document, Source, listing_fingerprint, matching_files
from heads_lightning.hub import check_answer
from heads_lightning.registry import ConfigError

ROWS = 4096
"""Rows of a part, where rows can be reached by number."""


class Piece(NamedTuple):
    """Rows start … stop-1, or all rows of one file of a streamed dataset."""

    start: int
    stop: int | None


class HuggingFace(Source):
    """Rows of a dataset, one document a row.

    Args:
        config: which dataset, and the column of the text.
    """

    def __init__(self, config: HuggingFaceDataConfig) -> None:
        if config.path == "???":
            raise ConfigError("data=huggingface needs a dataset: data.path=FOLDER_OR_NAME")
        self._config = config
        self._library = _datasets()

    @cached_property
    def _dataset(self) -> Any:
        c, library = self._config, self._library
        folder = Path(c.path).expanduser()
        if not folder.exists() and (c.streaming or not _is_cached(library, c.path)):
            check_answer(f"data.path={c.path}")
        try:
            if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
                loaded = library.load_from_disk(str(folder))
                loaded = loaded[c.split] if isinstance(loaded, dict) else loaded
            else:
                loaded = library.load_dataset(c.path, c.subset, split=c.split, revision=c.revision, streaming=c.streaming)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"data.path={c.path} data.split={c.split} cannot be read ({reason})") from None
        columns = loaded.column_names
        if columns is not None and c.text_field not in columns:
            raise ConfigError(f"data.text_field={c.text_field} is no column of {c.path}; it has {', '.join(columns)}")
        return loaded

    @property
    def _by_number(self) -> bool:
        return isinstance(self._dataset, self._library.Dataset)  # not a streamed one

    def fingerprint(self) -> str:
        c = self._config
        settings = json.dumps([c.path, c.subset, c.split, c.revision, c.text_field])
        if Path(c.path).expanduser().is_dir():
            files = matching_files(Path(c.path).expanduser(), ["**/*"], [], group="data=huggingface")
            return listing_fingerprint(files, settings)
        return listing_fingerprint([], settings)

    def parts(self) -> list[Piece]:
        if not self._by_number:
            return [Piece(number, None) for number in range(self._dataset.n_shards)]
        rows = len(self._dataset)
        return [Piece(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]

    def read(self, part: Piece) -> Iterator[Document]:
        c = self._config
        if part.stop is not None:
            texts = self._dataset[part.start : part.stop][c.text_field]
            named = ((f"{c.split}:{part.start + row}", text) for row, text in enumerate(texts))
        else:
            rows = self._dataset.shard(num_shards=self._dataset.n_shards, index=part.start)
            named = ((f"{c.split}:{part.start}:{number}", row.get(c.text_field)) for number, row in enumerate(rows))
        for name, text in named:
            yield Document(name, text) if isinstance(text, str) else Document(name, "", f"no text under {c.text_field!r}")

    def facts(self) -> dict[str, Any]:
        return {"rows": len(self._dataset)} if self._by_number else {"files": self._dataset.n_shards}


def _is_cached(library: Any, name: str) -> bool:
    """Whether the library has kept a dataset of the hub."""
    return (Path(library.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _datasets() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("data=huggingface needs the datasets library; pip install 'heads-lightning[datasets]'") from None
    return datasets
