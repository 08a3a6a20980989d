"""What a run will cost, before it is started: parameters, operations, memory (memory_plan.py), steps, time.

Nothing is allocated. So a plan holds for any backbone, layout, precision and micro-batch, a plugin's too, and takes a second where the
model would take a node.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from heads_lightning.batch import IGNORE, Attention, Examples
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.memory_plan import Memory, memory, meta_model, recomputed_share


class Plan(NamedTuple):
    """The costs of a run."""

    parameters: dict[str, int]
    """Learned numbers by part; a tied projection is counted with the embedding."""
    flops_per_token: float
    """Of forward and backward, attention as if every position saw the whole sequence. What a utilisation (MFU) is a share of."""
    recomputed_flops_per_token: float
    """Of the blocks that are run again in the backward pass (trainer.recompute_every): they cost time, and count for no utilisation."""
    memory: Memory
    tokens_per_step: int
    """Of a full batch; fewer during trainer.batch_start."""
    steps: int
    tokens: int
    """Positions of the whole run."""
    passes: float
    """Over the training data."""

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.tokens

    def numbers(self) -> dict[str, Any]:
        """All of it for programs; memory in bytes."""
        return self._asdict() | {"memory": self.memory._asdict() | {"total": self.memory.total}, "flops": self.flops}

    def seconds(self, flops_per_second: float) -> float:
        """At this rate: a device's peak, times the devices, times the utilisation that is hoped for without recomputation."""
        return (self.flops + self.recomputed_flops_per_token * self.tokens) / flops_per_second


def plan(
    config: ExperimentConfig, *, vocab_size: int, training_tokens: int, sample: Examples, attention: Attention, precision: str
) -> Plan:
    """The costs of `config`.

    Args:
        config: the experiment.
        vocab_size: of its tokenizer.
        training_tokens: of its data.
        sample: a few of its examples, for the share of targets and the shape of a row.
        attention: of its objective.
        precision: the trainer's, resolved (not `auto`).
    """
    trainer, length = config.trainer, config.data.sequence_length
    share = float((sample.labels_BS != IGNORE).mean())
    backbone, head = meta_model(config, vocab_size, precision)
    tokens = trainer.tokens(length)
    trunk = config.backbone.num_flops_per_token(length)
    return Plan(
        parameters=_parameters(backbone, head),
        flops_per_token=trunk + _head_flops(head, length, share),
        recomputed_flops_per_token=trunk / 3 * recomputed_share(backbone, trainer.recompute_every),  # a forward pass is a third
        memory=memory(config, vocab_size=vocab_size, sample=sample, attention=attention, precision=precision, target_share=share),
        tokens_per_step=trainer.global_batch_size * length,
        steps=trainer.steps(length),
        tokens=tokens,
        passes=tokens / max(training_tokens, 1),
    )


def _head_flops(head: Any, length: int, share: float) -> float:
    count = getattr(head, "num_flops_per_token", None)
    return 0.0 if count is None else count(length, target_share=share)


def _parameters(backbone: nn.Module, head: nn.Module) -> dict[str, int]:
    counted: dict[str, int] = {}
    seen: set[int] = set()
    for prefix, module in (("backbone", backbone), ("head", head)):
        for name, parameter in module.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                part = f"{prefix}.{name.split('.')[0]}"
                counted[part] = counted.get(part, 0) + parameter.numel()
    return counted
