"""The parts of an experiment checked together, and against this machine, before anything is allocated.

A dataclass checks its own fields; what needs two parts is checked here. Each refusal is one sentence with an override that works.
Not refused: `micro_batch_size` above a device's share of the batch (the share is used), and a normalized head on a plain backbone
(its rows are renormalised after each step; nGPT's claims hold for `backbone=ngpt` alone).
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from heads_lightning.configs.backbone import BackboneConfig, backbones
from heads_lightning.configs.base import DType
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.head import LMLossImplementation, heads
from heads_lightning.configs.objective import objectives
from heads_lightning.configs.t5 import OUTPUTS, STYLES, T5Config, T5LMHeadConfig, T5Position
from heads_lightning.configs.value import ValueConfig, ValueHeadConfig
from heads_lightning.registry import ConfigError

MOST_NAMED = 4
"""Options that a refusal names."""
FIM_LEAST = 8
"""Positions that fill-in-the-middle needs: four markers and a token or two of each part."""


def validate(config: ExperimentConfig) -> None:
    """Refuse (ConfigError) the first combination that cannot work."""
    for problem in problems(config):
        raise ConfigError(problem)


def problems(config: ExperimentConfig) -> Iterator[str]:
    """What of this experiment cannot work together, one sentence each."""
    yield from _attention(config)
    yield from _prediction(config)
    yield from _steps_ahead(config)
    yield from _values(config)
    yield from _tied(config)
    yield from _vocabulary(config)
    yield from _lengths(config)
    yield from _presets(config)
    yield from _tensor(config)
    yield from _run(config)


def _attention(config: ExperimentConfig) -> Iterator[str]:
    wanted, supported = config.objective.attention, config.backbone.attention_supported()
    if wanted not in supported:
        able = [
            " with ".join(filter(None, (f"backbone={name}", _overrides(cls.fields_for(wanted)))))
            for name, cls in backbones.items()
            if wanted in cls.supports and not cls.builds_another
        ]
        if here := config.backbone.fields_for(wanted):
            able = [_overrides(here)]
        fitting = [f"objective={name}" for name, cls in objectives.items() if ({cls.attention} | cls.other_attention) & supported]
        yield (
            f"objective={config.objective.name} needs {wanted} attention, which backbone={config.backbone.name} does not give "
            f"(it gives {', '.join(sorted(supported)) or 'none'}); use {_either(able)}, or {_either(fitting)}"
        )


def _overrides(fields: dict[str, Any]) -> str:
    return " ".join(f"backbone.{field}={value}" for field, value in fields.items())


def _prediction(config: ExperimentConfig) -> Iterator[str]:
    wanted, scored = config.objective.predicts, config.head.predicts
    if wanted != scored:
        able = [f"head={name}" for name, cls in heads.items() if cls.predicts == wanted]
        fitting = [f"objective={name}" for name, cls in objectives.items() if cls.predicts == scored]
        yield (
            f"objective={config.objective.name} predicts a {wanted}, but head={config.head.name} scores a {scored}; "
            f"use {_either(able)}, or {_either(fitting)}"
        )


def _steps_ahead(config: ExperimentConfig) -> Iterator[str]:
    wanted, given = getattr(config.objective, "steps_ahead", 0), getattr(config.head, "steps_ahead", 0)
    if wanted and not hasattr(config.head, "steps_ahead"):
        yield (
            f"objective={config.objective.name} predicts several steps, head={config.head.name} one; "
            f"use head=default head.steps_ahead={wanted}"
        )
    elif wanted != given:
        yield (
            f"objective={config.objective.name} predicts {wanted} steps beyond the next token, the head {given}; "
            f"use head.steps_ahead={wanted}"
        )


def _values(config: ExperimentConfig) -> Iterator[str]:
    objective, head = config.objective, config.head
    if not isinstance(objective, ValueConfig):
        return
    if not config.data.has_records and objective.needs_records:
        yield (
            f"{objective.needs_records} needs numbers that data={config.data.name} does not hold: use data=jsonl or data=parquet, whose "
            f"records have them, or objective.target=outcome objective.loss=mse"
        )
    if isinstance(head, ValueHeadConfig) and head.lm_weight and (objective.pairwise or objective.bidirectional):
        kind = "objective.loss=bradley_terry" if objective.pairwise else "objective.bidirectional=true"
        yield f"head.lm_weight={head.lm_weight} predicts the next token, which has no meaning with {kind}; use head.lm_weight=0"


def _either(names: list[str]) -> str:
    shown = [*names[:MOST_NAMED], *([f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else [])]
    return " or ".join(shown) or "another part (none of those installed fits)"


def _tied(config: ExperimentConfig) -> Iterator[str]:
    tied, dtype = config.head.is_tied, getattr(config.head, "dtype", DType.float32)
    if tied and dtype != DType.float32:
        yield f"head.tie_embeddings=true shares the backbone's float32 embedding, so head.dtype={dtype} cannot hold; use head.dtype=float32"


def _vocabulary(config: ExperimentConfig) -> Iterator[str]:
    if "sentinels" in config.objective.special_tokens and config.tokenizer.num_sentinels < 1:
        yield f"objective={config.objective.name} needs sentinel tokens; use e.g. tokenizer.num_sentinels=100"
    modes = getattr(config.objective, "num_modes", 0)
    if modes > config.tokenizer.num_sentinels:
        yield (
            f"objective={config.objective.name} wants {modes} mode tokens, which are made of sentinels, "
            f"and there are {config.tokenizer.num_sentinels}; use tokenizer.num_sentinels={modes} or more"
        )
    if config.data.tokenized and config.tokenizer.trained:
        yield (
            f"data={config.data.name} is token ids already, and tokenizer={config.tokenizer.name} would be trained on text; "
            f"use the tokenizer that made them: tokenizer=huggingface tokenizer.path=FOLDER"
        )


def _lengths(config: ExperimentConfig) -> Iterator[str]:
    length, backbone = config.data.length_start or config.data.sequence_length, config.backbone.described()
    if config.objective.name == "fim" and length < FIM_LEAST:
        yield (
            f"data.{'length_start' if config.data.length_start else 'sequence_length'}={length} is too short for objective=fim: its four "
            f"markers and three parts need {FIM_LEAST} positions or more"
        )
    length = config.data.sequence_length
    positions = getattr(backbone, "max_positions", None)
    learned, other = getattr(backbone, "position", None) == "learned", f"backbone.position={backbone.boundless_position}"
    if isinstance(backbone, T5Config):
        learned, other = backbone.style.position_embedding_type == T5Position.learned_absolute, "backbone.position_embedding_type=relative"
    if learned and positions is not None and positions < length:
        yield (
            f"data.sequence_length={length} is longer than backbone.max_positions={positions} learned positions; "
            f"set backbone.max_positions={length} or {other}"
        )


def _presets(config: ExperimentConfig) -> Iterator[str]:
    backbone, head = config.backbone, config.head
    if not (isinstance(backbone, T5Config) and isinstance(head, T5LMHeadConfig)):
        return
    if STYLES[backbone.preset] != STYLES[head.preset] or OUTPUTS[backbone.preset] != OUTPUTS[head.preset]:
        yield (
            f"backbone.preset={backbone.preset} and head.preset={head.preset} are of different models; set head.preset={backbone.preset} "
            f"(each choice of a preset is also a field of its own)"
        )


def _tensor(config: ExperimentConfig) -> Iterator[str]:
    """What devices that compute a sequence together share out must be shared out evenly."""
    trainer, backbone, head = config.trainer, config.backbone, config.head
    ranks, layout = trainer.tensor_ranks, f"trainer.parallel={trainer.parallel}"
    if ranks == 1:
        return
    if trainer.compile:
        # the backward pass of a compiled block hands plain tensors to DTensor's (torch 2.13): "'Tensor' object has no attribute"
        yield f"trainer.compile=true does not go with {layout}; use trainer.compile=false or trainer.parallel=fsdp"
    sizes = backbone.tensor_sizes()
    if not sizes:
        able = [name for name, cls in backbones.items() if cls.tensor_sizes is not BackboneConfig.tensor_sizes]
        yield f"{layout} shards the matrices of backbone={' or '.join(able)}, not of backbone={backbone.name}; use trainer.parallel=fsdp"
    if isinstance(head, ValueHeadConfig):
        yield f"{layout} shards a head over the vocabulary, which head=value does not have; use trainer.parallel=fsdp"
    if problem := backbone.tensor_problem():
        yield f"{layout}: {problem}, or trainer.parallel=fsdp"
    shared = {f"backbone.{field}": size for field, size in sizes.items()}
    if backbone.shares_positions:
        shared |= {"data.sequence_length": config.data.sequence_length, "data.length_start": config.data.length_start or ranks}
    for field, size in shared.items():
        if size % ranks:
            yield f"{field}={size} cannot be shared evenly by the {ranks} devices of {layout}; use a multiple of {ranks}"


def _run(config: ExperimentConfig) -> Iterator[str]:
    if not config.name or config.name != config.name.strip(". ") or any(c in config.name for c in '/\\:*?"<>|\n'):
        yield f"name={config.name!r} cannot name a folder; use letters, digits, - and _, e.g. name=first-try"
    if not config.run_root.strip():
        yield "run_root is empty; name a folder, e.g. run_root=runs"
    if config.seed < 0:
        yield f"seed={config.seed} is negative; use 0 or more"
    if config.seed >= 1 << 32:
        yield f"seed={config.seed} is out of range; use 0 to {(1 << 32) - 1}"
    for field in fields(config.evaluation):
        value = getattr(config.evaluation, field.name)
        if isinstance(value, int) and value < 0:
            yield f"evaluation.{field.name}={value} is negative; use 0 or more"
    profile, steps = config.trainer.profile_step, config.trainer.max_steps
    if profile is not None and steps is not None and profile > steps:
        yield f"trainer.profile_step={profile} is after the last step; use 1 to trainer.max_steps={steps}"


# ---------------------------------------------------------------------------------------------------------- this machine


def machine_problems(config: ExperimentConfig) -> list[str]:
    """What of this experiment cannot run on this machine, one sentence each; empty when all is well."""
    return list(_machine(config, gpus=available_gpus()))


def _machine(config: ExperimentConfig, *, gpus: int) -> Iterator[str]:
    trainer = config.trainer
    root = getattr(config.data, "root", None)
    if root is not None and not Path(root).expanduser().is_dir():
        yield f"data.root={root} is not a folder; data={config.data.name} needs data.root=FOLDER"
    on_gpu = trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and gpus > 0)
    if getattr(config.head, "loss_implementation", None) == LMLossImplementation.fused_linear and not (on_gpu and gpus):
        reason = "none is found" if not gpus else f"trainer.accelerator={trainer.accelerator} does not use it"
        yield f"head.loss_implementation=fused_linear needs a GPU and {reason}; use head.loss_implementation=chunked or auto"
    if trainer.accelerator == "gpu" and not gpus:
        yield "trainer.accelerator=gpu, but no GPU is found; use trainer.accelerator=auto or cpu"
    if trainer.accelerator == "mps" and not (platform.system() == "Darwin" and platform.machine() == "arm64"):
        yield "trainer.accelerator=mps needs a Mac with Apple silicon; use trainer.accelerator=auto or cpu"
    if on_gpu and 0 < gpus < trainer.devices:
        yield f"trainer.devices={trainer.devices}, but {gpus} GPU{'s are' if gpus > 1 else ' is'} found; use trainer.devices={gpus}"
    if trainer.precision == "16-mixed" and not (on_gpu and gpus):
        yield "trainer.precision=16-mixed needs a GPU; use trainer.precision=bf16-mixed or 32-true"


def available_gpus() -> int:
    """GPUs that this process may use, found without torch: a driver that loads, and the devices it shows."""
    if not any(_loads(library) for library in ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so")):
        return 0
    visible = next((os.environ[v] for v in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if v in os.environ), None)
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    nvidia = len(list(Path("/dev").glob("nvidia[0-9]*")))
    amd = len(list(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/mem_banks/0")))
    return nvidia or amd or int(Path("/dev/dxg").exists() or os.name == "nt")


def _loads(library: str) -> bool:
    import ctypes

    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
