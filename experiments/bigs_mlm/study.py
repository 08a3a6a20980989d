"""Masked language modelling with BiGS and with a transformer of equal size, on the default corpus; results.json.

    python experiments/bigs_mlm/study.py [--run-root runs] [OVERRIDE …]

Runs that lie finished in the run root are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARED = [
    "backbone.d_model=128", "data.sequence_length=128", "tokenizer.vocab_size=4096", "trainer.max_steps=300",
    "trainer.global_batch_size=16", "trainer.micro_batch_size=16", "trainer.val_every_steps=100", "trainer.checkpoint_every_steps=300",
    "tracking=none", "evaluation.enabled=false", "trainer.accelerator=cpu",
]  # fmt: skip
RECIPES = {"mlm": [], "bigs_mlm": ["backbone.inner_dim=384"]}
"""Recipe, and what makes its blocks as large as the other's: 4·128² + 3·128·384 weights in each."""


def held_out(folder: Path) -> dict[int, float]:
    """Held-out loss by step of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: round(row["values"]["val/loss"], 4) for row in rows if "val/loss" in row["values"] and row["tokens"] is not None}


def finished(root: Path, recipe: str) -> Path | None:
    """The newest finished run of a recipe."""
    found = sorted(root.glob(f"{recipe}/*/summary.txt"))
    return found[-1].parent if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-root", default="runs/bigs_mlm")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    root, losses = Path(given.run_root), {}
    for recipe, own in RECIPES.items():
        if finished(root, recipe) is None:
            line = [sys.executable, "-m", "heads_lightning", "train", f"experiment={recipe}", *SHARED, *own, f"run_root={root}"]
            subprocess.run([*line, *given.overrides], check=True)
        folder = finished(root, recipe)
        assert folder is not None
        losses[recipe] = held_out(folder)
    last = {recipe: list(found.values())[-1] for recipe, found in losses.items()}
    result = {"held_out_loss_by_step": losses, "bigs_over_transformer": round(last["bigs_mlm"] / last["mlm"], 4)}
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
