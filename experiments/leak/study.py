"""Train left-to-right on pure noise, with and without a leak; results/losses.json and leak.png.

python experiments/leak/study.py [--steps 400] [--seeds 2]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.layers import CausalForm, Direction
from heads_lightning.configs.transformer import NGPTConfig, TransformerConfig
from heads_lightning.testing.backbones import enlarged
from heads_lightning.testing.leaks import VOCABULARY, final_loss, independent_token_losses, perturbation_influence

HERE = Path(__file__).parent
SMALL: dict[str, Any] = {"d_model": 32, "num_layers": 2}


def causal(form: CausalForm) -> BackboneConfig:
    return BiGSBackboneConfig(**SMALL, direction=Direction.causal, causal_form=form)


MODELS: dict[str, tuple[BackboneConfig, Attention]] = {
    "BiGS, both directions, next-token labels": (BiGSBackboneConfig(**SMALL), Attention.bidirectional),
    "transformer, no causal mask": (TransformerConfig(**SMALL), Attention.bidirectional),
    "BiGS causal, dual": (causal(CausalForm.dual), Attention.causal),
    "BiGS causal, gate": (causal(CausalForm.gate), Attention.causal),
    "BiGS causal, single": (causal(CausalForm.single), Attention.causal),
    "transformer": (TransformerConfig(**SMALL), Attention.causal),
    "nGPT": (NGPTConfig(**SMALL), Attention.causal),
}
"""The first is the recipe of the blog post: the bidirectional model with shifted labels."""


def power() -> dict[str, float]:
    """How strongly a later token moves earlier hidden states of a leaking BiGS in fp64, by the size of its weights."""
    config, found = BiGSBackboneConfig(**SMALL, final_norm=False), {}
    for std in (0.02, 0.05, 0.2):
        model = enlarged(config, gain=std / config.init_std)
        found[str(std)] = perturbation_influence(model, Attention.bidirectional).future
    return found


def draw(losses: dict[str, list[list[float]]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, runs in losses.items():
        mean = torch.tensor(runs).mean(0)
        smooth = torch.nn.functional.avg_pool1d(mean[None, None], 9, stride=1).flatten()
        axes.plot(smooth, label=name, linewidth=2.2 if name.startswith("BiGS, both") else 1.2)
    axes.axhline(math.log(VOCABULARY), color="black", linestyle=":", label=f"ln {VOCABULARY}: the best that is possible")
    axes.set(xlabel="step (fresh uniform random tokens each)", ylabel="loss, nats a token", ylim=(0, 4.6))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "leak.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    losses = {
        name: [independent_token_losses(config, attention, steps=given.steps, seed=seed) for seed in range(given.seeds)]
        for name, (config, attention) in MODELS.items()
    }
    summary = {name: [round(final_loss(run), 4) for run in runs] for name, runs in losses.items()}
    rounded = {name: [[round(x, 4) for x in run] for run in runs] for name, runs in losses.items()}
    found = {"ln_vocabulary": math.log(VOCABULARY), "final_loss": summary, "perturbation_by_weight_std": power(), "losses": rounded}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "losses.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(losses)
    print(json.dumps({key: value for key, value in found.items() if key != "losses"}, indent=1))


if __name__ == "__main__":
    main()
