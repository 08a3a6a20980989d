"""What a trained model puts after a text: `heads-lightning generate`, and models in MLflow that cannot infill."""

from __future__ import annotations

import torch

from heads_lightning.batch import Attention
from heads_lightning.configs.objective import ObjectiveConfig
from heads_lightning.configs.requests import SamplingRequest
from heads_lightning.evaluation import masked
from heads_lightning.evaluation.abilities import check_length, opening, reads_left_to_right
from heads_lightning.evaluation.span_filling import continues_text
from heads_lightning.experiment import TrainedModel
from heads_lightning.generation import generate
from heads_lightning.registry import ConfigError


def can_continue(objective: ObjectiveConfig) -> bool:
    """True for what teaches a model to go on from a text."""
    return masked.writes_by_masks(objective) or reads_left_to_right(objective) or continues_text(objective)


def continuation(model: TrainedModel, prompt: str, request: SamplingRequest) -> str:
    """The text after `prompt`.

    Raises:
        ConfigError: the model was not trained to continue a text, or the answer is longer than its sequences.
    """
    objective, vocabulary = model.config.objective, model.tokenizer.vocabulary
    if not can_continue(objective):
        raise ConfigError(f"{request.checkpoint} was trained with objective={objective.name} and cannot continue a text")
    check_length(model, request.max_new_tokens)
    if masked.writes_by_masks(objective):
        new = {"new_tokens": request.max_new_tokens, "steps": request.steps, "temperature": request.temperature, "seed": request.seed}
        return masked.fill(model, prompt, "", **new)
    encodes = objective.attention == Attention.encoder_decoder
    out = generate(
        model.backbone,
        model.head,
        [[int(token) for token in (opening(model), *model.tokenizer.encode(prompt))]],
        max_new_tokens=request.max_new_tokens,
        stop_ids=[vocabulary.end_of_document],
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        generator=torch.Generator(device=request.device).manual_seed(request.seed),
        attention=Attention.encoder_decoder if encodes else Attention.causal,
        decoder_prompts=[[vocabulary.padding]] if encodes else None,
    )[0]
    return model.tokenizer.decode(out)
