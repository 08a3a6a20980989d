"""Checkpoints that are whole or absent: written to a temporary name, synced to disk, renamed; read without unpickling code.

A checkpoint is a file, or a folder with the same entries (distributed_checkpoints.py). It holds Lightning's state (weights, optimizer,
loop counters, position in the data) and, under `heads_lightning`, what wrote it: the resolved config, the versions, and the random
state of each rank, which dropout draws from.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from heads_lightning.registry import ConfigError

FOLDER = "checkpoints"
KEY = "heads_lightning"
"""Entry of a checkpoint that holds what Lightning does not."""
_NAME = re.compile(r"step-(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves by write, sync and rename: a reader, or a run that is killed while saving, never sees half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path` or leave `path` as it was."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint at `path`, on the CPU unless asked otherwise; refuses anything but tensors and plain values."""
        return read_checkpoint(Path(path), map_location=map_location or "cpu")


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    # the rename itself must reach the disk; not every file system lets a folder be opened
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint with weights_only=True, or a converted folder; what cannot be read is named, with what to use instead."""
    if is_weights_folder(path):
        return _read_weights_folder(path)
    if not path.exists():
        raise ConfigError(f"checkpoint {path} does not exist")
    try:
        checkpoint = _read(path, map_location)
    except Exception as error:
        others = [p for p in saved_checkpoints(path.parent) if p != path]
        instead = f"; use the one before it: {others[-1]}" if others else "; no other checkpoint lies beside it"
        raise ConfigError(f"checkpoint {path} is damaged or not a checkpoint ({_reason(error)}){instead}") from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise ConfigError(f"checkpoint {path} was not written by heads_lightning (it has no entry {KEY!r})")
    return checkpoint


def _reason(error: Exception) -> str:
    """The first sentence of an error; of torch's long ones, what they mean."""
    text = str(error).strip() or type(error).__name__
    return "no tensors saved by torch" if text.startswith("Weights only load failed") else text.splitlines()[0].split(". ")[0][:120]


def _read(path: Path, map_location: Any) -> dict[str, Any]:
    if path.is_dir():
        from heads_lightning.training.distributed_checkpoints import read_folder

        return read_folder(path)
    return torch.load(path, map_location=map_location, weights_only=True)


def is_checkpoint(path: Path) -> bool:
    """A file, or a folder named like a checkpoint."""
    return path.is_file() or (path.is_dir() and _NAME.fullmatch(path.name) is not None)


def step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint was saved after, by its name; 0 for one that somebody named otherwise."""
    named = _NAME.fullmatch(path.name)
    return int(named.group(1)) if named else 0


def is_weights_folder(path: Path) -> bool:
    """Whether `heads-lightning convert to=native` wrote this folder: config.yaml, tokenizer files and safetensors side by side."""
    return (path / "config.yaml").is_file() and next(path.glob("*.safetensors"), None) is not None


def _read_weights_folder(folder: Path) -> dict[str, Any]:
    """The same entries as a checkpoint's, as far as generation and evaluation need them."""
    from safetensors.torch import load_file

    weights = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer = {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()}
    if names[0] not in tokenizer:
        raise ConfigError(f"{folder} holds no tokenizer.json: its source had none; put one there")
    record: dict[str, Any] = {"config": (folder / "config.yaml").read_text(encoding="utf-8"), "tokenizer": tokenizer}
    record["vocab_size"] = len(weights["backbone.embedding.weight"])
    return {"state_dict": weights, "global_step": 0, KEY: record}


def saved_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    named = [(int(m.group(1)), p) for p in folder.glob("step-*.ckpt") if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(named)]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return run_dir / FOLDER / f"step-{step:08d}.ckpt"


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run folder."""
    saved = saved_checkpoints(run_dir / FOLDER)
    if not saved and (run_dir / "sweep.json").is_file():
        raise ConfigError(f"{run_dir} is the folder of a sweep; "
                          f"name one of its runs, e.g. {run_dir}/0, or go on with all: train -m sweep.resume={run_dir}")  # fmt: skip
    if not saved:
        raise ConfigError(f"{run_dir} holds no checkpoint (looked for {FOLDER}/step-*.ckpt)")
    return saved[-1]


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder. A folder loses its name first: nothing named step-… is ever half a checkpoint."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """This rank's generators (Python's, numpy's, torch's), as tensors and plain values. Dropout draws from torch's."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (what a library may draw from)
    version, words, next_gauss = random.getstate()
    state = {
        "cpu": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), next_gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set what random_state gave."""
    torch.set_rng_state(state["cpu"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
