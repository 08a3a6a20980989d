"""What generate and infill share: where the text comes from, and the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from heads_lightning.configs.requests import SamplingRequest
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    from heads_lightning.experiment import TrainedModel


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
    from heads_lightning.experiment import load  # seconds, which a misspelt argument should not wait for

    return load(request.checkpoint, run_root=request.run_root, device=request.device)
