"""Where tensors come from: names and shapes at once, values one tensor at a time.

Choices: safetensors are read with plain file reads, because pages of a memory map count as the process's memory; pickled files pass only
through `weights_only=True`, and the index of a distributed checkpoint, a pickle too, through an unpickler that knows its dozen classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from heads_lightning.registry import ConfigError

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Element types of safetensors."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own limit."""


class TensorSource(ABC):
    """A checkpoint's tensors."""

    specs: dict[str, Tensor]
    """Every tensor's shape and type, as a tensor on meta."""

    @abstractmethod
    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """One tensor, on the CPU; `into`: a contiguous tensor of its shape and type to fill. None: a new one."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the files do: a conversion resumes only from what it began with."""

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO | None]:
        """The file, at the first byte of a tensor that lies in it as it is; None where it does not."""
        yield None


class _Place(NamedTuple):
    file: Path
    start: int
    spec: Tensor


class SafetensorsSource(TensorSource):
    """One or several .safetensors files."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._places: dict[str, _Place] = {}
        for file in files:
            for name, place in _read_header(file).items():
                if name in self._places:
                    raise ConfigError(f"{name} is both in {self._places[name].file.name} and in {file.name}")
                self._places[name] = place
        self.specs = {name: place.spec for name, place in self._places.items()}

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        spec = self._places[name].spec
        tensor = torch.empty(spec.shape, dtype=spec.dtype) if into is None else into
        if tensor.numel():
            with self.opened(name) as file:
                assert file is not None
                read_exactly(file, memoryview(tensor.flatten().view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
        return tensor

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO | None]:
        place = self._places[name]
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.start)
            yield file  # pyright: ignore[reportReturnType]

    def fingerprint(self) -> str:
        return _stat_of(self.files)


def read_exactly(file: BinaryIO, target: memoryview) -> None:
    """Fill `target`; a file that ends too early is damaged."""
    while target:
        count = file.readinto(target)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise ConfigError(f"{getattr(file, 'name', 'a file')} ends too early: it is damaged")
        target = target[count:]


def _read_header(file: Path) -> dict[str, _Place]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ConfigError(f"{file} is not a safetensors file, or damaged")
        try:
            header = json.loads(opened.read(length))
        except ValueError:
            raise ConfigError(f"{file} is not a safetensors file, or damaged") from None
    header.pop("__metadata__", None)
    places = {name: _place(file, name, entry, 8 + length) for name, entry in header.items()}
    end = max((place.start + place.spec.numel() * place.spec.element_size() for place in places.values()), default=8 + length)
    if end != size:
        raise ConfigError(f"{file} has {size} bytes where its header tells of {end}: it is damaged")
    return places


def _place(file: Path, name: str, entry: Mapping[str, Any], base: int) -> _Place:
    if entry["dtype"] not in DTYPES:
        raise ConfigError(f"{file}: {name} is of type {entry['dtype']}; known: {', '.join(DTYPES)}")
    spec = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
    start, end = entry["data_offsets"]
    if end - start != spec.numel() * spec.element_size():
        raise ConfigError(f"{file}: {name} {list(spec.shape)} does not take the {end - start} bytes that it has; the file is damaged")
    return _Place(file, base + start, spec)


class TorchSource(TensorSource):
    """Files of torch.save, memory-mapped; `entries` are the keys of states inside, e.g. `state_dict`, of which later ones count."""

    def __init__(self, files: list[Path], entries: tuple[str, ...] = ()) -> None:
        self.files = files
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            loaded = _load(file)
            for state in [loaded[entry] for entry in entries if entry in loaded] if entries else [loaded]:
                self._tensors |= {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.specs = {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        return self._tensors[name].clone() if into is None else into.copy_(self._tensors[name])

    def fingerprint(self) -> str:
        return _stat_of(self.files)


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ConfigError(
            f"{file} cannot be read as tensors alone ({str(error).splitlines()[0][:120]}); use a .safetensors file"
        ) from error


class DistributedSource(TensorSource):
    """A folder of torch.distributed.checkpoint, written by any number of ranks.

    Args:
        folder: holds .metadata and what the ranks wrote.
        prefixes: where the weights stand, the one that counts first.
    """

    def __init__(self, folder: Path, prefixes: tuple[str, ...] = ("state_dict.", "model.state_dict.")) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder = folder
        self._metadata = _safe_metadata(folder)
        entries = self._metadata.state_dict_metadata
        found = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        within = [p for p in prefixes if any(name.startswith(p) for name in found)] or [""]
        self._names = {name.removeprefix(p): name for p in reversed(within) for name in found if name.startswith(p)}
        self.specs = {
            ours: torch.empty(found[name].size, dtype=found[name].properties.dtype, device="meta") for ours, name in self._names.items()
        }

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        import torch.distributed.checkpoint as dcp

        stored = self._names[name]
        state = {stored: torch.empty_like(self.specs[name], device="cpu") if into is None else into}
        dcp.load(state, storage_reader=_reader(self.folder, self._metadata), no_dist=True)
        return state[stored]

    def fingerprint(self) -> str:
        return _stat_of(sorted(path for path in self.folder.iterdir() if path.is_file()))


def _reader(folder: Path, metadata: Any) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    class KnownMetadata(FileSystemReader):
        """Reads tensors (with weights_only=True, as torch does); the index was read already, safely."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    return KnownMetadata(folder)


ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
    "_codecs": {"encode"},
}
"""Names that the index of a distributed checkpoint may hold."""


def _memory_format(owner: type, name: str) -> Any:
    """getattr, as Python up to 3.11.3 writes the one enumeration of an index, and for nothing else."""
    from torch.distributed.checkpoint import metadata

    if owner is not metadata._MEM_FORMAT_ENCODING:
        raise ConfigError(f"the index of the distributed checkpoint asks for {name!r} of {owner}, which is not part of one; it is not read")
    return owner[name]


class _Unpickler(pickle.Unpickler):
    """Builds the classes of ALLOWED and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in ALLOWED.get(module, set()):
            raise ConfigError(f"the index of the distributed checkpoint names {module}.{name}, which is not part of one; it is not read")
        return super().find_class(module, name)


def _safe_metadata(folder: Path) -> Any:
    metadata = _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    if getattr(metadata, "storage_meta", None) is None:
        from torch.distributed.checkpoint.metadata import StorageMeta

        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = folder.name
    return metadata


def _stat_of(files: list[Path]) -> str:
    told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def open_weights(folder: Path) -> TensorSource:
    """The weights that lie in a folder: safetensors before pickled files, whatever else is there.

    Raises:
        ConfigError: there are none, or a shard that the index names is missing.
    """
    for index, pattern, kind in (
        ("model.safetensors.index.json", "*.safetensors", SafetensorsSource),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin", TorchSource),
    ):
        if (folder / index).is_file():
            named = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            if absent := [name for name in named if not (folder / name).is_file()]:
                raise ConfigError(f"{folder} lacks {', '.join(absent[:3])}, which {index} names; fetch the whole checkpoint")
            return kind([folder / name for name in named])
        if files := sorted(folder.glob(pattern)):
            return kind(files)
        if (folder / ".metadata").is_file():
            return DistributedSource(folder)
    raise ConfigError(f"{folder} holds no weights; looked for *.safetensors, .metadata (distributed checkpoint) and pytorch_model*.bin")
