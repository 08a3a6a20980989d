"""What changes over training is arithmetic too: lengths, rates by position, and what is said about the loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heads_lightning.batch import IGNORE, PADDING, Attention, Batch, Examples
from heads_lightning.configs.data import RepeatConfig
from heads_lightning.configs.objective import CausalConfig, FIMConfig, MLMConfig
from heads_lightning.configs.tokenizer import ByteConfig
from heads_lightning.data.datamodule import TokenDataModule
from heads_lightning.data.prepare import prepare
from heads_lightning.data.shards import PreparedData
from heads_lightning.registry import ConfigError
from heads_lightning.training.callbacks import MetricsCallback


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedData:
    config = RepeatConfig(num_documents=2000, validation_fraction=0.2, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare(config, ByteConfig(num_sentinels=0))


def module(prepared: PreparedData, objective=None, **changes) -> TokenDataModule:
    fields = {"sequence_length": 64, "global_batch_size": 8, "micro_batch_size": 4, "seed": 3, "total_steps": 12}
    made = (objective or CausalConfig()).build(prepared.vocabulary)
    return TokenDataModule(prepared, made, **(fields | changes))


WARM = {"length_start": 16, "length_warmup_steps": 6}


class TestLengths:
    def test_they_double_and_every_step_reads_as_many_positions(self, prepared):
        steps = list(module(prepared, **WARM).train_dataloader())
        lengths = [{batch.tokens_BS.shape[1] for batch in step} for step in steps]
        assert lengths == [{16}] * 3 + [{32}] * 3 + [{64}] * 6
        assert all(sum(batch.tokens_BS.numel() for batch in step) == 8 * 64 for step in steps)
        assert all(batch.tokens_BS.numel() <= 4 * 64 for step in steps for batch in step)

    def test_pieces_stay_whole(self, prepared):
        v = prepared.vocabulary
        for step in module(prepared, FIMConfig(rate=1.0), **WARM).train_dataloader():
            for batch in step:
                assert (batch.tokens_BS == v.fim_middle).sum() == (batch.tokens_BS == v.fim_end).sum() > 0

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_ranks_share_the_same_steps(self, prepared, world_size):
        whole = list(module(prepared, **WARM).train_dataloader())
        shares = [list(module(prepared, rank=r, world_size=world_size, **WARM).train_dataloader()) for r in range(world_size)]
        for step in range(12):
            parts = [torch.cat([b.tokens_BS for b in share[step]]) for share in shares]
            assert torch.equal(torch.cat(parts), torch.cat([b.tokens_BS for b in whole[step]]))

    def test_resuming_is_a_multiplication(self, prepared):
        whole = list(module(prepared, **WARM).train_dataloader())
        first = module(prepared, **WARM)
        first.seek(4)
        second = module(prepared, **WARM)
        second.load_state_dict(first.state_dict())
        for a, b in zip(whole[4:], second.train_dataloader(), strict=True):
            assert all(torch.equal(x.tokens_BS, y.tokens_BS) for x, y in zip(a, b, strict=True))
        with pytest.raises(ConfigError, match="length warm-up"):
            module(prepared, length_start=32, length_warmup_steps=6).load_state_dict(first.state_dict())
        with pytest.raises(ConfigError, match="length warm-up"):
            module(prepared).load_state_dict(first.state_dict())

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"length_start": 16}, "half a warm-up"),
            ({"length_warmup_steps": 10}, "half a warm-up"),
            ({"length_start": 20, "length_warmup_steps": 10}, "allows 32, 16, 8, 4, 2, 1"),
        ],
    )
    def test_refusals(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            RepeatConfig(sequence_length=64, **fields)


def test_schedules_go_by_positions_over_lengths_steps_and_ranks(prepared):
    """The rate at a step is that of the positions before it, whatever the length of its sequences, and validation has the last rate."""
    objective = MLMConfig(rate=0.1, rate_start=0.9, rate_tokens=8 * 8 * 64)

    def shares(**changes) -> list[float]:
        loader = module(prepared, objective, global_batch_size=8, **changes).train_dataloader()
        return [float(np.mean([float((b.labels_BS != IGNORE).float().mean()) for b in step])) for step in loader]

    plain, warm = shares(), shares(**WARM)
    for step in range(12):
        expected = 0.9 - 0.8 * min((step + 0.5) / 8, 1)
        assert abs(plain[step] - expected * 15 / 16) < 0.12
        assert abs(warm[step] - expected * 15 / 16) < 0.12
    held_out = module(prepared, objective).val_dataloader()
    assert np.mean([float((b.labels_BS != IGNORE).float().mean()) for b in held_out]) < 0.15


def test_padding_is_counted():
    segments = np.array([[0, 0, PADDING], [0, PADDING, PADDING]], np.int32)
    ids = np.zeros((2, 3), np.int64)
    assert Batch.from_examples(Examples(ids, ids, segments), Attention.causal).num_padding == 3
    assert Batch.from_examples(Examples(ids, ids), Attention.causal).num_padding == 0


def test_a_loader_that_is_the_limit_is_said_once():
    said: list[str] = []
    callback = MetricsCallback(lambda *_: None, every_steps=10, waited_seconds=lambda: 0.0, tokens_per_step=64, warn=said.append)
    values = {"speed/data_wait_share": 0.6, "speed/tokens_per_second": 1234.0}
    callback._check_loader(values, 10)  # the first point waits for caches to fill
    callback._check_loader(values | {"speed/data_wait_share": 0.05}, 20)
    assert not said
    callback._check_loader(values, 30)
    callback._check_loader(values, 40)
    assert len(said) == 1
    assert "waited for data 60% of the time up to step 30" in said[0]
    assert "1,234 positions/s" in said[0]
