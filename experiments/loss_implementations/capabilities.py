"""The capability table: what each loss implementation does itself and what `chunked` computes for it.

    python experiments/loss_implementations/capabilities.py > experiments/loss_implementations/capabilities.md

Made from what the implementations declare (FEATURES); tests/test_losses.py asserts for each pair that the declaration is true: the feature
is computed without falling back exactly where it says so. Heads need no column: a head hands its projection over as data, so every head has
every feature with every implementation (tests/test_heads.py runs the matrix).
"""

from __future__ import annotations

from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.losses import Feature, loss_module

RUNS_ON = {
    "default": "anything",
    "chunked": "anything",
    "fused_linear": "GPU (Triton)",
    "cce": "GPU (Triton), optional package",
    "torch": "anything, torch ≥ 2.13",
    "auto": "anything",
}


def table() -> str:
    """Markdown."""
    names = [name.value for name in LMLossImplementation]
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + "---|" * len(names)]
    lines.append("| runs on | " + " | ".join(RUNS_ON[name] for name in names) + " |")
    for feature in Feature:
        cells = ["yes" if feature in loss_module(name).FEATURES else "by `chunked`" for name in names]
        lines.append(f"| {feature.value.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
