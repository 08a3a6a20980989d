"""What generate and infill share: where the text comes from, and one call to the model."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from heads_lightning.batch import Attention
from heads_lightning.configs.requests import SamplingRequest
from heads_lightning.experiment import TrainedModel, load
from heads_lightning.generation import generate
from heads_lightning.registry import ConfigError


def read_text(path: str, field: str) -> str:
    """The text of a file; one line when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{field}={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}={path} is not UTF-8 text (byte {error.start}); convert it first") from None


def read_standard_input(what: str) -> str:
    """All of standard input; refused on a terminal, where nothing would ever come."""
    if sys.stdin.isatty():
        raise ConfigError(f"nothing to work on: give {what}")
    return sys.stdin.read()


def load_model(request: SamplingRequest) -> TrainedModel:
    """The model that the request names."""
    return load(request.checkpoint, run_root=request.run_root, device=request.device)


def answer(model: TrainedModel, prompt: list[int], request: SamplingRequest, *, stop_ids: list[int]) -> list[int]:
    """Ids that the model puts after the prompt."""
    if not prompt:
        prompt = [model.tokenizer.vocabulary.end_of_document]
    generator = torch.Generator(device=request.device).manual_seed(request.seed)
    encodes = model.config.objective.attention == Attention.encoder_decoder
    return generate(
        model.backbone,
        model.head,
        [prompt],
        max_new_tokens=request.max_new_tokens,
        stop_ids=stop_ids,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        generator=generator,
        attention=Attention.encoder_decoder if encodes else Attention.causal,
        decoder_prompts=[[model.tokenizer.vocabulary.padding]] if encodes else None,
    )[0]
