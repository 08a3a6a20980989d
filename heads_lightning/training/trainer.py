"""The Lightning Trainer of a run: devices, strategy, precision. Everything that repeats per step lives in the module and the callbacks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from heads_lightning import onednn
from heads_lightning.configs.trainer import LinearKernel, Parallel, TrainerConfig
from heads_lightning.registry import ConfigError
from heads_lightning.training.checkpoints import AtomicCheckpointIO


def resolve_precision(precision: str, accelerator: str) -> str:
    """`auto` as a concrete precision for this machine: bf16-mixed where bf16 matrix products are faster, else 32-true.

    A processor's flags do not tell whether its bf16 is native or emulated, so the products are timed (a few milliseconds).
    """
    if precision != "auto":
        return precision
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return "32-true"
    operands = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    exact, rough = onednn.least_seconds(*(lambda operand=operand: torch.mm(operand, operand) for operand in operands))
    return "bf16-mixed" if rough * 1.3 < exact else "32-true"


def why_not_onednn(trainer: TrainerConfig) -> str | None:
    """What keeps linear layers from oneDNN whatever it takes on this machine, or None.

    Args:
        trainer: with a concrete precision.
    """
    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    reasons = {
        f"oneDNN is faster in fp32 alone, and trainer.precision={trainer.precision}": trainer.precision != "32-true",
        "there is another device than the CPU": trainer.accelerator != "cpu" and (trainer.accelerator != "auto" or has_accelerator),
        "trainer.compile=true makes its own": trainer.compile,
        f"trainer.parallel={trainer.parallel} shares out every matrix": trainer.tensor_ranks > 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def faster_linear_kernel() -> LinearKernel:
    """What multiplies fp32 faster on this machine's processor."""
    return LinearKernel.onednn if onednn.is_faster() else LinearKernel.torch


def check_linear_kernel(trainer: TrainerConfig) -> None:
    """Refuse oneDNN where it does not exist or is wrong."""
    if trainer.linear_kernel == LinearKernel.onednn and not onednn.is_right():
        raise ConfigError(
            "trainer.linear_kernel=onednn: this machine's PyTorch has no product of oneDNN that is right; use trainer.linear_kernel=torch"
        )


def _strategy(config: TrainerConfig) -> Any:
    if config.is_sharded:
        from heads_lightning.training.parallel import ShardedStrategy  # a second of imports that other runs do not need

        return ShardedStrategy(config)
    if config.parallel == Parallel.data or config.world_size > 1:
        # every parameter takes part in every loss; searching for unused ones would walk the graph each step
        return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True)
    return "auto"


def _cluster() -> list[Any]:
    """SLURM's environment without Lightning's own requeueing, which saves inside a signal handler and begins a second run."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def build_trainer(config: TrainerConfig, *, precision: str, total_steps: int, callbacks: list[Callback], logger: Any) -> lightning.Trainer:
    """The Trainer of a run of `total_steps` optimizer steps. `precision` is a concrete one (resolve_precision)."""
    return lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config),
        precision=precision,  # pyright: ignore[reportArgumentType]
        # the loader holds one batch per optimizer step of the run, so one epoch is the run
        max_epochs=1,
        val_check_interval=config.val_every_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=logger,
        plugins=[AtomicCheckpointIO(), *_cluster()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=min(config.log_every_steps, total_steps),
        # the one thing that makes a run depend on what ran before it
        benchmark=False,
    )
