"""What a run will cost, before it is started: parameters, operations, memory, steps, time.

Nothing is allocated: the model is built of fake tensors, which have shapes and no storage, and its forward pass is run on them to see what
autograd keeps. So a plan holds for any backbone, precision and micro-batch, a plugin's too, and takes a second where the model would take a
node. What it leaves out is said with it: the allocator's own rounding, the framework (about 0.5 GiB on a CPU) and communication buffers.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from heads_lightning.batch import IGNORE, Attention, Batch, Examples
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.head import LMHeadConfig, LMLossImplementation
from heads_lightning.experiment import build_head
from heads_lightning.losses.memory import loss_memory_bytes
from heads_lightning.training.optimizers import build_optimizer, parameter_kinds

PRECISION_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


class Memory(NamedTuple):
    """Bytes on one device at the fullest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the backbone's forward pass keeps for the backward pass of one micro-batch."""
    loss: int
    """Peak of the loss beyond hidden states and weight, and their gradients."""

    @property
    def total(self) -> int:
        """The loss is over before the gradients of the backbone exist, unless those of an earlier micro-batch are held."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


class Plan(NamedTuple):
    """The costs of a run."""

    parameters: dict[str, int]
    """Learned numbers by part; a tied projection is counted with the embedding."""
    flops_per_token: float
    """Of forward and backward, attention as if every position saw the whole sequence."""
    memory: Memory
    tokens_per_step: int
    steps: int
    passes: float
    """Over the training data."""

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.tokens_per_step * self.steps

    def seconds(self, flops_per_second: float) -> float:
        """At this rate: a device's peak, times the devices, times the utilisation (MFU) that is hoped for."""
        return self.flops / flops_per_second


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
    backbone, head = _meta_model(config, vocab_size, precision)
    tokens = trainer.global_batch_size * length
    steps = trainer.steps(length)
    flops = config.backbone.num_flops_per_token(length) + _head_flops(head, length, share)
    memory = _memory(config, backbone, head, vocab_size=vocab_size, sample=sample, attention=attention, precision=precision, share=share)
    return Plan(_parameters(backbone, head), flops, memory, tokens, steps, steps * tokens / max(training_tokens, 1))


def _meta_model(config: ExperimentConfig, vocab_size: int, precision: str) -> tuple[Any, Any]:
    backbone = config.backbone.build(vocab_size=vocab_size, init_device="meta")
    head = build_head(config, backbone, vocab_size, init_device="meta")
    if precision.endswith("-true") and precision in PRECISION_DTYPES:
        backbone, head = backbone.to(PRECISION_DTYPES[precision]), head.to(PRECISION_DTYPES[precision])
    return backbone, head


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


def _memory(
    config: ExperimentConfig,
    backbone: Any,
    head: Any,
    *,
    vocab_size: int,
    sample: Examples,
    attention: Attention,
    precision: str,
    share: float,
) -> Memory:
    weights = sum(_bytes(p) for p in {id(p): p for p in (*backbone.parameters(), *head.parameters())}.values())
    rows = min(config.trainer.micro_batch_size, config.trainer.global_batch_size // config.trainer.data_ranks)
    dtype = PRECISION_DTYPES.get(precision, torch.float32)
    loss = 0
    if isinstance(config.head, LMHeadConfig):
        chosen = config.head.loss_implementation
        known = (LMLossImplementation.default, LMLossImplementation.chunked, LMLossImplementation.auto)
        loss = loss_memory_bytes(
            chosen if chosen in known else LMLossImplementation.chunked,  # the fused ones hold about as much as chunked
            targets=max(1, round(share * rows * sample.tokens_BS.shape[1])),
            d_model=backbone.d_model,
            vocab_size=vocab_size,
            dtype=dtype,
        )
    kept = activation_bytes(backbone, _batch(sample, rows, attention), None if precision.endswith("-true") else dtype)
    return Memory(weights, weights, _optimizer_bytes(config, backbone, head), kept, loss)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _optimizer_bytes(config: ExperimentConfig, backbone: Any, head: Any) -> int:
    """State after the first step: two moments for AdamW's parameters, one for Muon's, in the type of the parameter."""
    optimizer = build_optimizer(config.optimizer, backbone, head)
    parts = getattr(optimizer, "parts", [optimizer])
    of = {id(p): _bytes(p) for kind in parameter_kinds(backbone, head).values() for p in kind}
    moments = {torch.optim.Muon: 1, torch.optim.SGD: 1}
    return sum(
        moments.get(type(part), 2) * sum(of[id(p)] for group in part.param_groups for p in group["params"]) for part in parts
    )  # fmt: skip


def _batch(sample: Examples, rows: int, attention: Attention) -> Batch:
    """`rows` rows like those of the sample, repeated where it has fewer."""
    repeated = {name: array[np.arange(rows) % len(array)] for name, array in sample._asdict().items() if array is not None}
    return Batch.from_examples(sample._replace(**repeated), attention)


def activation_bytes(backbone: Any, batch: Batch, autocast: torch.dtype | None) -> int:
    """Bytes that the backward pass of `backbone` on `batch` needs from its forward pass, weights not counted (casts of them are).

    Args:
        backbone: on meta.
        batch: on the CPU; its values do not matter, its shapes do.
        autocast: the type of matrix products under autocast; None: no autocast.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        weights: dict[str, Tensor] = {name: nn.Parameter(torch.empty_like(p, device="cpu")) for name, p in backbone.named_parameters()}
        weights |= {name: torch.empty_like(b, device="cpu") for name, b in backbone.named_buffers()}
        faked = batch._replace(**{name: fake.from_tensor(value) for name, value in batch._asdict().items() if isinstance(value, Tensor)})
        own = {_storage(weight) for weight in weights.values()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in own:
                kept[_storage(tensor)] = tensor
            return tensor

        mixed = autocast is not None and autocast != torch.float32
        cast = torch.autocast("cpu", autocast) if mixed else nullcontext()
        with cast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = torch.func.functional_call(backbone, weights, (faked,))
        kept.setdefault(_storage(hidden), hidden)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
