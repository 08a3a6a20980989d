"""Vocabulary-parallel losses on gloo processes: time, peak memory and collectives against DTensor's loss_parallel.

    python experiments/benchmarks/loss_vocab_parallel.py [--world 2] [--rows 2048] [--width 256] [--classes 32000] [--rounds 3]

Each rank holds its rows of the projection, the same hidden states and labels, and runs forward and backward in fp32 on one thread. Peak:
growth of rank 0's resident size in one step beyond the operands and their gradients. Rounds are interleaved; the median of the wall time is
shown.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

from heads_lightning.losses import linear_cross_entropy
from heads_lightning.losses.vocab_parallel import vocab_shard


def resident(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def contenders(hidden: Tensor, weight: Tensor, labels: Tensor, classes: int) -> dict[str, Callable[[], float]]:
    """Forward and backward by name; each returns its loss."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    assert dist.group.WORLD is not None
    shard = vocab_shard(weight, dist.group.WORLD, vocab_size=classes)

    def leaves() -> tuple[Tensor, Tensor]:
        return hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def ours(name: str) -> Callable[[], float]:
        def run() -> float:
            x, w = leaves()
            loss = linear_cross_entropy(x, w, labels, implementation=name, shard=shard).total
            loss.backward()
            return float(loss.detach())

        return run

    def pytorch() -> float:
        x, w = leaves()
        sharded = DTensor.from_local(w, mesh, [Shard(0)], run_check=False, shape=torch.Size((classes, w.shape[1])), stride=(w.shape[1], 1))
        logits = F.linear(DTensor.from_local(x, mesh, [Replicate()], run_check=False), sharded)
        with loss_parallel():
            loss = F.cross_entropy(logits, labels)
            loss.backward()
        assert isinstance(loss, DTensor)
        return float(loss.full_tensor())

    return {"loss_parallel": pytorch, "default": ours("default"), "chunked": ours("chunked")}


def worker(rank: int, port: int, options: argparse.Namespace) -> None:
    """One rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=options.world)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.rows, options.width, generator=g)
    weight = torch.randn(options.classes, options.width, generator=g) * options.width**-0.5
    labels = torch.randint(0, options.classes, (options.rows,), generator=g)
    size = -(-options.classes // options.world)
    runs = contenders(hidden, weight[size * rank : size * (rank + 1)].clone(), labels, options.classes)
    del weight
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(options.rounds):
        for name, run in runs.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name, run in runs.items():
        dist.barrier()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        loss = run()
        if rank == 0:
            own = 4 * options.width * (options.rows + size) / 2**20  # copies of the operands made in the step; as much again for gradients
            peak = resident("VmHWM") - before - 2 * own
            print(f"{name:14s} {statistics.median(seconds[name]) * 1e3:8.0f} ms   peak {peak:6.0f} MiB   loss {loss:.6f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("world", 2), ("rows", 2048), ("width", 256), ("classes", 32000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    print(f"{options.world} ranks, {options.rows} x {options.width} x {options.classes} fp32")
    mp.spawn(worker, (port, options), nprocs=options.world)


if __name__ == "__main__":
    main()
