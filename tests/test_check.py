"""`heads-lightning check`: it passes what is sound, and each probe notices what it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heads_lightning.batch import IGNORE, PADDING, Batch
from heads_lightning.commands import check as command
from heads_lightning.composition import compose
from heads_lightning.configs.devices import peak_tflops
from heads_lightning.configs.requests import PlanRequest
from heads_lightning.data.stream import rows_of
from heads_lightning.experiment import build_model
from heads_lightning.heads.default import DefaultLMHead
from heads_lightning.memory_plan import Memory
from heads_lightning.planning import plan
from heads_lightning.preflight import Probes, Row, preflight, toy
from heads_lightning.registry import ConfigError

SMALL = ["data=files", "data.include=[*.py]", "backbone=tiny", "data.sequence_length=64", "tokenizer=byte", "trainer.global_batch_size=8"]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small experiment on this project's own source, its data prepared once."""
    folder = tmp_path_factory.mktemp("check")
    root = Path(__file__).resolve().parents[1] / "heads_lightning" / "losses"
    return [*SMALL, f"data.root={root}", f"data.cache_dir={folder}", "trainer.precision=32-true"]


def probes(overrides: list[str], *more: str) -> Probes:
    """Those of a composed experiment."""
    return Probes(compose([*overrides, *more]), lambda line: None)


@pytest.mark.parametrize("more", [[], ["objective=mlm", "head=mlm"], ["objective=prefix_lm"]], ids=["fim", "mlm", "prefix"])
def test_a_sound_experiment_passes(overrides: list[str], more: list[str]) -> None:
    rows = list(preflight(compose([*overrides, *more])))
    assert [row.verdict for row in rows] == ["ok"] * 11, [row for row in rows if row.verdict != "ok"]


def failing(probe: Callable[[], str], match: str) -> None:
    """The probe must notice."""
    with pytest.raises((AssertionError, ConfigError), match=match):
        probe()


def test_labels_that_are_not_shifted_are_noticed(overrides: list[str]) -> None:
    found = probes(overrides, "objective=causal")
    found.examples = found.examples._replace(labels_BS=found.examples.tokens_BS.copy())
    failing(found.labels, "the token that follows")


def test_masked_targets_in_plain_sight_are_noticed(overrides: list[str]) -> None:
    found = probes(overrides, "objective=mlm", "head=mlm", "objective.mask_share=0.1", "objective.random_share=0.0")
    failing(found.labels, "in plain sight")


def test_a_batch_without_targets_is_noticed(overrides: list[str]) -> None:
    found = probes(overrides)
    found.examples = found.examples._replace(labels_BS=found.examples.labels_BS * 0 + IGNORE)
    failing(found.data, "no position of the first batch has a target")


def test_an_id_outside_the_vocabulary_is_noticed(overrides: list[str]) -> None:
    found = probes(overrides)
    found.examples.tokens_BS[0, 3] = 100_000
    failing(found.vocabulary, "id 100000 is outside")


def test_a_first_loss_far_from_guessing_is_noticed(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def large(self: DefaultLMHead, generator: torch.Generator | None = None) -> None:
        torch.nn.init.normal_(self.w_out.weight, std=3.0, generator=generator)

    monkeypatch.setattr(DefaultLMHead, "reset_parameters", large)
    failing(probes(overrides, "head.bias=false").first_loss, "guessing is ln V")


def test_a_parameter_that_cannot_learn_is_noticed(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: DefaultLMHead, hidden: Tensor) -> Tensor:
        return hidden.detach()

    monkeypatch.setattr(DefaultLMHead, "prepare", cut)
    found = probes(overrides)
    failing(found.gradients, "no gradient reaches backbone.embedding")


def test_a_model_that_does_not_learn_is_noticed(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    failing(probes(overrides).one_batch, "was due")


def test_sight_and_packing_probe_the_backbone_of_the_config(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone that reads one position ahead, and across documents, fails both."""
    from heads_lightning.backbones.transformer import Transformer

    forward = Transformer.forward

    def ahead(self: Transformer, batch: Any, cache: Any = None) -> Tensor:
        return forward(self, batch, cache) + self.embedding(batch.tokens_BS).roll(-1, dims=1)

    monkeypatch.setattr(Transformer, "forward", ahead)
    found = probes(overrides)
    failing(found.sight, "leaks")
    failing(found.packing, "see each other")


def test_a_loss_implementation_that_gives_another_number_is_noticed(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth too much, in one implementation of several."""
    from heads_lightning.losses import chunked

    exact = chunked.linear_cross_entropy_sum

    def coarse(*arguments: Any, **options: Any) -> Any:
        loss = exact(*arguments, **options)
        return loss._replace(total=loss.total * 1.001)

    monkeypatch.setattr(chunked, "linear_cross_entropy_sum", coarse)
    failing(probes(overrides).head_and_loss, "relative error")


def test_padding_that_changes_something_is_noticed(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone whose hidden states grow with the padding of their row."""
    from heads_lightning.backbones.transformer import Transformer

    forward = Transformer.forward

    def stretched(self: Transformer, batch: Any, cache: Any = None) -> Tensor:
        padding = 0 if batch.segments_BS is None else int((batch.segments_BS == PADDING).sum())
        return forward(self, batch, cache) * (1 + 0.01 * padding)

    monkeypatch.setattr(Transformer, "forward", stretched)
    failing(probes(overrides).packing, "padded on the left: a segment against itself alone")


def test_after_data_that_cannot_be_built_nothing_is_tried(overrides: list[str], tmp_path: Path) -> None:
    rows = list(preflight(compose([*overrides, f"data.root={tmp_path}"])))
    assert [(row.name, row.verdict) for row in rows] == [("machine", "ok"), ("data", "failed")]


def test_the_plan_counts_what_is_built(overrides: list[str]) -> None:
    config = compose([*overrides, "head.tie_embeddings=true", "optimizer=adamw"])
    found = Probes(config, lambda line: None)
    made, module = found.cost(), found.experiment.module
    real = sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())
    assert toy(config.backbone) != config.backbone
    full = plan(
        replace(config, backbone=found.experiment.config.backbone),
        vocab_size=found.experiment.prepared.tokenizer.vocabulary.size,
        training_tokens=1000,
        sample=found.examples,
        attention=found.experiment.objective.attention,
        precision="32-true",
    )
    assert sum(full.parameters.values()) == real
    assert full.memory.weights == full.memory.gradients == 4 * real
    assert full.memory.optimizer == 2 * 4 * real
    assert made.tokens_per_step == 8 * 64


def test_the_time_of_the_plan_is_that_of_its_positions(overrides: list[str]) -> None:
    config = compose([*overrides, "trainer.devices=2", "trainer.max_steps=10", "trainer.batch_start=2", "trainer.batch_warmup_steps=4"])
    seen = Probes(config, lambda line: None, PlanRequest(mfu=0.5, device="h200")).plan()
    tokens = 64 * (2 + 2 + 4 + 4 + 6 * 8)
    assert (seen.numbers["tokens"], seen.numbers["steps"], seen.numbers["tokens_per_step"]) == (tokens, 10, 8 * 64)
    seconds = seen.numbers["flops_per_token"] * tokens / (989e12 * 0.5 * 2)
    assert seen.numbers["times"] == [{"device": "H200", "seconds": pytest.approx(seconds), "device_hours": pytest.approx(seconds / 1800)}]
    assert "512 positions a step (128 in the first), 10 steps" in seen.text
    assert "at an MFU of 50% on 2 device(s): H200" in seen.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device=h1000"], r"device=h1000 is not known\. Did you mean 'H100'\? Known: A40, .*; for another one give peak_tflops=N"),
        (["mfu=40"], r"mfu=40\.0 is out of range; it is a share of the peak, e\.g\. mfu=0\.4"),
        (["mfu=fast"], "`mfu=fast` is not allowed"),
        (["peak_tflops=0"], "peak_tflops=0.0 is out of range"),
        (["device=A100", "peak_tflops=300"], "say the same thing twice; leave one out"),
        (["mfu=0.4", "--config-only"], "mfu=0.4 is for the plan of one experiment, which --config-only does not make; leave it out"),
    ],
)
def test_a_mistake_in_what_the_plan_assumes_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.main(words)


def test_devices_are_known_by_the_longest_part_of_their_names() -> None:
    names = ["NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA L40S", "NVIDIA L4", "NVIDIA A100-SXM4-80GB", "NVIDIA GB200", "Something"]
    assert [peak_tflops(name) for name in names] == [989, 756, 362, 121, 312, 2500, None]
    others = ["NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    assert [peak_tflops(name) for name in others] == [None] * 3


def test_the_plan_of_activations_is_what_autograd_keeps(overrides: list[str]) -> None:
    """On real tensors: the storages that the backward pass holds, weights left out."""
    found = probes(overrides, "trainer.micro_batch_size=8")
    planned = found.cost().memory.activations
    backbone, _ = build_model(found.config, found.experiment.prepared.tokenizer.vocabulary.size)
    batch = Batch.from_examples(rows_of(found.examples, 0, 8), found.experiment.objective.attention)
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = backbone(batch)
    keep(hidden)
    held = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert planned == pytest.approx(held, rel=0.02)


def test_the_plan_follows_the_layout(overrides: list[str]) -> None:
    """Shares of two devices; what tensor parallelism leaves whole (norms) is small. Measured: experiments/benchmarks/memory_plan.py."""

    def of(*layout: str) -> Memory:
        fixed = ("trainer.micro_batch_size=4", "trainer.precision=32-true", "optimizer=adamw")
        return probes(overrides, *fixed, *layout).cost().memory

    whole = of()
    data, fsdp, tensor = (of("trainer.devices=2", f"trainer.parallel={name}") for name in ("data", "fsdp", "tensor"))
    assert data == whole
    assert fsdp.weights == whole.weights // 2
    assert fsdp.optimizer == whole.optimizer // 2
    assert fsdp.activations == whole.activations
    assert fsdp.gathered > whole.weights
    assert whole.weights / 2 < tensor.weights < 0.52 * whole.weights
    assert 0.4 < tensor.activations / whole.activations < 0.8
    rounded = of("trainer.devices=2", "trainer.parallel=fsdp", "trainer.gather_dtype=bfloat16")
    assert (rounded.weights, rounded.optimizer, rounded.gathered) == (fsdp.weights, fsdp.optimizer, fsdp.gathered // 2)
    assert rounded.activations < 0.7 * fsdp.activations  # the residual stream is bfloat16 too
    coarse = of("trainer.devices=2", "trainer.parallel=fsdp", "trainer.gather_dtype=bfloat16", "trainer.precision=bf16-true")
    assert (coarse.weights, coarse.gathered) == (fsdp.weights // 2, rounded.gathered)  # gathered as they are kept
    assert of("trainer.devices=2", "trainer.gather_dtype=bfloat16") == whole  # nothing is gathered
    offloaded = of("trainer.devices=2", "trainer.parallel=fsdp", "trainer.offload=true")
    assert offloaded.host == 2 * fsdp.weights + fsdp.optimizer
    assert offloaded.total == offloaded.gathered + offloaded.activations + offloaded.loss


def test_the_plan_of_recomputation_is_its_blocks_inputs_and_one_block(overrides: list[str]) -> None:
    plain, every, second = (probes(overrides, f"trainer.recompute_every={n}").cost() for n in (0, 1, 2))
    assert every.memory.activations < second.memory.activations < plain.memory.activations
    assert plain.memory.recomputed == 0 < every.memory.recomputed < plain.memory.activations
    assert plain.flops == every.flops
    assert every.seconds(1.0) > second.seconds(1.0) > plain.seconds(1.0) == plain.flops


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_what_failed_and_exits_with_1(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*overrides, f"data.root={tmp_path}", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["failed"] == ["data"]
    assert Row(**said["rows"][0]).verdict == "ok"


def test_every_shipped_recipe_composes_without_torch() -> None:
    code = (
        "import sys; from heads_lightning.commands import check; rc = check.main(['--config-only']); "
        "print(rc, sorted({'torch', 'lightning', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    last = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert last == "0 []"


def test_a_broken_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /objective: mlm\n", encoding="utf-8")
    (folder / "typo.yaml").write_text("# @package _global_\ntrainer:\n  max_stepz: 3\n", encoding="utf-8")
    assert command.main(["--config-only", "--config-dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("failed")] == [line for line in lines if "=typo" in line]
    assert "max_stepz" in next(line for line in lines if "=typo" in line)


def test_recipes_are_named_by_their_folder_or_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\nseed: 2\n", encoding="utf-8")
    (folder / "typo.yaml").write_text("# @package _global_\ntrainer:\n  max_stepz: 3\n", encoding="utf-8")
    assert command.main(["--config-only", str(folder)]) == 1
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["ok", "experiment=mine"], ["failed", "experiment=typo"]]
    assert command.main(["--config-only", str(folder / "mine.yaml")]) == 0
    assert capsys.readouterr().out.split() == ["ok", "experiment=mine"]
    with pytest.raises(ConfigError, match="is not a folder of recipes: they lie in FOLDER"):
        command.main(["--config-only", str(tmp_path)])


def test_unknown_flags_are_refused() -> None:
    with pytest.raises(ConfigError, match="--jsn is not a flag of check"):
        command.main(["--jsn"])
