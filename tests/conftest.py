"""What several test files share: tiny experiments on a handful of the standard library's files."""

from __future__ import annotations

import os
import signal
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

# one thread a process: the tests run side by side, and sums over several threads are not always in one order
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# a shell starts what it puts in the background deaf to Ctrl-C, and so would be every process that the tests start and interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = [
    "data=files",
    f"data.root={sysconfig.get_paths()['stdlib']}",
    "data.include=[json/*.py,email/*.py,html/*.py,logging/*.py]",
    "data.validation_fraction=0.2",
    "data.sequence_length=64",
    "data.validation_sequences=8",
    "data.prepare_processes=1",
    "tokenizer.vocab_size=512",
    "backbone.d_model=32",
    "backbone.num_layers=2",
    "backbone.num_heads=2",
    "trainer.max_steps=4",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=8",
    "trainer.val_every_steps=4",
    "trainer.checkpoint_every_steps=2",
    "trainer.log_every_steps=1",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "tracking=none",
    "evaluation.enabled=false",
]
"""Overrides of an experiment that trains in a second."""


@pytest.fixture(scope="session")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs; data prepared in it is shared by the whole session."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def tiny(run_root: Path) -> list[str]:
    """TINY in the session's folder."""
    return [*TINY, f"run_root={run_root}"]


@pytest.fixture(scope="module")
def no_stores_yet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user who has never opened an MLflow store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small wait for threads more than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses in chunks of 16 rows and blocks of 16 classes, pieces of 5 rows, all of it kept: tiny cases cross every boundary."""
    from loss_cases import V

    from heads_lightning.losses import chunked, chunked_blocks, chunked_kernels, kept

    monkeypatch.setattr(chunked_blocks, "BLOCK_COLUMNS", 16)
    monkeypatch.setattr(chunked_kernels, "CACHED_BYTES", 5 * V * 4)
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(kept, "LEAST_BYTES", 1)
