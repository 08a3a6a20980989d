"""The capability table: what each loss implementation does itself and what `chunked` computes for it.

    python experiments/loss_implementations/capabilities.py            # writes capabilities.md, and the README's lines between its markers

Made from what the implementations declare (FEATURES); tests/test_losses.py asserts for each pair that the declaration is true: the feature
is computed without falling back exactly where it says so. Heads need no column: a head hands its projection over as data, so every head has
every feature with every implementation (tests/test_heads.py runs the matrix).
"""

from __future__ import annotations

from pathlib import Path

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


HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
START, END = "<!-- capabilities: python experiments/loss_implementations/capabilities.py -->", "<!-- /capabilities -->"
NAMES = [name.value for name in LMLossImplementation]


def table() -> str:
    """Every feature, as Markdown."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in NAMES) + " |", "|---|" + "---|" * len(NAMES)]
    lines.append("| runs on | " + " | ".join(RUNS_ON[name] for name in NAMES) + " |")
    for feature in Feature:
        cells = ["yes" if feature in loss_module(name).FEATURES else "by `chunked`" for name in NAMES]
        lines.append(f"| {feature.value.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compact() -> str:
    """One row per implementation, as Markdown: what it runs on, and what `chunked` computes in its place."""
    lines = ["| `head.loss_implementation=` | runs on | what it hands to `chunked`, and says so |", "| --- | --- | --- |"]
    for name in NAMES:
        missing = [feature.value.replace("_", " ") for feature in Feature if feature not in loss_module(name).FEATURES]
        lines.append(f"| `{name}` | {RUNS_ON[name]} | {', '.join(missing) or 'nothing'} |")
    return "\n".join(lines)


def readme_with(table: str) -> str:
    """The README with this between its markers."""
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    (HERE / "capabilities.md").write_text(table(), encoding="utf-8")
    README.write_text(readme_with(compact()), encoding="utf-8")
