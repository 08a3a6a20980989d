"""Sources whose files hold many records: lines of JSON, rows of Parquet. A record is a document, by one of its fields, or more.

A document is named by its file and its place in it (byte or row), so that the split does not depend on what else is read. Files are cut
into parts without reading them: lines belong to the part in which they begin, rows to their row group.
"""

from __future__ import annotations

import gzip
import json
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from heads_lightning.configs.data import JsonlConfig, ParquetConfig
from heads_lightning.data.sources import Document, File, Source, listing_fingerprint, matching_files, part_bytes, root_folder
from heads_lightning.registry import ConfigError


class Record(NamedTuple):
    """A record, or the reason why there is none."""

    name: str
    """The same on every machine; decides the split."""
    fields: dict[str, Any]
    problem: str = ""
    """Why the record cannot be used; its fields are then empty."""


class RecordSource(Source):
    """Interface of sources of records."""

    @abstractmethod
    def records(self, part: Any, columns: list[str] | None = None) -> Iterator[Record]:
        """The records of one part, in order: of Parquet the columns named that a file has, None for all."""


class Lines(NamedTuple):
    """The lines of a file that begin at or after `start` and before `stop`."""

    file: str
    start: int
    stop: int | None
    """None: to the end (a compressed file cannot be entered in the middle)."""


class Jsonl(RecordSource):
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
        return (_document(record, self._config.text_field) for record in self.records(part))

    def records(self, part: Lines, columns: list[str] | None = None) -> Iterator[Record]:
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
                        yield _record(f"{part.file}:{position}", line)
                    position += len(line)
        except (OSError, EOFError) as error:
            yield Record(f"{part.file}:{position}", {}, f"unreadable: {error}")

    def facts(self) -> dict[str, Any]:
        return {"files": len(self._listing)}


class Rows(NamedTuple):
    """A row group of a file."""

    file: str
    group: int
    first_row: int


class Parquet(RecordSource):
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
        columns = self._open(part.file).schema_arrow.names
        if field not in columns:
            raise ConfigError(f"data.text_field={field} is no column of {part.file}; it has {', '.join(columns)}")
        return (_document(record, field) for record in self.records(part, [field]))

    def records(self, part: Rows, columns: list[str] | None = None) -> Iterator[Record]:
        opened = self._open(part.file)
        there = [name for name in opened.schema_arrow.names if columns is None or name in columns]
        for row, fields in enumerate(opened.read_row_group(part.group, columns=there).to_pylist(), start=part.first_row):
            yield Record(f"{part.file}:{row}", fields)

    def facts(self) -> dict[str, Any]:
        return {"files": len(self._listing)}

    def _open(self, name: str) -> Any:
        try:
            return self._parquet.ParquetFile(self.root / name)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise ConfigError(f"{self.root / name} cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _record(name: str, line: bytes) -> Record:
    try:
        fields = json.loads(line)
    except UnicodeDecodeError:
        return Record(name, {}, "not UTF-8")
    except ValueError:
        return Record(name, {}, "not JSON")
    return Record(name, fields if isinstance(fields, dict) else {})


def _document(record: Record, field: str) -> Document:
    text = record.fields.get(field)
    if isinstance(text, str):
        return Document(record.name, text)
    return Document(record.name, "", record.problem or f"no text under {field!r}")


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("data=parquet needs pyarrow; pip install pyarrow") from None
    return pyarrow.parquet
