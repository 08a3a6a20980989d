"""What is measured after training, and by `heads-lightning evaluate`."""

from dataclasses import dataclass


@dataclass
class EvaluationConfig:
    """The fixed held-out protocol: the same text, lines and masks for every model."""

    enabled: bool = True
    """Evaluate at the end of training."""
    text_tokens: int = 50_000
    """Held-out tokens scored left to right."""
    infill_lines: int = 100
    """Held-out lines hidden one at a time: scored, and infilled greedily."""
    random_spans: int = 100
    """Random stretches of 1 to 60 characters hidden one at a time: scored, and infilled greedily."""
    prefix_characters: int = 1500
    """Characters shown before a hidden line."""
    suffix_characters: int = 700
    """Characters shown after it."""
    max_new_tokens: int = 40
    """Longest infill of a line."""
    samples: int = 3
    """Infilled examples to print."""
