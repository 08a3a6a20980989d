"""Convert: checkpoints to and from Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence

from heads_lightning.commands.arguments import read
from heads_lightning.configs.requests import ConvertRequest

Arguments = ConvertRequest
"""What the command takes."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning convert from=RUN_OR_FOLDER to=huggingface|native out=FOLDER`."""
    request, _ = read(ConvertRequest, arguments)
    from heads_lightning.conversion.convert import convert, summary

    print(summary(convert(request), request.out))
