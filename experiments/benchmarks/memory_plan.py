"""The memory that `check` foretells against the memory that training takes, on this machine's processor.

    python experiments/benchmarks/memory_plan.py

Each configuration trains four optimizer steps in processes of its own: one, or the gloo ranks that its layout takes. `tensors` is the
largest sum of all live tensors of the first rank in the third step, counted at every operation: what torch.cuda.max_memory_allocated
counts on a GPU, and what a plan is of (target: within 15 %). What malloc keeps of freed blocks is not in it.
"""

import json
import os
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


RANKS = {
    "data, 2 ranks": ["trainer.parallel=data", "trainer.devices=2"],
    "fsdp, 2 ranks": ["trainer.parallel=fsdp", "trainer.devices=2"],
    "fsdp, 2 ranks, no reshard": ["trainer.parallel=fsdp", "trainer.devices=2", "trainer.reshard=false"],
    "fsdp, 2 ranks, bf16": ["trainer.parallel=fsdp", "trainer.devices=2", "trainer.gather_dtype=bfloat16"],
    "fsdp, 2 ranks, recomputed": ["trainer.parallel=fsdp", "trainer.devices=2", "trainer.recompute_every=1"],
    "tensor, 2 ranks": ["trainer.parallel=tensor", "trainer.devices=2"],
}
LARGER = ["backbone.d_model=512", "backbone.num_layers=8", "backbone.num_heads=8", "optimizer=adamw", "trainer.micro_batch_size=4"]
CASES |= {name: [*LARGER, *fields, "trainer.precision=32-true"] for name, fields in RANKS.items()}
CASES |= {"recomputed": ["trainer.recompute_every=1"], "every second recomputed": ["trainer.recompute_every=2"]}
# a fourth step, since the last one saves: the first rank then holds the whole model (on a GPU, in host memory), which no plan is of
SHORT = ["trainer.max_steps=4", "trainer.accelerator=cpu", "tracking=none", "evaluation.enabled=false", "trainer.val_every_steps=1000"]


def live_tensors(known):
    """A dispatch mode whose `peak` is the largest sum of live storages, those of the tensors `known` among them."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.storages, self.peak = weakref.WeakValueDictionary(), 0
            for tensor in known:
                self.add(tensor)

        def add(self, tensor) -> None:
            own = getattr(tensor, "_local_tensor", tensor)
            if type(own) in (torch.Tensor, torch.nn.Parameter):
                storage = own.untyped_storage()
                self.storages[storage._cdata] = storage

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in tree_iter(out):
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor)
            # asked anew: FSDP2 frees a gathered weight by resizing its storage
            self.peak = max(self.peak, sum(storage.nbytes() for storage in list(self.storages.values())))
            return out

    return Live()


def child(overrides: list[str], folder: str) -> None:
    """Print {planned, tensors} in bytes."""
    import lightning.pytorch as lightning
    import torch

    from heads_lightning.composition import compose
    from heads_lightning.experiment import build
    from heads_lightning.planning import plan
    from heads_lightning.run import train
    from heads_lightning.training.agreement import settled

    class Measure(lightning.Callback):
        peak = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 2:
                state = [value for entry in _states(trainer.optimizers[0]) for value in entry.values() if isinstance(value, torch.Tensor)]
                self.mode = live_tensors([*pl_module.parameters(), *pl_module.buffers(), *state])
                self.mode.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 2:
                self.mode.__exit__(None, None, None)
                self.peak = self.mode.peak

    config = compose([*overrides, *SHORT])
    config.trainer = settled(config.trainer)
    parts = build(config, say=lambda line: None)
    expected = plan(
        config,
        vocab_size=parts.prepared.tokenizer.vocabulary.size,
        training_tokens=1,
        sample=parts.datamodule.train_stream.examples(0, 16),
        attention=parts.objective.attention,
        precision=config.trainer.precision,
    )
    measure = Measure()
    train(config, Path(folder) / "run", callbacks=[measure])
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"planned": expected.memory.total, "tensors": measure.peak, "parts": expected.memory._asdict()}))


def _states(optimizer):
    return [state for part in getattr(optimizer, "parts", [optimizer]) for state in part.state.values()]


def main() -> None:
    """Print the table."""
    wanted = sys.argv[1:]
    print(f"{'':26} {'planned':>10} {'tensors':>10}   planned / tensors")
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in CASES.items():
            if wanted and name not in wanted:
                continue
            ranks = next((int(field.partition("=")[2]) for field in overrides if field.startswith("trainer.devices=")), 1)
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
            place = Path(folder) / name.replace(" ", "_").replace(",", "")
            command = [sys.executable, *torchrun, __file__, "--child", str(place), *overrides, f"data.cache_dir={folder}"]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"planned"')))
            sizes = " ".join(f"{seen[key] / 2**20:6.0f} MiB" for key in ("planned", "tensors"))
            print(f"{name:26} {sizes}   {seen['planned'] / seen['tensors']:.2f}", flush=True)


if __name__ == "__main__":
    child(sys.argv[3:], sys.argv[2]) if sys.argv[1:2] == ["--child"] else main()
