"""The memory that `check` foretells against the memory that training takes, on this machine's processor.

    python experiments/benchmarks/memory_plan.py

Each configuration runs a few optimizer steps in a process of its own, twice. `tensors` is the largest sum of all live tensors, counted at
every operation: what torch.cuda.max_memory_allocated counts on a GPU, and what a plan is of (target: within 15 %). `resident` is the peak
of the process's memory less that of a tiny model before: it adds what malloc keeps of freed blocks and the scratch of kernels.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "default": [],
    "default, micro-batch 4": ["trainer.micro_batch_size=4"],
    "fp32": ["trainer.precision=32-true"],
    "mlm": ["objective=mlm", "head=mlm"],
    "ngpt": ["backbone=ngpt", "head=normalized", "objective=causal"],
    "12 layers, d 512, adamw": ["backbone.d_model=512", "backbone.num_layers=12", "backbone.num_heads=8", "optimizer=adamw"],
    "loss default": ["head.loss_implementation=default"],
}


def live_tensors():
    """A dispatch mode whose `peak` is the largest sum of live storages."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.peak, self.sizes = 0, 0, {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in tree_iter(out):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                    storage = tensor.untyped_storage()
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.drop, storage._cdata)
            return out

        def drop(self, key: int) -> None:
            self.live -= self.sizes.pop(key, 0)

    return Live()


def child(overrides: list[str]) -> None:
    """Print {planned, tensors, resident} in bytes."""
    import torch

    from heads_lightning.composition import compose
    from heads_lightning.experiment import build
    from heads_lightning.planning import plan
    from heads_lightning.training.optimizers import build_optimizer
    from heads_lightning.training.trainer import resolve_precision

    def steps(config, count):
        parts = build(config, say=lambda line: None)
        backbone, head = parts.module.backbone.train(), parts.module.head.train()
        optimizer = build_optimizer(config.optimizer, backbone, head)
        for _, step in zip(range(count), parts.datamodule.train_dataloader(), strict=False):
            for batch in step:
                with torch.autocast("cpu", torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
                    output = head(
                        backbone(batch), labels=batch.labels_BS, loss_reduction="sum", return_logits=False, num_targets=batch.num_targets
                    )
                output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return parts

    def peak() -> int:
        return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))) * 1024

    config = compose(overrides)
    config.trainer.precision = resolve_precision(config.trainer.precision, config.trainer.accelerator)
    parts = steps(compose([*overrides, "trainer.global_batch_size=1", "data.sequence_length=32", "backbone.num_layers=1"]), 2)
    sample = build(config, say=lambda line: None).datamodule.train_stream.examples(0, 16)
    expected = plan(
        config,
        vocab_size=parts.prepared.tokenizer.vocabulary.size,
        training_tokens=1,
        sample=sample,
        attention=parts.objective.attention,
        precision=config.trainer.precision,
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak()
    steps(config, 3)
    resident = peak() - before
    with live_tensors() as counted:
        steps(config, 3)
    print(json.dumps({"planned": expected.memory.total, "tensors": counted.peak, "resident": resident}))


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'':26} {'planned':>10} {'tensors':>10} {'resident':>10}   planned / tensors")
        for name, overrides in CASES.items():
            command = [sys.executable, __file__, "--child", *overrides, f"data.cache_dir={folder}"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            seen = json.loads(done.stdout.splitlines()[-1])
            sizes = " ".join(f"{seen[key] / 2**20:6.0f} MiB" for key in ("planned", "tensors", "resident"))
            print(f"{name:26} {sizes}   {seen['planned'] / seen['tensors']:.2f}", flush=True)


if __name__ == "__main__":
    child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
