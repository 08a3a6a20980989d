"""Time and memory of the loss implementations: forward and backward, against the three matrix products that cannot be avoided.

    python experiments/benchmarks/loss.py time   [--shapes A,B,C] [--dtypes float32,bfloat16,mixed] [--labelled 1.0,0.15] [--threads 2]
    python experiments/benchmarks/loss.py memory [--shapes A]
    python experiments/benchmarks/loss.py sweep                     # small shapes: is chunked ever slower than default?
    python experiments/benchmarks/loss.py split                     # where the time of chunked goes, in shares of the limit
    python experiments/benchmarks/loss.py gpu                       # the GPU table; needs one

Times: all implementations once per round, in one process, in an order drawn anew; the median over rounds of each round's ratio, so that
other work on the machine falls on all alike, and none always finds the caches as the same other left them. With one thread CPU time is
used, with more wall time. limit = three products of 2·N·d·V operations each (N: rows with a target) at the best rate that any library
reaches here for that type. Memory: peak resident size of one step beyond dX and dW, in fresh processes. `--json FILE` keeps the numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heads_lightning.losses import kept, linear_cross_entropy, unavailable
from heads_lightning.losses.auto import choose
from heads_lightning.onednn import is_faster
from heads_lightning.onednn import product as onednn_product

SHAPES = {"A": (2048, 512, 50304), "B": (1024, 768, 32000), "C": (4096, 256, 8192)}
GPU_SHAPES = {"d4096": (16384, 4096, 131072), "d2048": (32768, 2048, 50304)}
Step = Callable[[], Any]


def make(shape: tuple[int, int, int], dtype: torch.dtype, labelled: float, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels of which a share is not ignored."""
    n, d, v = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g).to(device, dtype).requires_grad_()
    w = (torch.randn(v, d, generator=g) * 2 * d**-0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) >= labelled] = -100
    return x, w, labels.to(device)


def losses(x: Tensor, w: Tensor, labels: Tensor, names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """The contenders by name; `naive` is PyTorch without any care."""
    targets = int((labels != -100).sum())
    compiled = torch.compile(lambda: F.cross_entropy(F.linear(x, w).float(), labels), dynamic=False)

    def ours(name: str) -> Callable[[], Tensor]:
        return lambda: linear_cross_entropy(x, w, labels, implementation=name, num_targets=targets).total

    known: dict[str, Callable[[], Tensor]] = {"naive": lambda: F.cross_entropy(F.linear(x, w), labels), "compile": compiled}
    return {name: known.get(name) or ours(name) for name in names}


def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Tensor:
    """Forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    value = loss()
    value.backward()
    return value.detach()


def whole_step(loss: Callable[[], Tensor], *leaves: Tensor) -> None:
    """A step that frees its gradients itself: to unmap them is part of its time, and not of whichever runs next."""
    step(loss, *leaves)
    for leaf in leaves:
        leaf.grad = None


def repeat(loss: Callable[[], Tensor], *leaves: Tensor) -> None:
    """Three steps."""
    for _ in range(3):
        whole_step(loss, *leaves)


def products(x: Tensor, w: Tensor, rows: int) -> dict[str, tuple[Step, float]]:
    """The three products alone, by library, in the sizes that suit it; with the share of `rows` that the sizes cover."""
    block = min(rows, 512)
    x, w = x.detach()[:block].contiguous(), w.detach()
    classes = w.shape[0]
    g = torch.randn(block, classes).to(x)
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    chunks = -(-rows // block)
    share = rows / (chunks * block)

    def whole() -> None:
        for _ in range(chunks):
            torch.mm(x, w.t(), out=g)
            torch.mm(g, w, out=dx)
            torch.mm(g.t(), x, out=dw)

    def blocks(product: Callable[[Tensor, Tensor], Tensor], columns: int) -> tuple[Step, float]:
        g_block = torch.randn(block, columns).to(x)

        def run() -> None:
            for _ in range(chunks):
                for k in range(0, classes - columns + 1, columns):
                    product(x, w[k : k + columns])
                    product(g_block, w[k : k + columns].t())
                    product(g_block.t(), x.t())

        return run, share * classes / (classes // columns * columns)

    result: dict[str, tuple[Step, float]] = {"mm": (whole, share)}
    for columns in (1024, 2048):
        if classes >= columns:
            result[f"mm in blocks of {columns}"] = blocks(lambda a, b: torch.mm(a, b.t()), columns)
            if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
                result[f"oneDNN in blocks of {columns}"] = blocks(onednn_product, columns)
    return result


def rounds(runs: dict[str, tuple[Step, float]], count: int, threads: int, seconds: float, at_least: float = 0.0) -> dict[str, list[float]]:
    """Seconds of every run in every round: `count` rounds, more until `at_least` seconds are over, none begun after `seconds`."""
    draw = random.Random(0)
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        run()
    gc.collect()  # and not again: it leaves cold caches for whoever comes next
    gc.disable()
    number, begun = 0, time.monotonic()
    while (passed := time.monotonic() - begun) <= seconds and (number < count or passed < at_least):
        number += 1
        for name, (run, scale) in draw.sample(list(runs.items()), len(runs)):
            start = clock()
            run()
            taken[name].append((clock() - start) * scale)
    gc.enable()
    return taken


def fastest(ways: dict[str, tuple[Step, float]], options: argparse.Namespace) -> dict[str, tuple[Step, float]]:
    """The ways to multiply of which one may be the limit: those within a quarter of the best of three rounds."""
    taken = {name: statistics.median(seconds) for name, seconds in rounds(ways, 3, options.threads, options.seconds).items()}
    return {name: way for name, way in ways.items() if taken[name] < 1.25 * min(taken.values())}


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def time_shape(name: str, dtype: str, labelled: float, options: argparse.Namespace) -> dict[str, Any]:
    """One line per implementation for one shape; `mixed` is bf16 with weights of fp32, under autocast."""
    mixed = dtype == "mixed"
    x, w, labels = make(SHAPES[name], torch.bfloat16 if mixed else getattr(torch, dtype), labelled)
    limits = fastest(products(x, w, int((labels != -100).sum())), options)
    if mixed:
        w = w.detach().float().requires_grad_()

    def run(loss: Callable[[], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            whole_step(loss, x, w)

    contenders = {k: (partial(run, f), 1.0) for k, f in losses(x, w, labels, options.implementations.split(",")).items()}
    taken = rounds({**contenders, **limits}, options.rounds, options.threads, options.seconds, options.at_least)
    best = min(limits, key=lambda k: statistics.median(taken[k]))
    rows = int((labels != -100).sum())
    gflop = 6 * rows * SHAPES[name][1] * SHAPES[name][2] / 1e9
    print(f"\n{name} {SHAPES[name]} {dtype} labelled {labelled} threads {options.threads} rounds {len(taken[best])}")
    print(f"  limit ({best}) {statistics.median(taken[best]) * 1e3:8.1f} ms = {gflop / statistics.median(taken[best]):.0f} GFLOP/s")
    result: dict[str, Any] = {"limit": {"ms": statistics.median(taken[best]) * 1e3, "library": best}}
    for k in contenders:
        against = {f"to_{other}": ratio(taken[k], taken[other]) for other in ("naive", "default") if other in taken}
        result[k] = {"ms": statistics.median(taken[k]) * 1e3, "to_limit": ratio(taken[k], taken[best]), **against}
        said = "".join(f"   ÷ {name[3:]} {value:5.2f}" for name, value in result[k].items() if name.startswith("to_"))
        print(f"  {k:14s} {result[k]['ms']:8.1f} ms{said}", flush=True)
    return result


def resident(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def memory_child(name: str, shape: str, dtype: torch.dtype, labelled: float) -> None:
    """Peak of one step in this process, printed in bytes beyond dX and dW."""
    for _ in range(2):  # the libraries' own buffers, at a tiny size
        x, w, labels = make((64, SHAPES[shape][1], 4096), dtype, labelled)
        step(losses(x, w, labels, [name])[name], x, w)
    x, w, labels = make(SHAPES[shape], dtype, labelled)
    loss = losses(x, w, labels, [name])[name]
    if name == "compile":
        step(loss, x, w)
        x.grad = w.grad = None
    if dtype == torch.float32:
        is_faster()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that the process holds would hide as much of the peak
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(loss, x, w)
    print(resident("VmHWM") - before - (x.numel() + w.numel()) * x.element_size())


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak of every implementation: the median of three processes."""
    result = {}
    for shape, dtype, labelled in cells(options):
        n, _, v = SHAPES[shape]
        print(f"\n{shape} {SHAPES[shape]} {dtype} labelled {labelled}; fp32 logits {n * v * 4 / 2**20:.0f} MiB; peak beyond dX and dW:")
        for name in options.implementations.split(","):
            arguments = ["--child", name, "--shapes", shape, "--dtypes", dtype, "--labelled", str(labelled)]
            command = [sys.executable, __file__, "memory", *arguments, "--threads", str(options.threads)]
            runs = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(3)]
            if failed := [run for run in runs if run.returncode]:
                print(f"  {name:14s} failed: {failed[0].stderr.strip().splitlines()[-1]}")
                continue
            mib = statistics.median(int(run.stdout.split()[-1]) / 2**20 for run in runs)
            result[f"{shape} {dtype} {labelled} {name}"] = mib
            print(f"  {name:14s} {mib:8.0f} MiB", flush=True)
    return result


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """chunked and auto ÷ default at small shapes."""
    result: dict[str, Any] = {}
    print(f"time ÷ default, threads {options.threads} (d 256)")
    for v in (256, 1024, 4096, 16384):
        for n in (64, 256, 1024):
            found: dict[str, Any] = {"auto_takes": choose(n, v)[0]}
            for dtype in ("float32", "bfloat16"):
                x, w, labels = make((n, 256, v), getattr(torch, dtype), 1.0)
                names = losses(x, w, labels, ["default", "chunked", "auto"])
                runs = {k: (partial(repeat, f, x, w), 1.0) for k, f in names.items()}
                taken = rounds(runs, options.rounds, options.threads, options.seconds)
                found[dtype] = {name: ratio(taken[name], taken["default"]) for name in ("chunked", "auto")}
            result[f"{n} {v}"] = found
            ratios = "".join(f"   {name} {found['float32'][name]:5.2f} {found['bfloat16'][name]:5.2f}" for name in ("chunked", "auto"))
            print(f"  N {n:5d} V {v:6d}{ratios}   auto takes {found['auto_takes']}", flush=True)
    return result


def faulted(run: Step) -> float:
    """MiB of fresh pages that the system hands out during the third of three runs."""
    for _ in range(2):
        run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20


PARTS = {
    "products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    "soft-max": ("aten::_softmax", "aten::amax"),
    "copies and sums": ("aten::copy_", "aten::add_", "aten::mul", "aten::mul_", "aten::addcmul_", "aten::fill_"),
}
"""Operators whose own time is a part of a step; what no part holds is `rest`: small operators and Python."""


def split(options: argparse.Namespace) -> dict[str, Any]:
    """Where a step of `chunked` spends its time, in shares of the limit. `fresh dW`: its time when no gradient's memory is kept."""
    result: dict[str, Any] = {}
    print(f"parts of chunked ÷ limit, threads {options.threads}")
    for shape, dtype, labelled in cells(options):
        x, w, labels = make(SHAPES[shape], getattr(torch, dtype), labelled)
        limits = fastest(products(x, w, int((labels != -100).sum())), options)
        loss = losses(x, w, labels, ["chunked"])["chunked"]

        def fresh(loss: Callable[[], Tensor] = loss, x: Tensor = x, w: Tensor = w) -> None:
            keeps_from, kept.LEAST_BYTES = kept.LEAST_BYTES, sys.maxsize
            whole_step(loss, x, w)
            kept.LEAST_BYTES = keeps_from

        runs = {"fresh dW": (fresh, 1.0), "chunked": (partial(whole_step, loss, x, w), 1.0), **limits}
        taken = rounds(runs, options.rounds, options.threads, options.seconds)
        limit = min(limits, key=lambda k: statistics.median(taken[k]))
        found = {name: ratio(taken[name], taken[limit]) for name in ("chunked", "fresh dW")}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            repeat(loss, x, w)
        own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        shares = {part: sum(own.get(name, 0.0) for name in names) / sum(own.values()) for part, names in PARTS.items()}
        found |= {part: share * found["chunked"] for part, share in shares.items()}
        found["rest"] = found["chunked"] * (1 - sum(shares.values()))
        found["MiB faulted in"], found["with a fresh dW"] = faulted(partial(whole_step, loss, x, w)), faulted(fresh)
        result[f"{shape} {dtype} {labelled}"] = found
        print(f"  {shape} {dtype} {labelled}   " + "   ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
    return result


def gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Time, peak memory and error of every implementation that runs on this GPU."""
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    print(result["device"])
    for shape_name, shape in GPU_SHAPES.items():
        x, w, labels = make(shape, torch.bfloat16, 1.0, "cuda")
        names = [k for k in ("default", "chunked", "fused_linear", "cce", "torch") if unavailable(k) is None]
        limit = gpu_seconds(lambda x=x, w=w: [x @ w.t() for _ in range(3)], 5)
        print(f"\n{shape_name} {shape} bf16; limit {limit * 1e3:.1f} ms")
        for k, loss in losses(x, w, labels, names).items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = gpu_seconds(partial(step, loss, x, w), 5)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            error = gpu_error(k, shape)
            result[f"{shape_name} {k}"] = {"ms": seconds * 1e3, "to_limit": seconds / limit, "peak_mib": peak, **error}
            print(f"  {k:14s} {seconds * 1e3:8.1f} ms   ÷ limit {seconds / limit:5.2f}   peak {peak:8.0f} MiB   {error}", flush=True)
    return result


def gpu_seconds(run: Step, count: int) -> float:
    """Median seconds on the device, after a warm-up."""
    run()
    seconds = []
    for _ in range(count):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(seconds)


def gpu_error(name: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Relative error of loss and gradients of bf16 operands against fp64, on a few rows."""
    x, w, labels = make((512, shape[1], min(shape[2], 32768)), torch.bfloat16, 1.0, "cuda")
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    want = step(lambda: F.cross_entropy(F.linear(*exact), labels), *exact)
    got = step(losses(x, w, labels, [name])[name], x, w)
    pairs = {"loss": (got, want), "dX": (x.grad, exact[0].grad), "dW": (w.grad, exact[1].grad)}
    return {k: float((a.double() - b).norm() / b.norm()) for k, (a, b) in pairs.items() if a is not None and b is not None}


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    named = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith(("model name", "cpu family"))]
    return ", family ".join(reversed(named[:2])) if named else platform.machine()


def cells(options: argparse.Namespace) -> list[tuple[str, str, float]]:
    """The shapes × types × shares asked for."""
    shares = [float(share) for share in options.labelled.split(",")]
    return [(shape, dtype, share) for share in shares for dtype in options.dtypes.split(",") for shape in options.shapes.split(",")]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory", "sweep", "split", "gpu"])
    parser.add_argument("--shapes", default="A,B,C")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--labelled", default="1.0")
    parser.add_argument("--implementations", default="default,chunked")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--at-least", type=float, default=0.0, help="seconds of a cell until which rounds go on")
    parser.add_argument("--seconds", type=float, default=180.0, help="of a cell, after which no round begins")
    parser.add_argument("--json", default="")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.child:
        memory_child(options.child, options.shapes, getattr(torch, options.dtypes), float(options.labelled))
        return
    results: dict[str, Any]
    if options.what == "time":
        results = {f"{s} {d} {share}": time_shape(s, d, share, options) for s, d, share in cells(options)}
    else:
        results = {"memory": memory, "sweep": sweep, "split": split, "gpu": gpu}[options.what](options)
    if options.json:
        command = " ".join(sys.argv[1:]).replace(f" --json {options.json}", "")
        about = {"torch": torch.__version__, "processor": processor(), "threads": options.threads, "command": command}
        Path(options.json).write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
