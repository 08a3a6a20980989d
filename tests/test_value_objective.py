"""The value objective: alignment, the built-in task, records and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heads_lightning.batch import IGNORE, PADDING, Batch, Examples
from heads_lightning.composition import compose
from heads_lightning.configs.data import JsonlConfig
from heads_lightning.configs.tokenizer import ByteConfig
from heads_lightning.configs.value import (
    ValueAlignment,
    ValueConfig,
    ValueLoss,
    ValuePositions,
    ValueTarget,
)
from heads_lightning.data.scored import ScoredStream, prepare_records
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.objectives.value import Scored, Value, scored_tokens
from heads_lightning.registry import ConfigError
from heads_lightning.testing import byte_vocabulary

# -- objective: alignment (O9), the built-in task -------------------------------------------------------------------------


def scored(tokens: list[list[int]], mask: list[list[int]], numbers: list[list[float]], segments: Any = None) -> Scored:
    ids = np.array(tokens)
    segments = np.zeros(ids.shape, np.int32) if segments is None else np.array(segments, np.int32)
    values = np.array(numbers, np.float32)
    return Scored(ids, segments, np.array(mask, bool), values, values, np.zeros(ids.shape, np.float32))


def test_alignment_says_which_position_scores_which_token() -> None:
    """By hand: two sequences in a row, then padding."""
    given = scored([[10, 11, 12, 13, 14, 1]], [[0, 1, 1, 0, 1, 0]], [[0.0, 0.1, 0.2, 0.3, 0.4, 9.9]], [[0, 0, 0, 1, 1, PADDING]])
    after = Value(ValueConfig(), byte_vocabulary()).scored_examples(given)
    assert after.values_BS is not None
    assert after.values_BS[0].tolist() == pytest.approx([0, 0.1, 0.2, 0, 0.4, 0])
    assert after.labels_BS[0].tolist() == [IGNORE, 12, 0, IGNORE, 0, IGNORE]
    before = Value(ValueConfig(alignment=ValueAlignment.state_before_action), byte_vocabulary()).scored_examples(given)
    assert before.values_BS is not None
    assert before.values_BS[0].tolist() == pytest.approx([0.1, 0.2, 0, 0.4, 0, 0])
    assert before.labels_BS[0].tolist() == [11, 12, IGNORE, 14, IGNORE, IGNORE]
    assert scored_tokens(after, ValueAlignment.after_token)[0].tolist() == [IGNORE, 11, 12, IGNORE, 14, IGNORE]
    assert scored_tokens(before, ValueAlignment.state_before_action)[0].tolist() == [11, 12, IGNORE, 14, IGNORE, IGNORE]
    firsts = scored(
        [[10, 11, 12, 13]], [[1, 1, 1, 1]], [[0.0, 0.1, 0.2, 0.3]], [[0, 0, 1, 1]]
    )  # nothing stands before a sequence's first token
    before = Value(ValueConfig(alignment=ValueAlignment.state_before_action), byte_vocabulary()).scored_examples(firsts)
    assert before.labels_BS[0].tolist() == [11, IGNORE, 13, IGNORE]
    last = Value(ValueConfig(positions=ValuePositions.last), byte_vocabulary()).scored_examples(given)
    assert (last.labels_BS[0] != IGNORE).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("alignment", ValueAlignment)
def test_a_score_depends_on_what_it_may_have_read(alignment: ValueAlignment) -> None:
    """O9, on a built model: the score of position p changes with tokens up to p alone, so a critic's V before token t ignores token t."""
    config = compose(["objective=value", "head=value", f"objective.alignment={alignment}", "backbone.d_model=32", "backbone.num_layers=2",
                      "backbone.num_heads=2", "head.init=normal"])  # fmt: skip
    from heads_lightning.experiment import build_model

    backbone, head = build_model(config, 64)
    backbone, head = backbone.double().eval(), head.eval()
    ids = torch.randint(3, 60, (1, 12))
    objective = config.objective.build(byte_vocabulary())
    made = objective.scored_examples(scored(ids.tolist(), [[0] * 4 + [1] * 8], [list(range(12))]))
    scores_token = {p: int(v) for p, v in enumerate(made.values_BS[0]) if made.labels_BS[0, p] != IGNORE}
    assert sorted(scores_token.values()) == list(range(4, 12))

    def values(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return head.values(backbone(Batch(tokens, tokens, config.objective.attention, 0, 0)))[0]

    for t in range(4, 12):
        other = ids.clone()
        other[0, t] = (other[0, t] + 1) % 60
        changed = (values(ids) - values(other)).abs() > 1e-6
        own = next(p for p, token in scores_token.items() if token == t)
        assert not changed[:t].any()
        assert bool(changed[own]) == (alignment == ValueAlignment.after_token)


def windows(rows: int = 64, length: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = rng.integers(107, 363, (rows, length))
    made[rng.random((rows, length)) < 0.02] = 0
    return made


def test_the_built_in_task_tells_the_truth() -> None:
    """The outcome is 1 exactly where no token of the snippet was replaced, and half of the snippets are corrupted."""
    objective = Value(ValueConfig(corruption_rate=0.3), byte_vocabulary())
    plain = windows()
    made = objective.examples(plain, SampleRandom(0, 0, np.arange(64)), 64)
    assert made.values_BS is not None
    assert made.segments_BS is not None
    outcomes = []
    for row in range(64):
        for piece in np.unique(made.segments_BS[row]):
            here = made.segments_BS[row] == piece
            before, after = plain[row][here], made.tokens_BS[row][here]
            assert len(before) < 16 or (before != after).mean() < 0.6
            scored_here = made.labels_BS[row][here] != IGNORE
            values = made.values_BS[row][here][scored_here]
            assert not scored_here[before == 0].any()
            assert np.array_equal(before == 0, after == 0)  # a marker stays, and none is drawn
            assert set(values) <= {float((before == after).all())}
            outcomes += values[:1].tolist()
    assert 0.4 < np.mean(outcomes) < 0.65
    rewards = Value(ValueConfig(target=ValueTarget.monte_carlo, corruption_rate=0.3), byte_vocabulary()).examples(
        plain, SampleRandom(0, 0, np.arange(64)), 64
    )
    assert np.array_equal(rewards.values_BS, made.values_BS)  # the reward stands at the end, and nothing is discounted


def test_the_built_in_pairs() -> None:
    objective = Value(ValueConfig(loss=ValueLoss.bradley_terry, snippet_tokens=16, corruption_rate=0.3), byte_vocabulary())
    assert objective.window(65).length == 32
    plain = windows(8, 32)
    made = objective.examples(plain, SampleRandom(0, 0, np.arange(8)), 65)
    for chosen, start in ((0, 0), (32, 16)):
        snippet, copy = made.tokens_BS[:, chosen : chosen + 16], made.tokens_BS[:, chosen + 16 : chosen + 32]
        assert np.array_equal(snippet, plain[:, start : start + 16])
        assert not (snippet == copy).all(axis=1).any()
        assert (snippet == copy).mean() > 0.6
    assert made.counts_B is not None
    assert made.segments_BS is not None
    assert made.counts_B.tolist() == [2] * 8
    assert made.segments_BS[0, ::16].tolist() == [0, 1, 2, 3, PADDING]
    assert (made.labels_BS != IGNORE).nonzero()[1].reshape(8, 4).tolist() == [[15, 31, 47, 63]] * 8


# -- records --------------------------------------------------------------------------------------------------------------


def write(folder: Path, records: list[dict[str, Any]], copies: int = 20) -> JsonlConfig:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for record in records for _ in range(copies)]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return JsonlConfig(root=str(folder), cache_dir=str(folder / "cache"), sequence_length=16, validation_fraction=0.3)


def first_example(folder: Path, record: dict[str, Any], length: int = 16, **objective: Any) -> Examples:
    config = ValueConfig(**objective)
    prepared = prepare_records(write(folder, [record]), ByteConfig(num_sentinels=0), config)
    value = config.build(prepared.tokenizer.vocabulary)
    return ScoredStream(prepared.train, value, sequence_length=length, seed=0).examples(0, 1)


def shown(made: Examples) -> list[float | None]:
    """The target of each position, None where there is none."""
    assert made.values_BS is not None
    return [None if label == IGNORE else pytest.approx(float(v)) for label, v in zip(made.labels_BS[0], made.values_BS[0], strict=True)]


IDS = {"input_ids": [10, 11, 12, 13]}
N = None


@pytest.mark.parametrize(
    ("record", "objective", "wanted"),
    [
        ({"prompt": "ab", "text": "xyz", "outcome": 0.5}, {}, [N, N, N, 0.5, 0.5, 0.5]),
        ({"text": "xy", "outcome": 1}, {"positions": ValuePositions.last}, [N, N, 1.0]),
        ({"steps": ["ab", "c", "d"], "step_labels": [1, None, 0], "prompt": "?"}, {}, [N, N, N, 1.0, N, 0.0]),
        (IDS | {"returns": [1, 2, 3, 4], "mask": [0, 1, 1, 0]}, {"target": ValueTarget.given}, [N, 2.0, 3.0, N]),
        (IDS | {"returns": [1, 2, 3, float("nan")], "mask": [0, 1, 1, 0]}, {"target": ValueTarget.given}, [N, 2.0, 3.0, N]),
        (
            IDS | {"returns": [1, 2, 3, 4], "mask": [0, 1, 1, 0]},
            {"target": ValueTarget.given, "alignment": ValueAlignment.state_before_action},
            [2.0, 3.0, N, N],
        ),
        (IDS | {"step_ends": [1, 3], "step_labels": [0, 1]}, {}, [N, 0.0, N, 1.0]),
        ({"text": "xyz", "rewards": 2}, {"target": ValueTarget.monte_carlo, "gamma": 0.5}, [N, 0.5, 1.0, 2.0]),
        (
            IDS | {"rewards": [0, 0, 0, 1], "old_values": [9, 0.5, 0.4, 0.3], "mask": [0, 1, 1, 1]},
            {"target": ValueTarget.gae, "lam": 0.95},
            [N, 0.93675, 0.965, 1.0],
        ),
    ],
)  # fmt: skip
def test_records(record: dict[str, Any], objective: dict[str, Any], wanted: list[float | None], tmp_path: Path) -> None:
    made = first_example(tmp_path, record, **objective)
    assert made.segments_BS is not None
    assert made.tokens_BS.shape == (1, 16)
    assert shown(made) == wanted + [N] * (16 - len(wanted))
    assert (made.segments_BS[0] == PADDING).tolist() == [False] * len(wanted) + [True] * (16 - len(wanted))


def test_records_of_pairs_and_old_values(tmp_path: Path) -> None:
    made = first_example(tmp_path / "pairs", {"prompt": "p", "chosen": "ab", "rejected": "c", "margin": 0.25}, loss=ValueLoss.bradley_terry)
    assert made.segments_BS is not None
    assert made.segments_BS[0].tolist() == [0] * 4 + [1] * 3 + [PADDING] * 9
    assert shown(made)[:7] == [N, N, N, 0.25, N, N, 0.25]
    assert made.counts_B is not None
    assert made.counts_B.tolist() == [1]
    record = IDS | {"returns": 1.0, "old_values": [0.5, 0.6, 0.7, 0.8]}
    made = first_example(tmp_path / "old", record, target=ValueTarget.given, loss=ValueLoss.clipped_mse)
    assert made.old_values_BS is not None
    assert made.old_values_BS[0, :5].tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0])


@pytest.mark.parametrize(
    ("record", "objective", "problem"),
    [
        ({"text": "a"}, {}, "no outcome"),
        ({"outcome": 1}, {}, "no text or input_ids"),
        ({"text": "a", "outcome": float("nan")}, {}, "outcome is no finite number"),
        ({"text": "a", "outcome": 3}, {"loss": ValueLoss.bce}, "outside 0 to 1"),
        ({"text": "ab", "rewards": [1, 2]}, {"target": ValueTarget.monte_carlo}, "has not one number for each"),
        (IDS | {"returns": [1, 2]}, {"target": ValueTarget.given}, "has not one number for each"),
        (IDS | {"rewards": [0, 0, 0, 1]}, {"target": ValueTarget.gae}, "no old_values"),
        ({"input_ids": [10, 9999], "outcome": 1}, {}, "no list of ids below"),
        ({"steps": ["a"], "step_labels": [1, 0]}, {}, "one entry for each of the steps"),
        ({"chosen": "a"}, {"loss": ValueLoss.bradley_terry}, "no rejected"),
    ],
)
def test_records_that_cannot_be_used_are_named(record: dict[str, Any], objective: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no record that objective=value can use: 20 with .*{problem}"):
        first_example(tmp_path, record, **objective)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_some_bad_records_are_counted_and_long_ones_left_out(tmp_path: Path) -> None:
    data = write(tmp_path, [{"text": "a", "outcome": 1}, {"text": "b"}, {"text": "c" * 40, "outcome": 0}])
    with pytest.warns(UserWarning, match=r"left out 20 records, the first records\.jsonl:\d+ \(no outcome\)"):
        prepared = prepare_records(data, ByteConfig(num_sentinels=0), ValueConfig())
    assert prepared.facts["left_out"] == {"no outcome": 20}
    objective = ValueConfig().build(prepared.tokenizer.vocabulary)
    with pytest.warns(UserWarning, match="longer than data.sequence_length=16"):
        stream = ScoredStream(prepared.train, objective, sequence_length=16, seed=0)
    assert 0 < stream.windows < 20
    with pytest.raises(ConfigError, match=r"no train record fits data\.sequence_length=1 "):
        ScoredStream(prepared.train, objective, sequence_length=1, seed=0)
