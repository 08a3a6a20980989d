"""Generate: continue a text with a trained model."""

from __future__ import annotations

from collections.abc import Sequence

from heads_lightning.commands.arguments import read
from heads_lightning.configs.requests import GenerateRequest
from heads_lightning.registry import ConfigError

Arguments = GenerateRequest
"""What the command takes."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning generate checkpoint=RUN (prompt=TEXT | prompt_file=FILE | -- TEXT | < FILE)`."""
    from heads_lightning.commands import asking

    request, texts = read(GenerateRequest, arguments)
    prompt = _prompt(request, texts)
    model = asking.load_model(request)
    from heads_lightning import masked
    from heads_lightning.abilities import can_read_left_to_right, opening
    from heads_lightning.span_filling import continues_text

    if masked.is_diffusion(model):
        new = {"new_tokens": request.max_new_tokens, "steps": request.steps, "temperature": request.temperature, "seed": request.seed}
        print(prompt + masked.fill(model, prompt, "", **new))
        return
    if not (can_read_left_to_right(model) or continues_text(model.config.objective)):
        raise ConfigError(f"{request.checkpoint} was trained with objective={model.config.objective.name} and cannot continue a text")
    ids = [opening(model), *model.tokenizer.encode(prompt)]
    out = asking.answer(model, [int(i) for i in ids], request, stop_ids=[model.tokenizer.vocabulary.end_of_document])
    print(prompt + model.tokenizer.decode(out))


def _prompt(request: GenerateRequest, texts: list[str]) -> str:
    from heads_lightning.commands import asking

    if request.prompt is not None:
        return request.prompt
    if request.prompt_file is not None:
        return asking.read_text(request.prompt_file, "prompt_file")
    if texts:
        return " ".join(texts)
    return asking.read_standard_input("prompt=TEXT, prompt_file=FILE, -- TEXT, or a text on standard input")
