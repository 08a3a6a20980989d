"""Tensors from a source to sharded safetensors, one mapping at a time.

Memory holds the sources of one mapping, and pieces of what it makes on their way to the disk, which takes one while the next is computed;
a mere rename passes through in such pieces. Shards are written to a folder beside the target, each renamed when it is whole, so that a
killed conversion goes on where it was; the folder gets its name last of all, so that what has the name is complete.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from heads_lightning.conversion.mapping import ConversionError, StateMapping, dense
from heads_lightning.conversion.sources import DTYPES, TensorSource, read_exactly
from heads_lightning.registry import ConfigError

SPELLED = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 4 * 2**30
"""Size at which a new shard is begun."""
PIECE = 4 * 2**20
"""Bytes computed and written at a time: they stay in the processor's cache in between."""
AHEAD = 8
"""Pieces that may wait for the disk."""
PLAN = "plan.json"


@dataclass
class Shard:
    """One file: the mappings that fill it, and what they make, in order."""

    mappings: list[StateMapping] = field(default_factory=list)
    specs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(bytes_of(spec) for spec in self.specs.values())

    def header(self) -> bytes:
        """The file's first bytes, padded so that tensors begin at a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, spec in self.specs.items():
            end = position + bytes_of(spec)
            entries[name] = {"dtype": SPELLED[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def outcome(mapping: StateMapping, source: TensorSource, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What a mapping makes, as tensors on meta: shapes are checked here, before anything is written."""
    dtype = None if mapping.keeps_type else dtype
    made = mapping.apply([source.specs[key] for key in mapping.source_keys])
    return {key: cast(tensor, dtype) for key, tensor in zip(mapping.dest_keys, made, strict=True)}


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Floating-point tensors in another type; others, and without a type, as they are."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def plan(
    mappings: Sequence[StateMapping], source: TensorSource, *, dtype: torch.dtype | None, shard_bytes: int = SHARD_BYTES
) -> list[Shard]:
    """The shards to write. What one mapping makes is never divided.

    Raises:
        ConversionError: shapes or types do not allow a mapping.
    """
    shards = [Shard()]
    for mapping in mappings:
        made = outcome(mapping, source, dtype)
        if shards[-1].specs and shards[-1].size + sum(map(bytes_of, made.values())) > shard_bytes:
            shards.append(Shard())
        shards[-1].mappings.append(mapping)
        shards[-1].specs |= made
    return shards


@dataclass
class Progress:
    """What a streaming run did."""

    shards_written: int = 0
    shards_found: int = 0
    """Left whole by an earlier attempt."""
    bytes_written: int = 0


class Room:
    """Memory that one tensor after the other passes through: the system takes longer to hand out fresh pages than to fill them."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose values are whatever stood there before."""
        count = math.prod(shape) * dtype.itemsize
        if len(self._held) < count:
            self._held = torch.empty(0, dtype=torch.uint8)  # gone before there is more
            self._held = torch.empty(count, dtype=torch.uint8)
        return self._held[:count].view(dtype).view(shape)


class Pipe:
    """A file that a thread of its own writes to, in order, a few pieces behind."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1)
        self._rooms = itertools.cycle([Room() for _ in range(AHEAD)])
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(cancel_futures=failed is not None)
        if failed is None:
            for written in self._waiting:
                written.result()

    def room(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor to fill and to `put`; its values are whatever stood there before."""
        if len(self._waiting) == AHEAD:
            self._waiting.popleft().result()
        return next(self._rooms).take(shape, dtype)

    def put(self, tensor: Tensor) -> None:
        """Write what `room` gave last."""
        self._waiting.append(self._thread.submit(self._write, _bytes_in(tensor)))

    def _write(self, data: memoryview) -> None:
        _write_all(self._file, data)
        _begin_writing_back(self._file.fileno())


class Target:
    """A folder that appears when it is whole.

    Args:
        folder: where it will be; it must not exist, or be empty.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"out={folder} exists already; name a new folder, or remove it first")
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.partial")
        """Where files lie until then."""

    def begin(self, told: object) -> None:
        """Keep what an earlier attempt at exactly this left behind, or start afresh. `told` describes the plan in full."""
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        mark = self.partial / PLAN
        if mark.is_file() and mark.read_text(encoding="utf-8") == digest:
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        mark.write_text(digest, encoding="utf-8")

    def write(self, name: str, content: str | bytes) -> None:
        """A small file beside the weights."""
        data = content.encode("utf-8") if isinstance(content, str) else content
        with (self.partial / name).open("wb") as file:
            file.write(data)
            _sync(file)

    def finish(self) -> None:
        """Give the folder its name."""
        (self.partial / PLAN).unlink(missing_ok=True)
        if self.folder.exists():
            self.folder.rmdir()
        self.partial.rename(self.folder)


def stream(
    shards: Sequence[Shard],
    source: TensorSource,
    target: Target,
    *,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Progress:
    """Write the shards that are not there yet, and their index."""
    names = shard_names(len(shards))
    target.begin([source.fingerprint(), str(dtype), [[s.header().decode("latin1"), s.mappings] for s in shards]])
    for stale in target.partial.glob("*.tmp"):
        stale.unlink()
    progress, room = Progress(), Room()
    for number, (name, shard) in enumerate(zip(names, shards, strict=True), start=1):
        path = target.partial / name
        if path.is_file() and path.stat().st_size == len(shard.header()) + shard.size:
            progress.shards_found += 1
            continue
        _write_shard(path, shard, source, dtype, room)
        progress.shards_written += 1
        progress.bytes_written += shard.size
        say(f"shard {number} of {len(shards)}: {len(shard.specs)} tensors, {shard.size / 1e9:.2f} GB")
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard.specs}
        index = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": dict(sorted(weight_map.items()))}
        target.write("model.safetensors.index.json", json.dumps(index, indent=2))
    return progress


def shard_names(count: int) -> list[str]:
    """File names as transformers has them."""
    return ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_shard(path: Path, shard: Shard, source: TensorSource, dtype: torch.dtype | None, room: Room) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb", buffering=0) as file:
        _write_all(file, memoryview(shard.header()))  # pyright: ignore[reportArgumentType]
        with Pipe(file) as pipe:  # pyright: ignore[reportArgumentType]
            for mapping in shard.mappings:
                _write_mapping(pipe, mapping, shard, source, dtype, room)
        _sync(file)  # pyright: ignore[reportArgumentType]
    temporary.replace(path)


def _begin_writing_back(descriptor: int) -> None:
    """Let the disk work while the next tensors are computed; otherwise it waits for the sync at the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_mapping(pipe: Pipe, mapping: StateMapping, shard: Shard, source: TensorSource, dtype: torch.dtype | None, room: Room) -> None:
    dtype = None if mapping.keeps_type else dtype
    key = mapping.source_keys[0]
    unchanged = dtype is None or source.specs[key].dtype == dtype or not source.specs[key].is_floating_point()
    if mapping.is_rename and unchanged:
        with source.opened(key) as opened:
            if opened is not None:
                return _copy(opened, pipe, bytes_of(source.specs[key]))
    made = mapping.take_apart(_read(mapping, source, room))
    for name, view in zip(mapping.dest_keys, made, strict=True):
        spec = shard.specs[name]
        if view.shape != spec.shape:
            raise ConversionError(f"{name} came out as {list(view.shape)}, not as planned")
        rows = max(1, PIECE * len(spec) // bytes_of(spec)) if spec.ndim and spec.numel() else 1
        for piece in view.split(rows) if view.ndim else (view,):
            pipe.put(dense(piece, spec.dtype, into=pipe.room(piece.shape, spec.dtype)))


def _read(mapping: StateMapping, source: TensorSource, room: Room) -> Tensor:
    """The sources of a mapping as one tensor; those that lie one after the other are read to where they belong."""
    specs = [source.specs[key] for key in mapping.source_keys]
    if len(specs) > 1 and mapping.source_concat_dim != 0:
        return mapping.join([source.read(key) for key in mapping.source_keys])
    rows = sum(len(spec) for spec in specs) if len(specs) > 1 else 0
    whole = room.take((rows, *specs[0].shape[1:]) if rows else specs[0].shape, specs[0].dtype)
    places = whole.split([len(spec) for spec in specs]) if rows else (whole,)
    for key, place in zip(mapping.source_keys, places, strict=True):
        source.read(key, place)
    return whole


def _copy(source: BinaryIO, pipe: Pipe, count: int) -> None:
    for start in range(0, count, PIECE):
        piece = pipe.room((min(PIECE, count - start),), torch.uint8)
        read_exactly(source, _bytes_in(piece))
        pipe.put(piece)


def _bytes_in(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b"")  # pyright: ignore[reportArgumentType]


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
