"""Infill: fill the hole between two texts with a trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence

from heads_lightning.commands import asking
from heads_lightning.commands.arguments import read
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.registry import ConfigError

HOLE = "<FILL>"
"""Marks the hole in a text on standard input."""

Arguments = InfillRequest
"""What the command takes."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning infill checkpoint=RUN (prefix_file=A suffix_file=B | -- PREFIX SUFFIX | < TEXT_WITH_<FILL>)`."""
    request, texts = read(InfillRequest, arguments)
    prefix, suffix = _parts(request, texts)
    from heads_lightning.evaluation.scoring import infill

    model = asking.load_model(request)
    middle = infill(model, prefix, suffix, request)
    print(json.dumps({"prefix": prefix, "middle": middle, "suffix": suffix}) if request.json else middle)


def _parts(request: InfillRequest, texts: list[str]) -> tuple[str, str]:
    if request.prefix_file is not None or request.suffix_file is not None:
        prefix = asking.read_text(request.prefix_file, "prefix_file") if request.prefix_file else ""
        return prefix, asking.read_text(request.suffix_file, "suffix_file") if request.suffix_file else ""
    if texts:
        if len(texts) > 2:
            raise ConfigError(f"{len(texts)} texts after --; give two: -- PREFIX SUFFIX (quote them)")
        return texts[0], texts[1] if len(texts) == 2 else ""
    text = asking.read_standard_input(f"prefix_file= and suffix_file=, -- PREFIX SUFFIX, or a text with one {HOLE} on standard input")
    if text.count(HOLE) != 1:
        raise ConfigError(f"the text on standard input holds {text.count(HOLE)} {HOLE}; it must hold one, where the hole is")
    prefix, suffix = text.split(HOLE)
    return prefix, suffix
