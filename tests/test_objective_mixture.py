"""Mixtures: each row is what its part alone would make of it, weights hold, parts are reported apart, mistakes are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from objective_data import num_windows, vocabulary, windows

from heads_lightning.batch import Attention
from heads_lightning.composition import compose
from heads_lightning.configs.objective import CausalConfig, FIMConfig, FIMCut, MixtureConfig, PrefixLMConfig, UL2Config, objectives
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.registry import ConfigError
from heads_lightning.run import train


def make(objective, length, indices):
    raw = windows(objective, length, indices)
    return raw, objective.examples(raw, SampleRandom(0, 0, np.asarray(indices)), length)


def test_each_row_is_what_its_part_makes_of_it():
    v = vocabulary()
    config = MixtureConfig(
        parts={
            "a": {"name": "causal", "weight": 1},
            "b": {"name": "fim", "weight": 3, "rate": 1.0, "cut": "token"},
            "c": {"name": "prefix_lm"},
        }
    )
    mixture = config.build(v)
    assert mixture.parts == ("a", "b_left_to_right", "b_infill", "c")
    assert config.attention is mixture.attention is Attention.prefix
    count = 200
    raw, examples = make(mixture, 128, range(count))
    alone = [c.build(v) for c in (CausalConfig(), FIMConfig(rate=1.0, cut=FIMCut.token), PrefixLMConfig())]
    for b in range(count):
        part = int(examples.part_BS[b].max())
        objective = alone[[0, 1, 1, 2][part]]
        own = objective.examples(raw[b : b + 1, : objective.window(128).length], SampleRandom(0, 0, np.array([b])), 128)
        assert np.array_equal(own.tokens_BS[0], examples.tokens_BS[b])
        assert np.array_equal(own.labels_BS[0], examples.labels_BS[b])
        assert np.array_equal(own.segments_BS[0], examples.segments_BS[b])
        prefix = np.zeros(128, bool) if own.prefix_BS is None else own.prefix_BS[0]
        assert np.array_equal(prefix, examples.prefix_BS[b])


def test_weights():
    mixture = MixtureConfig(parts={"a": {"name": "causal"}, "b": {"name": "prefix_lm", "weight": 3}}).build(vocabulary())
    raw = np.tile(np.arange(200, 217), (4000, 1))
    examples = mixture.examples(raw, SampleRandom(0, 0, np.arange(4000)), 16)
    assert abs(examples.part_BS[:, 0].mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)


def test_a_part_of_weight_zero_is_left_out():
    config = MixtureConfig(parts={"a": {"name": "causal"}, "b": {"name": "prefix_lm", "weight": 0}})
    assert config.attention is Attention.causal
    assert config.build(vocabulary()).parts == ("a",)


def test_ul2_has_seven_denoisers():
    mixture = UL2Config().build(vocabulary())
    assert len(mixture.parts) == 7
    _, examples = make(mixture, 128, range(num_windows(mixture, 128)))
    assert set(np.unique(examples.part_BS)) == set(range(7))
    assert len(UL2Config(x_weight=0).build(vocabulary()).parts) == 3


@pytest.mark.parametrize("form", ["decoder_only", "encoder_decoder"])
def test_mode_tokens_of_ul2_open_what_is_read_and_tell_its_kind(form):
    v = vocabulary()
    mixture = UL2Config(mode_tokens=True, form=form).build(v)
    _, examples = make(mixture, 128, range(num_windows(mixture, 128)))
    kinds = [name[0] for name in mixture.parts]
    modes = dict(zip("rsx", v.sentinels[-3:], strict=True))
    encodes = examples.encoder_tokens_BT is not None
    assert encodes == (form == "encoder_decoder")
    tokens = examples.encoder_tokens_BT if encodes else examples.tokens_BS
    segments = examples.encoder_segments_BT if encodes else examples.segments_BS
    opens = (np.diff(segments, axis=1, prepend=-1) != 0) & (segments >= 0)
    for row, part in enumerate(examples.part_BS.max(axis=1)):
        wanted = modes[kinds[part]]
        # a piece that goes on from the window before, in the middle of a row, does not exist: every piece opens with its mode
        assert set(tokens[row][opens[row]]) == {wanted}, (row, kinds[part])
        assert np.isin(tokens[row], list(modes.values())).sum() == opens[row].sum(), "a mode token stands nowhere else"
    assert not np.isin(examples.labels_BS, list(modes.values())).any()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "has no part"),
        ({"a": {"weight": 1}}, "names no objective"),
        ({"a": {"name": "causl"}}, "Did you mean 'causal'"),
        ({"a": {"name": "fim", "rat": 1}}, r"objective\.parts\.a\.rat does not exist\. Did you mean 'rate'"),
        ({"a": {"name": "fim", "rate": 2}}, r"objective\.parts\.a\.rate=2"),
        ({"a": {"name": "fim", "cut": "chars"}}, "it is char, token"),
        ({"a": {"name": "fim", "rate": "much"}}, "a float"),
        ({"a": {"name": "causal", "weight": -1}}, "0 .left out. or more"),
        ({"a": {"name": "causal", "weight": 0}}, "every part the weight 0"),
        ({"a": {"name": "causal"}, "b": {"name": "mlm"}}, "attention differs"),
        ({"a": {"name": "mixture"}}, "mixture in a mixture"),
        ({"a": {"name": "fim", "level": "document"}}, "changes what the rows of all parts are"),
    ],
)
def test_refusals(parts, message):
    with pytest.raises(ConfigError, match=message):
        MixtureConfig(parts=parts)


def test_options_are_made_without_numpy():
    assert {"causal", "fim", "mlm", "prefix_lm", "span_corruption", "ul2", "mixture"} <= set(objectives)
    with pytest.raises(ConfigError, match="all 0"):
        UL2Config(r_weight=0, s_weight=0, x_weight=0)


def logged(folder):
    """Values of the training points of a run."""
    points = [json.loads(line)["values"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [point for point in points if "train/loss" in point]


class TestPartsInTraining:
    """The loss of each part is logged in training too, and logging it changes nothing."""

    PARTS = "objective.parts={read: {name: causal}, hole: {name: fim, rate: 1.0}}"

    def points(self, tiny, folder, *more):
        train(compose([*tiny, "objective=mixture", self.PARTS, *more]), folder)
        return logged(folder)

    def test_they_are_the_parts_of_the_loss(self, tiny, tmp_path):
        points = self.points(tiny, tmp_path / "run")
        assert len(points) == 4
        seen = set()
        for point in points:
            parts = {name: value for name, value in point.items() if name.startswith("train/loss_")}
            seen |= set(parts)
            assert min(parts.values()) - 1e-6 <= point["train/loss"] <= max(parts.values()) + 1e-6
        assert seen == {"train/loss_read", "train/loss_hole_left_to_right", "train/loss_hole_infill"}

    def test_one_part_alone_is_the_loss(self, tiny, tmp_path):
        train(compose([*tiny, "objective=fim", "objective.rate=0"]), tmp_path / "run")
        point = logged(tmp_path / "run")[0]
        assert point["train/loss_left_to_right"] == pytest.approx(point["train/loss"], rel=1e-5)
        assert "train/loss_infill" not in point

    def test_weights_do_not_depend_on_how_often_is_logged(self, tiny, tmp_path):
        more = "backbone.dropout=0.3"
        losses = [
            train(compose([*tiny, "objective=mixture", self.PARTS, more, f"trainer.log_every_steps={n}"]), tmp_path / str(n)).metrics[
                "val/loss"
            ]
            for n in (1, 4)
        ]
        assert losses[0] == losses[1]
