"""What does a conversion of a large checkpoint cost, beside copying it?

    python experiments/benchmarks/conversion.py [--gigabytes 8] [--folder FOLDER] [--json results.json]

Writes a synthetic Llama checkpoint of random bf16 weights in shards of 2 GB, and a GPT-2 half as large, whose matrices are transposed and
split on the way. Then, each in a process of its own:

    copy       safetensors' load_file and save_file, shard by shard, files synced to disk as the conversion's are
    convert    heads-lightning convert to=native validate=false

Peak memory is the kernel's VmHWM of that process, the interpreter and torch included; throughput is bytes of weights per second of wall
time, the best of the repeats. The page cache is as warm for one as for the other: the source has just been read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from heads_lightning.configs.requests import ConvertRequest, ConvertTarget
from heads_lightning.conversion.convert import convert
from heads_lightning.conversion.converter import StateConverter
from heads_lightning.conversion.families import FAMILIES
from heads_lightning.conversion.native import NativeLM
from heads_lightning.conversion.sources import SafetensorsSource
from heads_lightning.conversion.streaming import bytes_of

SHARD = 2 * 10**9


def llama(gigabytes: float) -> dict[str, Any]:
    """config.json of a Llama about that large in bf16: blocks of 0.4 GB, an untied vocabulary of 32,000."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    layers = max(1, round((gigabytes - 0.52) / 0.405))
    return {"model_type": "llama", "vocab_size": 32000, "num_hidden_layers": layers, **sizes}


def gpt2(gigabytes: float) -> dict[str, Any]:
    """config.json of a GPT-2 about that large in bf16: blocks of 0.4 GB."""
    layers = max(1, round((gigabytes - 0.42) / 0.403))
    return {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 4096, "n_layer": layers, "n_head": 32, "n_positions": 1024}


def write_synthetic(config: dict[str, Any], folder: Path) -> int:
    """A checkpoint with random weights; returns the bytes of its weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    family = FAMILIES[config["model_type"]]
    native = family.native(config)
    shapes = NativeLM(native, device="meta").to(torch.bfloat16).state_dict()
    theirs = StateConverter(family.templates(native)).inverse().convert(shapes, family.bounds(native))
    block = torch.empty(2**28, dtype=torch.int16).random_().view(torch.bfloat16)  # larger than any tensor; each takes another part of it
    shard: dict[str, torch.Tensor] = {}
    number = total = 0
    for name, spec in theirs.items():
        start = (7919 * len(shard)) % (len(block) - spec.numel())
        shard[name] = block[start : start + spec.numel()].clone().view(spec.shape)
        total += bytes_of(shard[name])
        if sum(map(bytes_of, shard.values())) > SHARD:
            save_file(shard, folder / f"model-{number:05d}.safetensors", {"format": "pt"})
            shard, number = {}, number + 1
    save_file(shard, folder / f"model-{number:05d}.safetensors", {"format": "pt"})
    return total


def copy(source: Path, out: Path) -> None:
    """What one would write without this package."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), out / file.name, {"format": "pt"})
        descriptor = os.open(out / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(what: str, source: Path, out: Path) -> None:
    """One run, in this process; prints its numbers as JSON."""
    began = time.perf_counter()
    if what == "copy":
        copy(source, out)
    else:
        request = ConvertRequest(from_=str(source), to=ConvertTarget.native, out=str(out), validate=False, shard_gb=2.0)
        convert(request, say=lambda line: None)
    seconds = time.perf_counter() - began
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_rss_gb": peak * 1024 / 1e9}))


def measured(what: str, source: Path, repeats: int) -> dict[str, float]:
    """The best time and the largest peak of several runs, each in a process of its own."""
    out, found = source.with_name(f"out-{what}"), []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, __file__, "--measure", what, str(source), str(out)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
    shutil.rmtree(out)
    return {"seconds": min(f["seconds"] for f in found), "peak_rss_gb": max(f["peak_rss_gb"] for f in found)}


def largest_group(folder: Path) -> int:
    """Bytes of the largest tensor."""
    return max(map(bytes_of, SafetensorsSource(sorted(folder.glob("*.safetensors"))).specs.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measure", nargs=3, default=None)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure[0], Path(arguments.measure[1]), Path(arguments.measure[2]))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        for name, config, runs in (
            ("llama", llama(arguments.gigabytes), ("copy", "convert")),
            ("gpt2", gpt2(arguments.gigabytes / 2), ("copy", "convert")),
        ):
            source = Path(root) / name
            size = write_synthetic(config, source)
            results[name] = {"gigabytes": size / 1e9, "largest_tensor_gb": largest_group(source) / 1e9}
            results[name] |= {what: measured(what, source, arguments.repeats) for what in runs}
            shutil.rmtree(source)
            print(table(name, results[name]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def table(name: str, found: dict[str, Any]) -> str:
    """One model's numbers in lines."""
    lines = [f"{name}: {found['gigabytes']:.2f} GB, largest tensor {found['largest_tensor_gb']:.2f} GB"]
    for what in ("copy", "convert"):
        speed = found["gigabytes"] / found[what]["seconds"]
        lines.append(f"  {what:8} {found[what]['seconds']:6.1f} s  {speed:5.2f} GB/s  peak RSS {found[what]['peak_rss_gb']:5.2f} GB")
    lines.append(f"  throughput of convert ÷ copy: {found['copy']['seconds'] / found['convert']['seconds']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
