"""Rows of whole documents: nothing lost or twice, nothing cut that fits, and as few rows as best-fit decreasing finds."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heads_lightning.batch import IGNORE, PADDING, Attention, Batch
from heads_lightning.configs.data import RepeatConfig
from heads_lightning.configs.objective import CausalConfig, CausalLevel
from heads_lightning.configs.tokenizer import ByteConfig
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.data.datamodule import TokenDataModule
from heads_lightning.data.packing import best_fit
from heads_lightning.data.prepare import prepare
from heads_lightning.data.shards import Shard
from heads_lightning.data.stream import SampleStream, rows_of
from heads_lightning.objectives.base import Vocabulary
from heads_lightning.registry import ConfigError

EOD, PAD = 0, 1
LENGTHS = st.lists(st.lists(st.integers(1, 40), max_size=30), min_size=1, max_size=3)


def shards(lengths: list[list[int]]) -> list[Shard]:
    """Documents of these lengths, in shards; every token has an id of its own, and only markers share one."""
    made, next_id = [], 2
    for documents in lengths:
        ids = [EOD]
        for length in documents:
            ids += [*range(next_id, next_id + length), EOD]
            next_id += length
        tokens = np.array(ids, np.uint32)
        made.append(Shard(tokens, np.flatnonzero(tokens == EOD)))
    return made


def stream(made: list[Shard], width: int, seed: int = 0) -> SampleStream:
    vocabulary = Vocabulary(10_000, end_of_document=EOD, padding=PAD)
    return SampleStream(made, CausalConfig(level=CausalLevel.document).build(vocabulary), sequence_length=width, seed=seed)


def place(made: list[Shard]) -> dict[int, tuple[int, int, int]]:
    """Shard, document and place in it (the marker is 0) of every id."""
    return {
        int(shard.tokens[p]): (s, d, p - start)
        for s, shard in enumerate(made)
        for d, (start, end) in enumerate(zip(shard.offsets[:-1], shard.offsets[1:], strict=True))
        for p in range(start + 1, end)
    }


def one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """Loads of the bins: best-fit decreasing as it is defined."""
    loads: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b, load in enumerate(loads) if load + size <= capacity]
        if fitting:
            loads[max(fitting, key=lambda b: loads[b])] += size
        else:
            loads.append(size)
    return loads


@given(sizes=st.lists(st.integers(1, 20), max_size=80), capacity=st.integers(20, 33))
@settings(max_examples=200, deadline=None)
def test_bins_are_those_of_best_fit_decreasing(sizes, capacity):
    bins = best_fit(np.array(sizes, np.int64), capacity)
    loads = np.bincount(bins, sizes).astype(int).tolist()
    assert sorted(loads) == sorted(one_by_one(sizes, capacity))


@given(lengths=LENGTHS, width=st.integers(1, 24), seed=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_each_token_comes_once_an_epoch_and_only_long_documents_are_cut(lengths, width, seed):
    made = shards(lengths)
    samples = stream(made, width, seed)
    where = place(made)
    if not where:
        assert samples.windows == 0
        return
    for epoch in (0, 2):
        rows = samples.examples(epoch * samples.windows, samples.windows)
        segments = rows.segments_BS
        assert segments is not None
        real = segments != PADDING
        whole = np.concatenate([shard.tokens[:-1] for shard in made])
        assert sorted(rows.tokens_BS[real].tolist()) == sorted(whole.tolist())
        assert (rows.tokens_BS[~real] == PAD).all()
        assert (rows.labels_BS[~real] == IGNORE).all()
        pieces_of: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for b in range(samples.windows):
            numbers = segments[b][real[b]]
            assert numbers.tolist() == np.sort(numbers).tolist()
            assert real[b].tolist() == sorted(real[b].tolist(), reverse=True)  # padding is last
            found = set()
            for number in range(numbers.max() + 1):
                ids, labels = rows.tokens_BS[b][segments[b] == number], rows.labels_BS[b][segments[b] == number]
                shard, document, first = where[int(ids[0])] if ids[0] != EOD else (*where[int(labels[0])][:2], 0)
                stored = made[shard].tokens[made[shard].offsets[document] :]
                assert ids.tolist() == stored[first : first + len(ids)].tolist()
                assert labels.tolist() == stored[first + 1 : first + 1 + len(ids)].tolist()
                found.add((shard, document))
                pieces_of.setdefault((shard, document), []).append((first, len(ids)))
            assert len(found) == numbers.max() + 1  # no two pieces of one document
        for (shard, document), pieces in pieces_of.items():
            size = lengths[shard][document] + 1  # the marker is the first
            assert sorted(pieces) == [(first, min(width, size - first)) for first in range(0, size, width)]


def test_a_row_is_the_same_alone_and_in_any_batch():
    made = shards([[5, 9, 30, 2, 2, 17, 8] * 6, [3, 3, 40] * 5])
    whole = stream(made, 16).examples(0, 60)
    for first, count in [(50, 10), (0, 1), (7, 13), (23, 37)]:
        for a, b in zip(stream(made, 16).examples(first, count), rows_of(whole, first, first + count), strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or np.array_equal(a, b)
    assert not np.array_equal(stream(made, 16, seed=1).examples(0, 60).tokens_BS, whole.tokens_BS)


def test_the_second_window_of_a_long_document_goes_on_without_a_marker():
    rows = stream(shards([[9]]), 4).examples(0, 3)
    order = np.argsort(rows.labels_BS[:, 0])
    assert rows.tokens_BS[order].tolist() == [[EOD, 2, 3, 4], [5, 6, 7, 8], [9, 10, PAD, PAD]]
    assert rows.labels_BS[order].tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, EOD, IGNORE, IGNORE]]


def test_documents_of_a_row_do_not_see_each_other():
    """Another document before, and none: the logits of a document are equal to the last bit."""
    torch.manual_seed(0)
    backbone = TransformerConfig(num_layers=2, d_model=32, num_heads=2).build(vocab_size=100).eval()
    one, other = ([8, 7], shards([[8, 7]])), ([8, 7], shards([[8, 7]]))
    other[1][0].tokens[1:9] = other[1][0].tokens[1:9][::-1]
    hidden = []
    for _, made in (one, other):
        examples = stream(made, 20).examples(0, 1)
        assert examples.segments_BS is not None
        assert sorted(set(examples.segments_BS[0].tolist())) == [PADDING, 0, 1]
        with torch.no_grad():
            hidden.append(backbone(Batch.from_examples(examples, Attention.causal))[0])
    second = torch.from_numpy(examples.segments_BS[0] == 1)
    first = torch.from_numpy(examples.segments_BS[0] == 0)
    assert not torch.equal(hidden[0][first], hidden[1][first])
    assert torch.equal(hidden[0][second], hidden[1][second])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = RepeatConfig(num_documents=300, validation_fraction=0.2, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare(config, ByteConfig(num_sentinels=0))


def module(prepared, level: CausalLevel, **changes) -> TokenDataModule:
    fields: dict[str, Any] = {
        "sequence_length": 96,
        "global_batch_size": 8,
        "micro_batch_size": 3,
        "seed": 3,
        "total_steps": 40,
        "validation_sequences": 5,
    }
    return TokenDataModule(prepared, CausalConfig(level=level).build(prepared.vocabulary), **(fields | changes))


def taken(steps: list[list[Batch]]) -> np.ndarray:
    return np.concatenate([batch.tokens_BS.numpy() for step in steps for batch in step])


def test_a_run_goes_on_in_the_middle_of_an_epoch_with_another_number_of_ranks(prepared):
    data = module(prepared, CausalLevel.document)
    steps = list(data.train_dataloader())
    assert data.train_stream.windows < 40 * 8  # more than an epoch
    resumed = [module(prepared, CausalLevel.document, rank=rank, world_size=2) for rank in range(2)]
    data.seek(31)
    for half in resumed:
        half.load_state_dict(data.state_dict())
    both = [[*a, *b] for a, b in zip(*(half.train_dataloader() for half in resumed), strict=True)]
    assert np.array_equal(taken(both), taken(steps[31:]))
    assert sum(batch.num_padding for batch in data.val_dataloader()) > 0


def test_a_position_among_windows_is_none_among_documents(prepared):
    state = module(prepared, CausalLevel.context).state_dict()
    with pytest.raises(ConfigError, match=r"objective\.level"):
        module(prepared, CausalLevel.document).load_state_dict(state)
