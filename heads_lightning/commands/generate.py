"""Generate: continue a text with a trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence

from heads_lightning.commands import asking
from heads_lightning.commands.arguments import read
from heads_lightning.configs.requests import GenerateRequest

Arguments = GenerateRequest
"""What the command takes."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning generate checkpoint=RUN (prompt=TEXT | prompt_file=FILE | -- TEXT | < FILE)`."""
    request, texts = read(GenerateRequest, arguments)
    prompt = _prompt(request, texts)
    from heads_lightning.evaluation.continuation import continuation

    text = continuation(asking.load_model(request), prompt, request)
    print(json.dumps({"prompt": prompt, "continuation": text}) if request.json else prompt + text)


def _prompt(request: GenerateRequest, texts: list[str]) -> str:
    if request.prompt is not None:
        return request.prompt
    if request.prompt_file is not None:
        return asking.read_text(request.prompt_file, "prompt_file")
    if texts:
        return " ".join(texts)
    return asking.read_standard_input("prompt=TEXT, prompt_file=FILE, -- TEXT, or a text on standard input")
