"""What training says of itself beside the loss: spikes, the size of updates, a profile; and what a skipped step leaves in the means."""

from __future__ import annotations

import gzip
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from rich.console import Console
from test_training import points

from heads_lightning.batch import IGNORE, Examples
from heads_lightning.composition import compose
from heads_lightning.configs.batch_sizes import BatchSizes
from heads_lightning.configs.objective import CausalConfig
from heads_lightning.data.datamodule import without_targets
from heads_lightning.objectives.base import SampleRandom, Vocabulary
from heads_lightning.objectives.causal import Causal
from heads_lightning.registry import ConfigError
from heads_lightning.run import train
from heads_lightning.training.profiling import TABLE, TRACE
from heads_lightning.training.spikes import FILE, SpikeWatch, StepRecord


def watched(folder: Path, losses: list[float]) -> SpikeWatch:
    watch = SpikeWatch(folder, BatchSizes(8, 8, 0, 1), lambda message: None)
    watch.add([StepRecord(step, loss, 1.0 + loss) for step, loss in enumerate(losses, 1)])
    return watch


def falling(count: int) -> list[float]:
    """A loss that falls and wobbles."""
    return [3.0 + 3.0 * math.exp(-step / 50) + 0.05 * math.sin(1.7 * step) for step in range(count)]


def test_a_spike_is_found_with_what_it_read(tmp_path: Path) -> None:
    losses = falling(200)
    losses[149], losses[151] = 6.0, 5.5
    spikes = watched(tmp_path, losses).spikes
    assert [spike.step for spike in spikes] == [150]  # the third step after it is part of it
    assert (spikes[0].first_sequence, spikes[0].last_sequence) == (149 * 8, 150 * 8 - 1)
    assert spikes[0].loss == 6.0
    assert spikes[0].grad_norm == 7.0
    assert spikes[0].usual_grad_norm < 5
    assert json.loads((tmp_path / FILE).read_text())["step"] == 150
    assert "step 150: 6.000" in str(spikes[0])


def test_a_loss_that_falls_and_wobbles_is_no_spike(tmp_path: Path) -> None:
    assert watched(tmp_path, falling(400)).spikes == []


def test_a_run_reports_its_spike_in_metrics_and_summary(tiny: list[str], tmp_path: Path) -> None:
    """A head that is blown up after step 26 makes step 27 a spike. Points of 5 steps hide no step."""

    class BreakOnce(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx + 1 == 26:
                with torch.no_grad():
                    pl_module.head.w_out.weight.mul_(300.0)

    overrides = [*tiny, "objective=causal", "trainer.max_steps=30", "trainer.log_every_steps=5", "trainer.val_every_steps=30"]
    train(compose(overrides), tmp_path, callbacks=[BreakOnce()])
    spike = json.loads((tmp_path / FILE).read_text().splitlines()[0])
    assert spike["step"] == 27
    assert (spike["first_sequence"], spike["last_sequence"]) == (26 * 8, 27 * 8 - 1)
    assert [p["train/spikes"] for p in points(tmp_path) if "train/spikes" in p] == [0, 0, 0, 0, 0, 1]
    assert "loss spike at step 27" in (tmp_path / "summary.txt").read_text()


def test_the_update_ratio_is_the_change_over_the_weights(tiny: list[str], tmp_path: Path) -> None:
    """Of decay alone it is the rate times the decay."""
    fixed = ["optimizer=adamw", "optimizer.eps=1e9", "optimizer.weight_decay=0.5", "optimizer.learning_rate=0.1", "schedule=constant"]
    train(compose([*tiny, *fixed, "schedule.warmup_fraction=0"]), tmp_path)
    ratios = [p["train/update_ratio"] for p in points(tmp_path) if "train/update_ratio" in p]
    assert ratios == pytest.approx([0.05] * 4, rel=1e-3)


def test_the_profiler_records_the_steps_it_is_asked_for(tiny: list[str], tmp_path: Path) -> None:
    train(compose([*tiny, "trainer.profile_step=2"]), tmp_path)
    assert "aten::mm" in (tmp_path / TABLE).read_text() or "aten::addmm" in (tmp_path / TABLE).read_text()
    events = json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))["traceEvents"]
    updates = {event["name"] for event in events if "Optimizer.step" in event.get("name", "")}
    assert updates
    assert sum("Optimizer.step" in event.get("name", "") and event.get("ph") == "X" for event in events) >= 3


def test_a_skipped_step_has_no_part_in_the_means(tiny: list[str], tmp_path: Path) -> None:
    """Points of two steps. Of the first the second step, which alone is looked at by parts, is skipped; of the second both are."""

    class Poison(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.handle = pl_module.head.w_out.weight.register_hook(lambda grad: grad * (1.0 if batch_idx == 0 else float("nan")))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.handle.remove()

    logged = {}
    for name, callbacks in (("whole", []), ("skipped", [Poison()])):
        train(compose([*tiny, "objective=fim", "trainer.log_every_steps=2"]), tmp_path / name, callbacks=callbacks)
        logged[name] = [p for p in points(tmp_path / name) if "train/learning_rate" in p]
    assert [p["train/bad_steps"] for p in logged["skipped"]] == [1, 3]
    means = [[{k for k in p if k.startswith("train/loss")} | p.keys() & {"train/grad_norm"} for p in logged[name]] for name in logged]
    assert len(means[0][0]) > 2
    assert means == [[means[0][0]] * 2, [{"train/loss", "train/grad_norm"}, set()]]
    assert all(math.isfinite(logged["skipped"][0][name]) for name in means[1][0])
    assert [p["train/target_share"] for p in logged["skipped"]] == [p["train/target_share"] for p in logged["whole"]]


@dataclass
class NothingConfig(CausalConfig):
    """Reads text and predicts none of it."""

    def build(self, vocabulary: Vocabulary) -> Nothing:
        return Nothing(self, vocabulary)


class Nothing(Causal):
    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        return without_targets(super().examples(tokens_BR, rng, sequence_length))


def test_a_mean_over_no_target_is_not_logged_and_said_once(tiny: list[str], tmp_path: Path) -> None:
    written = io.StringIO()
    config = replace(compose([*tiny, "objective=causal", "trainer.val_every_steps=2"]), objective=NothingConfig())
    result = train(config, tmp_path / "run", console=Console(file=written, width=200))
    logged = {name for point in points(tmp_path / "run") for name in point} | result.metrics.keys()
    assert {name for name in logged if "loss" in name} == set()
    assert result.metrics["train/target_share"] == 0
    said = written.getvalue()
    assert said.count("none of the 8 held-out sequences has a target, so there is no val/loss") == 1
    assert said.count("steps 1 to 1 had nothing to predict") == said.count("had nothing to predict") == 1
    assert "loss" not in (tmp_path / "run" / "summary.txt").read_text()
    config = replace(config, trainer=replace(config.trainer, keep_best=1))
    with pytest.raises(ConfigError, match=r"none of the 8 held-out sequences.*no val/loss; .*or leave out trainer\.keep_best=1"):
        train(config, tmp_path / "best")
    assert points(tmp_path / "best") == []


def test_steps_without_a_target_are_not_the_usual_loss(tiny: list[str], tmp_path: Path) -> None:
    """Two in three: a median of 0 would make a spike of every other step."""

    class Hide(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx % 3:
                batch[:] = [b._replace(labels_BS=b.labels_BS.fill_(IGNORE), num_targets=0, step_targets=0) for b in batch]

    train(compose([*tiny, "objective=causal", "trainer.max_steps=30"]), tmp_path, callbacks=[Hide()])
    training = [p for p in points(tmp_path) if "train/target_share" in p]
    for name in ("train/loss", "train/target_share"):
        assert [p["step"] for p in training if p.get(name)] == [*range(1, 31, 3)]
    assert training[-1]["train/spikes"] == 0
