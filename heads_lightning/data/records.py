"""Sources whose files hold many documents: lines of JSON, rows of Parquet.

A document is named by its file and its place in it (byte or row), so that the split does not depend on what else is read. Files are cut
into parts without reading them: lines belong to the part in which they begin, rows to their row group.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from heads_lightning.configs.data import JsonlConfig, ParquetConfig
from heads_lightning.data.sources import Document, File, Source, listing_fingerprint, matching_files, part_bytes, root_folder
from heads_lightning.registry import ConfigError


class Lines(NamedTuple):
    """The lines of a file that begin at or after `start` and before `stop`."""

    file: str
    start: int
    stop: int | None
    """None: to the end (a compressed file cannot be entered in the middle)."""


class Jsonl(Source):
    """Lines of JSON, one document a line.

    Args:
        config: the files, and the key of the text.
    """

    def __init__(self, config: JsonlConfig) -> None:
        self.root = root_folder(config.root, group="data=jsonl")
        self._config = config

    @cached_property
    def _listing(self) -> list[File]:
        return matching_files(self.root, self._config.include, self._config.exclude, group="data=jsonl")

    def fingerprint(self) -> str:
        return listing_fingerprint(self._listing, self._config.text_field)

    def parts(self) -> list[Lines]:
        step = part_bytes(sum(file.size for file in self._listing))
        parts = []
        for file in self._listing:
            if file.name.endswith(".gz"):
                parts.append(Lines(file.name, 0, None))
            else:
                parts += [Lines(file.name, start, start + step) for start in range(0, file.size, step)]
        return parts

    def read(self, part: Lines) -> Iterator[Document]:
        position = part.start
        try:
            with (gzip.open if part.file.endswith(".gz") else open)(self.root / part.file, "rb") as file:
                if part.start > 0:  # the line that is under way began in the part before
                    file.seek(part.start - 1)
                    position += len(file.readline()) - 1
                for line in file:
                    if part.stop is not None and position >= part.stop:
                        return
                    if line.strip():
                        yield self._document(f"{part.file}:{position}", line)
                    position += len(line)
        except (OSError, EOFError) as error:
            yield Document(f"{part.file}:{position}", "", f"unreadable: {error}")

    def _document(self, name: str, line: bytes) -> Document:
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            return Document(name, "", "not UTF-8")
        except ValueError:
            return Document(name, "", "not JSON")
        return _with_text(name, record.get(self._config.text_field) if isinstance(record, dict) else None, self._config.text_field)

    def facts(self) -> dict[str, Any]:
        return {"files": len(self._listing)}


class Rows(NamedTuple):
    """A row group of a file."""

    file: str
    group: int
    first_row: int


class Parquet(Source):
    """Rows of Parquet files, one document a row.

    Args:
        config: the files, and the column of the text.
    """

    def __init__(self, config: ParquetConfig) -> None:
        self.root = root_folder(config.root, group="data=parquet")
        self._config = config
        self._parquet = _pyarrow_parquet()

    @cached_property
    def _listing(self) -> list[File]:
        return matching_files(self.root, self._config.include, self._config.exclude, group="data=parquet")

    def fingerprint(self) -> str:
        return listing_fingerprint(self._listing, self._config.text_field)

    def parts(self) -> list[Rows]:
        parts = []
        for file in self._listing:
            opened = self._open(file.name)
            first_row = 0
            for group in range(opened.num_row_groups):
                parts.append(Rows(file.name, group, first_row))
                first_row += opened.metadata.row_group(group).num_rows
        return parts

    def read(self, part: Rows) -> Iterator[Document]:
        field = self._config.text_field
        column = self._open(part.file).read_row_group(part.group, columns=[field]).column(field)
        for row, value in enumerate(column, start=part.first_row):
            yield _with_text(f"{part.file}:{row}", value.as_py(), field)

    def facts(self) -> dict[str, Any]:
        return {"files": len(self._listing)}

    def _open(self, name: str) -> Any:
        try:
            opened = self._parquet.ParquetFile(self.root / name)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise ConfigError(f"{self.root / name} cannot be read as Parquet ({str(error).splitlines()[0]})") from None
        columns = opened.schema_arrow.names
        if self._config.text_field not in columns:
            raise ConfigError(f"data.text_field={self._config.text_field} is no column of {name}; it has {', '.join(columns)}")
        return opened


def _with_text(name: str, text: Any, field: str) -> Document:
    return Document(name, text) if isinstance(text, str) else Document(name, "", f"no text under {field!r}")


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("data=parquet needs pyarrow; pip install pyarrow") from None
    return pyarrow.parquet
