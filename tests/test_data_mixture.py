"""Mixtures of sources: shares, caps and order are arithmetic; every source is prepared with one tokenizer and kept apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heads_lightning.batch import Attention, Examples
from heads_lightning.configs.data import DataMixtureConfig, Share
from heads_lightning.configs.objective import CausalConfig
from heads_lightning.configs.tokenizer import ByteConfig
from heads_lightning.data.datamodule import TokenDataModule
from heads_lightning.data.mixing import BLOCK, MixedStream, apportion, plan
from heads_lightning.data.prepare import prepare
from heads_lightning.data.shards import Shard
from heads_lightning.data.stream import SampleStream
from heads_lightning.objectives.base import Objective, SampleRandom, Window
from heads_lightning.registry import ConfigError, RunError


class Plain(Objective):
    """The window, and in a weight how much was trained before it."""

    attention = Attention.causal

    def window(self, sequence_length: int) -> Window:
        return Window(sequence_length, sequence_length + 1)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        trained = np.full(len(tokens_BR), -1) if rng.trained_B is None else rng.trained_B
        return Examples(tokens_BR[:, :-1], tokens_BR[:, 1:], weights_BS=np.repeat(trained[:, None], sequence_length, 1).astype(np.float32))


def mixed(*shares: Share, windows=(50, 50, 50), **fields) -> MixedStream:
    """Group k has ids from 100,000·k on, and as many windows as told."""
    streams = [
        SampleStream([Shard(np.arange(8 * n + 8) + 100_000 * k, np.zeros(0, np.int64))], Plain(), sequence_length=8, seed=k)
        for k, n in enumerate(windows[: len(shares)])
    ]
    return MixedStream(streams, shares, sequence_length=8, seed=3, **fields)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 2000))
@settings(max_examples=100, deadline=None)
def test_quotas_add_up_and_are_within_one(weights, total):
    counts = apportion(total, weights)
    assert sum(counts) == total
    assert all(abs(count - total * w / sum(weights)) < 1 for count, w in zip(counts, weights, strict=True))


@given(
    st.lists(st.tuples(st.floats(0.05, 10), st.none() | st.integers(1, 5000)), min_size=1, max_size=4),
    st.integers(0, 8000),
)
@settings(max_examples=60, deadline=None)
def test_numbers_within_a_group_are_counted_up_and_caps_are_kept(groups, first):
    phases = plan([w for w, _ in groups], [cap for _, cap in groups])
    used = [0] * len(groups)
    for phase in phases:
        assert list(phase.before) == used
        assert phase.blocks is None or phase.first_block * BLOCK <= sum(used) + BLOCK
        if phase.blocks is not None:
            used = [n + phase.blocks * quota for n, quota in zip(used, phase.quotas, strict=True)]
    endless = phases[-1].blocks is None
    assert endless == any(cap is None for _, cap in groups)
    for (_, cap), count in zip(groups, used, strict=True):
        if cap is not None:
            assert count == cap or (endless and count <= cap)  # nothing is left over when all are used up


def test_shares_over_every_block():
    stream = mixed(Share(1, None), Share(3, None), Share(0.1, None))
    groups, numbers = stream.places(5 * BLOCK, BLOCK)
    assert np.bincount(groups).tolist() == apportion(BLOCK, [1, 3, 0.1])
    for group in range(3):
        own = numbers[groups == group]
        assert np.array_equal(own, own[0] + np.arange(len(own)))
    assert np.count_nonzero(np.diff(groups)) > 100  # mixed, not one after the other


def test_any_run_of_samples_is_a_part_of_the_whole():
    stream = mixed(Share(1, None), Share(2, 30.0), Share(1, None), trained_before=800)
    whole = stream.examples(0, 3 * BLOCK)
    for first, count in ((0, 7), (1000, 50), (2 * BLOCK - 3, 9), (777, 1)):
        part = stream.examples(first, count)
        assert np.array_equal(part.tokens_BS, whole.tokens_BS[first : first + count])
        assert np.array_equal(part.weights_BS[:, 0], 800 + (first + np.arange(count)) * 8)  # schedules go by the global number
    again = mixed(Share(1, None), Share(2, 30.0), Share(1, None), trained_before=800)
    assert np.array_equal(again.examples(1000, 50).tokens_BS, whole.tokens_BS[1000:1050])


def test_a_source_ends_at_its_cap_and_the_others_take_its_share():
    stream = mixed(Share(1, None), Share(1, 2.0), Share(2, None))
    windows = stream._streams[1].windows
    groups, numbers = stream.places(0, 20 * BLOCK)
    assert (groups == 1).sum() == 2 * windows
    after = groups[np.flatnonzero(groups == 1)[-1] + 1 :][BLOCK:]
    assert abs((after == 0).mean() - 1 / 3) < 0.01
    seen = Counter(map(tuple, stream._streams[1].examples(0, int(numbers[groups == 1].max()) + 1).tokens_BS.tolist()))
    assert len(seen) >= windows  # each pass its own windows


def test_when_every_source_is_used_up_the_stream_ends():
    stream = mixed(Share(1, 1.0), Share(5, 2.0))
    total = stream._streams[0].windows + 2 * stream._streams[1].windows
    assert stream.samples == total
    stream.examples(0, total)
    with pytest.raises(RunError, match=f"after {total} sequences; raise one of the max_epochs"):
        stream.examples(0, total + 1)


@pytest.fixture
def folders(tmp_path) -> Path:
    for name, count in (("a", 40), ("b", 30)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} number {i} " * (5 + i % 5) if i else "the same in both")
    return tmp_path


def config(folders: Path, **changes) -> DataMixtureConfig:
    parts = {name: {"name": "files", "root": str(folders / name), "include": ["*.txt"]} for name in ("a", "b")}
    for name, fields in changes.items():
        parts[name] |= fields
    return DataMixtureConfig(
        parts=parts, cache_dir=str(folders / "cache"), validation_fraction=0.3, prepare_processes=1, sequence_length=16
    )


def test_sources_are_prepared_together_and_kept_apart(folders):
    prepared = prepare(config(folders), ByteConfig(num_sentinels=0))
    assert prepared.manifest.duplicates == 1
    assert {shard.group for shard in prepared.train.shards} == {"a", "b"}
    for shard in prepared.train.shards:
        texts = [prepared.tokenizer.decode(shard.document(i)) for i in range(len(shard.offsets) - 1)]
        assert all(text.startswith(shard.group) or text == "the same in both" for text in texts)
    prepared.verify()
    weighted = prepare(config(folders, b={"weight": 3, "max_epochs": 2}), ByteConfig(num_sentinels=0))
    assert weighted.folder == prepared.folder  # weights are about reading


def test_training_reads_by_weight(folders):
    prepared = prepare(config(folders), ByteConfig(num_sentinels=0))

    def module(**changes) -> TokenDataModule:
        return TokenDataModule(
            prepared,
            CausalConfig().build(prepared.vocabulary),
            sequence_length=16,
            global_batch_size=32,
            micro_batch_size=16,
            seed=0,
            total_steps=32,
            shares=config(folders, **changes).shares(),
        )

    letters = {ord(c) + 7: c for c in "ab"}
    seen: Counter[str] = Counter()
    for step in module(a={"weight": 1}, b={"weight": 3}).train_dataloader():
        for batch in step:
            for row in batch.tokens_BS.tolist():
                found = {letters[i] for i in row if i in letters} - ({"b"} if ord("a") + 7 in row else set())
                seen.update(found)
    assert 2 < seen["b"] / seen["a"] < 4
    with pytest.raises(ConfigError, match=r"data.parts allow \d+ sequences .* and the run takes 1024; .* or use trainer.max_steps=\d+"):
        module(a={"max_epochs": 1}, b={"max_epochs": 1})
    state = module(a={"weight": 1}).state_dict()
    with pytest.raises(ConfigError, match=r"data\.parts"):
        module(a={"weight": 2}).load_state_dict(state)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "has no source"),
        ({"a": {"weight": 1}}, "names no source"),
        ({"a": {"name": "file"}}, "Did you mean 'files'"),
        ({"a": {"name": "files", "rot": "x"}}, r"data.parts.a.rot does not exist. Did you mean 'root'"),
        ({"a": {"name": "files", "sequence_length": 4}}, r"data.parts.a.sequence_length does not exist"),
        ({"a": {"name": "stdlib", "weight": 0}}, "more than 0"),
        ({"a": {"name": "stdlib", "max_epochs": -1}}, "more than 0, or null"),
        ({"a": {"name": "mixture"}}, "mixture in a mixture"),
        ({"a b": {"name": "stdlib"}}, "use letters"),
    ],
)
def test_refusals(parts, message):
    with pytest.raises(ConfigError, match=message):
        DataMixtureConfig(parts=parts)
