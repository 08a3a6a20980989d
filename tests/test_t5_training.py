"""T5 from the command line's overrides to a summary: training on spans, prefixes and UL2, resuming, infilling, evaluation, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heads_lightning.batch import Attention
from heads_lightning.commands import generate as generate_command
from heads_lightning.commands import infill as infill_command
from heads_lightning.composition import compose, from_yaml
from heads_lightning.configs.objective import Form, MixtureConfig
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.evaluation.protocol import HiddenLine
from heads_lightning.evaluation.scoring import infill
from heads_lightning.evaluation.span_filling import fills_spans, source
from heads_lightning.experiment import TrainedModel, load
from heads_lightning.registry import ConfigError
from heads_lightning.run import train
from heads_lightning.summary import report_text

T5 = ["backbone=t5", "head=t5"]
EVALUATED = ["evaluation.enabled=true", "evaluation.infill_lines=6", "evaluation.max_new_tokens=6"]


@pytest.fixture(scope="module")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of four steps of span corruption, with the evaluation."""
    folder = tmp_path_factory.mktemp("t5") / "run"
    overrides = [o for o in tiny if not o.startswith("evaluation.")]
    train(compose([*overrides, *T5, "objective=span_corruption", *EVALUATED]), folder)
    return folder


@pytest.fixture(scope="module")
def model(trained: Path) -> TrainedModel:
    return load(str(trained))


def test_training_ends_in_a_summary_with_the_scores_that_exist(trained: Path) -> None:
    report = json.loads((trained / "evaluation.json").read_text())
    assert 0 < report["infill_bits_per_byte"] < 20
    assert 0 < report["prefix_bits_per_byte"] < 20
    assert report["left_to_right_bits_per_byte"] is None
    summary = (trained / "summary.txt").read_text()
    for phrase in ("given prefix and suffix", "given the prefix alone", "line lookup", "model ▸", "infill checkpoint=", "not running text"):
        assert phrase in summary, phrase


def test_the_saved_config_says_which_form_ran(trained: Path) -> None:
    config = from_yaml(trained / "config.yaml")
    assert config.objective.attention == Attention.encoder_decoder
    assert getattr(config.objective, "form", None) == Form.encoder_decoder


def test_infill(trained: Path, model: TrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    infill_command.main([f"checkpoint={trained}", "max_new_tokens=5", "--", "def add(a, b):\n", "\n    return c\n"])
    shown = capsys.readouterr().out
    request = InfillRequest(checkpoint=str(trained), max_new_tokens=5)
    assert shown == infill(model, "def add(a, b):\n", "\n    return c\n", request) + "\n"
    with pytest.raises(ConfigError, match="layout=psm is of fill-in-the-middle"):
        infill(model, "a", "b", InfillRequest(checkpoint=str(trained), layout="psm"))


def test_a_question_is_laid_out_as_training_laid_out_examples(model: TrainedModel) -> None:
    vocabulary, encode = model.tokenizer.vocabulary, model.tokenizer.encode
    question = HiddenLine("import os\n", "\nx = 1", "\n\ny = 2", "", "", begins_document=True)
    ids = source(model, question, with_suffix=True)
    eod, first = [vocabulary.end_of_document], [vocabulary.sentinels[0]]
    assert np.array_equal(ids, [*eod, *encode("import os\n"), *first, *encode("\n\ny = 2"), *eod])
    alone = source(model, question, with_suffix=False)
    assert np.array_equal(alone, [*eod, *encode("import os\n"), *first, *eod])
    long = HiddenLine("a = 1\n" * 500, "", "b = 2\n" * 500, "", "", begins_document=False)
    assert len(source(model, long, with_suffix=True)) == model.config.data.sequence_length


def test_it_goes_on_exactly_where_it_stopped(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, *T5, "objective=span_corruption"]
    whole = train(compose(overrides), tmp_path / "whole")
    half = next((tmp_path / "whole" / "checkpoints").glob("*2.ckpt"))
    rest = train(compose([*overrides, f"resume={half}"]), tmp_path / "rest")
    assert rest.metrics["val/loss"] == whole.metrics["val/loss"]


@pytest.mark.parametrize("objective", ["prefix_lm", "ul2"])
def test_other_objectives_train_and_end_cleanly(
    tiny: list[str], tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [o for o in tiny if not o.startswith("evaluation.")]
    sizes = ["data.sequence_length=128", "trainer.max_steps=2", "trainer.val_every_steps=2"]
    result = train(compose([*overrides, *T5, f"objective={objective}", *EVALUATED, *sizes]), tmp_path / "run")
    assert result.metrics["val/loss"] > 0
    assert result.report is not None
    assert (result.report.infill_bits_per_byte is not None) == (objective == "ul2")
    assert "Traceback" not in report_text(result.report, [])
    request = [f"checkpoint={tmp_path / 'run'}", "max_new_tokens=5", "--", "import os"]
    capsys.readouterr()
    if objective == "prefix_lm":
        generate_command.main(request)
        assert capsys.readouterr().out.startswith("import os")
    else:
        with pytest.raises(ConfigError, match="cannot continue a text"):
            generate_command.main(request)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone=t5"], "objective=fim needs causal attention, which backbone=t5 does not give"),
        (["objective=span_corruption", "objective.form=encoder_decoder"], "use backbone=t5"),
        (["objective=span_corruption", "objective.encoder_end=false"], "needs an encoder"),
        ([*T5, "objective=span_corruption", "backbone.preset=t5_v1_0"], "set head.preset=t5_v1_0"),
        (
            [*T5, "objective=span_corruption", "backbone.position_embedding_type=learned_absolute", "data.sequence_length=600"],
            "backbone.max_positions=600 or backbone.position_embedding_type=relative",
        ),
        ([*T5, "objective=span_corruption", "backbone.seq_len_interpolation_factor=0.5"], "more than 1, or null"),
    ],
)
def test_what_cannot_work_is_refused_while_composing(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_the_form_follows_the_backbone_in_mixtures_too() -> None:
    parts: dict[str, Any] = {"a": {"name": "span_corruption"}, "b": {"name": "prefix_lm", "weight": 2}}
    config, plain = compose([*T5, "objective=span_corruption"]), compose(["objective=span_corruption"])
    assert replace(config, objective=MixtureConfig(parts=parts)).objective.attention == Attention.encoder_decoder
    assert replace(plain, objective=MixtureConfig(parts=parts)).objective.attention == Attention.prefix
    assert fills_spans(config.objective)
    assert fills_spans(plain.objective)
    assert not fills_spans(compose(["objective=prefix_lm"]).objective)
