"""Checkpoints as folders (`trainer.checkpoint_format=distributed`): each rank writes its share, beside training (PyTorch's DCP).

    step-00000100.ckpt/   state.pt: everything but the tensors, with a mark where each was       __0_0.distcp …, .metadata: the tensors

Choices. Names are paths in Lightning's checkpoint (`optimizer_states.0.state.3.exp_avg`) and tensors have their whole shape, so the layout
that reads need not be the one that wrote, nor the format that of the run before. The folder is written under another name, synced, and
renamed by the first rank when the last rank is done: what is named step-… is complete.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from heads_lightning.training.checkpoints import remove, sync_folder

STATE = "state.pt"
_MARK = "\0tensor"


def split(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nested state without its tensors (marks in their places), and the tensors by path."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return _MARK + path
        if isinstance(value, Mapping):
            return {key: walk(entry, f"{path}.{key}" if path else str(key)) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(walk(entry, f"{path}.{i}") for i, entry in enumerate(value))
        return value

    return walk(state, path), tensors


def joined(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` took apart."""
    if isinstance(skeleton, str) and skeleton.startswith(_MARK):
        return tensors[skeleton.removeprefix(_MARK)]
    if isinstance(skeleton, dict):
        return {key: joined(value, tensors) for key, value in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        return type(skeleton)(joined(value, tensors) for value in skeleton)
    return skeleton


SPLIT = ("state_dict", "optimizer_states", "average")
"""Entries of a checkpoint whose tensors every rank writes a share of; the rest is small and the first rank's."""


def read_folder(path: Path, layout: Callable[[str, torch.Size], Tensor | None] = lambda name, size: None) -> dict[str, Any]:
    """The checkpoint in a folder, tensors whole on the CPU.

    Args:
        path: the folder.
        layout: (name, size) to an empty tensor to read into, e.g. this rank's share (every rank must then read); None: a whole one.
    """
    state = torch.load(path / STATE, weights_only=True)
    reader = dcp.FileSystemReader(path)
    tensors: dict[str, Any] = {}
    whole = True
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        place = layout(name, stored.size)
        whole = whole and place is None
        tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype) if place is None else place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a process group it says that it assumes one process: so do we
        dcp.load(tensors, storage_reader=reader, no_dist=whole)
    return joined(state, tensors)


class FolderWriter:
    """Writes one checkpoint at a time beside training: `save` returns when the tensors are copied.

    Args:
        published: called on the first rank, in another thread, when a checkpoint is complete.
    """

    def __init__(self, published: Callable[[Path], None]) -> None:
        self._published = published
        self._pending: Future[Any] | None = None
        self._group: Any = None
        self._first = True

    def save(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Begin to write; every rank calls it, after `wait`."""
        assert self._pending is None
        if dist.is_initialized() and self._group is None:
            self._group = dist.new_group(backend="gloo")  # its own: the writing thread must not mix with training's messages
        self._first = not dist.is_initialized() or dist.get_rank() == 0
        temporary = path.with_name(f".{path.name}.tmp")
        skeletons, tensors = split({name: checkpoint[name] for name in SPLIT if name in checkpoint})
        if self._first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write_synced(checkpoint | skeletons, temporary / STATE)
        if self._group is not None:
            dist.barrier(self._group)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = dcp.async_save(
                tensors,
                storage_writer=dcp.FileSystemWriter(temporary),  # which copies before it returns, and syncs its files
                process_group=self._group,
                no_dist=self._group is None,
            )
        assert isinstance(written, Future)
        self._pending = Future()
        written.add_done_callback(lambda done, pending=self._pending: self._publish(done, pending, temporary, path))

    def _publish(self, written: Future[Any], pending: Future[Any], temporary: Path, path: Path) -> None:
        try:
            written.result()
            if self._first:
                replace_folder(temporary, path)
                self._published(path)
            pending.set_result(None)
        except BaseException as error:
            pending.set_exception(error)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            OSError, RuntimeError: what went wrong with the last checkpoint, on some rank.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except dcp.api.CheckpointException as error:
            raise RuntimeError("; ".join(f"rank {rank}: {failed[0]}" for rank, failed in error.failures.items())) from error


def _write_synced(state: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder, over another one if there is one."""
    if target.exists():
        remove(target)
    source.rename(target)
    sync_folder(target.parent)
