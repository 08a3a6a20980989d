"""From one process to two, measured; from 8 devices to 1,024, by arithmetic.

python experiments/scaling/scaling.py measure     # minutes on two idle processor cores: one process and two, one thread each
python experiments/scaling/scaling.py measure 1   # each layout once
python experiments/scaling/scaling.py plan        # no run: memory and traffic of a step for each layout
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from heads_lightning.tracking.run_folder import read_metrics

EXPERIMENT = [
    "data=files", f"data.root={sysconfig.get_paths()['stdlib']}", "data.include=[json/*.py,email/*.py,html/*.py,logging/*.py]",
    "data.sequence_length=256", "data.validation_sequences=8", "data.prepare_processes=1", "tokenizer.vocab_size=4096", "objective=causal",
    "optimizer=adamw", "backbone.d_model=256", "backbone.num_layers=4", "backbone.num_heads=4", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "trainer.max_steps=10", "trainer.log_every_steps=2", "trainer.val_every_steps=100",
    "trainer.checkpoint_every_steps=100", "trainer.global_batch_size=16", "trainer.micro_batch_size=8", "tracking=none",
    "evaluation.enabled=false",
]  # fmt: skip
LAYOUTS = {
    "one process": (1, []),
    "data, 2": (2, ["trainer.parallel=data"]),
    "fsdp, 2": (2, ["trainer.parallel=fsdp"]),
    "tensor, 2": (2, ["trainer.parallel=tensor"]),
}


APART = "two runs at once"
"""Two processes that share nothing but the machine: what two of its processors have together, the limit of any layout of two."""


def speeds(run_dir: Path, processes: int, fields: list[str]) -> list[float]:
    """Positions a second of a run, point by point but for the first, which waits for everything."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    where = [f"trainer.devices={processes}", f"hydra.run.dir={run_dir}", f"run_root={run_dir.parent}"]
    command = [*torchrun, "-m", "heads_lightning", "train", *EXPERIMENT, *fields, *where]
    # torchrun gives one thread to each of several processes, and all of them to one
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = [point.values.get("speed/tokens_per_second") for point in read_metrics(run_dir)]
    return [speed for speed in found if speed is not None][1:]


def measure(turns: str = "3") -> None:
    """Positions a second of the same global batch on one process and on two; the layouts take turns."""
    found: dict[str, list[float]] = {name: [] for name in (*LAYOUTS, APART)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for turn in range(int(turns)):
            for number, (name, (processes, fields)) in enumerate(LAYOUTS.items()):
                found[name] += speeds(Path(folder) / f"{turn}-{number}", processes, fields)
            apart = pool.map(lambda side, turn=turn: speeds(Path(folder) / f"{turn}-{side}", 1, []), ("left", "right"))
            found[APART] += map(sum, zip(*apart, strict=True))
    one, most = statistics.median(found["one process"]), statistics.median(found[APART])
    print("| layout | positions/s | over one process | of two runs at once |\n|---|---|---|---|")
    for name, points in found.items():
        speed = statistics.median(points)
        print(f"| {name} | {speed:,.0f} | {speed / one:.2f} | {'' if name == 'one process' else f'{speed / most:.0%}'} |")


class Model(NamedTuple):
    """A decoder by its size."""

    name: str
    layers: int
    width: int
    vocabulary: int = 50_000

    @property
    def block(self) -> int:
        """Parameters of a block: four square matrices of attention, eight of the feed-forward."""
        return 12 * self.width**2

    @property
    def ends(self) -> int:
        """Parameters of the embedding and the head."""
        return 2 * self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.block + self.ends


MODELS = [Model("125 M", 12, 768), Model("1.3 B", 24, 2048), Model("7 B", 32, 4096), Model("70 B", 80, 8192)]
NODE = 8
"""Devices of a node."""
INSIDE, BETWEEN = 300e9, 40e9
"""Bytes a second and device that collectives reach inside a node and between nodes: assumed, two thirds and more of the links' own."""
FLOPS = 989e12 * 0.4
"""Floating point operations a second: bf16 of an H100 at 40 % use; assumed."""
TOKENS = 16_384
"""Positions of a device in a step, one micro-batch."""


class Cost(NamedTuple):
    """Of one device in one step."""

    gigabytes: float
    traffic_seconds: float


def cost(model: Model, devices: int, layout: str) -> Cost:
    """Memory and traffic of AdamW in fp32 (weight, gradient, two moments: 16 bytes), bf16 gathers, recomputed blocks."""
    together = NODE if layout == "fsdp_tensor" else 1  # devices that compute a sequence
    shards = {"data": 1, "fsdp": devices, "hsdp": min(NODE, devices), "fsdp_tensor": devices // together}[layout]
    held = model.parameters / together
    kept = 16 * held / shards
    activations = 2 * TOKENS * model.width * (model.layers + 34)  # an input a block, and one block's own
    # two blocks ahead; fp32 gradients
    gathered = 0 if shards == 1 else (2 * (2 * model.block + model.ends) + 4 * (model.block + model.ends)) / together
    seconds = 0.0
    if shards > 1:  # blocks are gathered for both passes, the ends once; gradients are reduced in fp32
        moved = (4 * model.layers * model.block + 2 * model.ends) / together + 4 * held
        seconds += moved * (shards - 1) / shards / (BETWEEN if shards * together > NODE else INSIDE)
    copies = devices // shards // together
    if copies > 1:  # all-reduce: twice the fp32 gradients that a device holds
        seconds += 2 * 4 * held / shards * (copies - 1) / copies / (BETWEEN if devices > NODE else INSIDE)
    if together > 1:  # each branch gathers the positions and scatters its sums, in bf16: forward, again, and backward
        positions = together * TOKENS
        seconds += 3 * 4 * model.layers * 2 * positions * model.width * (together - 1) / together / INSIDE
    return Cost((kept + activations + gathered) / 1e9, seconds)


def plan() -> None:
    """Per model, number of devices and layout: memory, and traffic against compute."""
    print("| model | devices | layout | GB a device | traffic s | compute s | traffic/compute |\n|---|---|---|---|---|---|---|")
    for model in MODELS:
        compute = 8 * model.parameters * TOKENS / FLOPS  # 6, and 2 for running blocks again
        for devices in (8, 64, 1024):
            for layout in ("data", "fsdp", "hsdp", "fsdp_tensor"):
                if layout in ("hsdp", "fsdp_tensor") and devices == NODE:
                    continue  # one copy: that is fsdp; one group: that is tensor
                found = cost(model, devices, layout)
                numbers = f"{found.gigabytes:,.0f} | {found.traffic_seconds:.3f} | {compute:.3f} | {found.traffic_seconds / compute:.1f}"
                print(f"| {model.name} | {devices} | {layout} | {numbers} |")


if __name__ == "__main__":
    {"measure": measure, "plan": plan}[sys.argv[1]](*sys.argv[2:])
