"""What changes over training is arithmetic too: lengths, batches, rates by position, and what is said about the loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heads_lightning.batch import IGNORE, PADDING, Attention, Batch, Examples
from heads_lightning.configs.batch_sizes import BatchSizes
from heads_lightning.configs.data import RepeatConfig
from heads_lightning.configs.objective import CausalConfig, FIMConfig, FIMLoss, MLMConfig
from heads_lightning.configs.schedule import ConstantConfig
from heads_lightning.configs.tokenizer import ByteConfig
from heads_lightning.configs.trainer import TrainerConfig
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


GROWING = {"batch_start": 2, "batch_warmup_steps": 6}
"""Three steps of 2 sequences, three of 4, then 8."""


class TestBatches:
    def test_they_double_and_read_the_sequences_of_the_run_in_order(self, prepared):
        whole = torch.cat([batch.tokens_BS for step in module(prepared).train_dataloader() for batch in step])
        steps = [torch.cat([batch.tokens_BS for batch in step]) for step in module(prepared, **GROWING).train_dataloader()]
        assert [len(step) for step in steps] == [2] * 3 + [4] * 3 + [8] * 6
        assert torch.equal(torch.cat(steps), whole[: 3 * 2 + 3 * 4 + 6 * 8])

    def test_a_step_is_normalised_by_its_own_targets(self, prepared):
        for step in module(prepared, FIMConfig(rate=1.0, loss_on=FIMLoss.middle), **GROWING).train_dataloader():
            assert {batch.step_targets for batch in step} == {sum(batch.num_targets for batch in step)}

    @pytest.mark.parametrize("also", [{}, WARM])
    def test_ranks_and_resuming_change_nothing(self, prepared, also):
        changes = GROWING | also
        whole = list(module(prepared, **changes).train_dataloader())
        first = module(prepared, **changes)
        first.seek(4)  # in the second size
        resumed = [module(prepared, rank=rank, world_size=2, **changes) for rank in range(2)]
        for part in resumed:
            part.load_state_dict(first.state_dict())
        for step, *shares in zip(whole[4:], *(part.train_dataloader() for part in resumed), strict=True):
            parts = [batch.tokens_BS for share in shares for batch in share]
            assert torch.equal(torch.cat(parts), torch.cat([batch.tokens_BS for batch in step]))
        with pytest.raises(ConfigError, match="batch warm-up"):
            module(prepared, **(changes | {"batch_start": 4})).load_state_dict(first.state_dict())

    @given(st.integers(0, 6), st.integers(1, 5), st.integers(0, 40), st.integers(1, 7), st.integers(0, 60))
    def test_counts_are_sums_of_the_steps(self, doublings, start, warmup, length, steps):
        sizes = BatchSizes(start << doublings, start, warmup, length)
        each = [sizes.at(step) for step in range(steps)]
        assert sizes.sequences(steps) == sum(each)
        assert sizes.tokens(steps) == sum(each) * length
        assert sizes.steps(sizes.tokens(steps)) == steps
        assert sizes.steps(sizes.tokens(steps) + 1) == steps + 1
        assert each == sorted(each)
        assert sizes.at(warmup) == sizes.full

    def test_a_run_in_positions_takes_more_steps_and_its_schedule_rises_as_far(self):
        trainer = TrainerConfig(max_tokens=64 * 64, global_batch_size=8, batch_start=2, batch_warmup_tokens=64 * 18)
        assert trainer.batch_sizes(64) == BatchSizes(8, 2, 6, 64)
        assert trainer.steps(64) == 6 + 6  # 18 sequences, and 46 of 64 are left
        assert trainer.tokens(64) == 64 * (18 + 48)
        assert ConstantConfig(warmup_tokens=64 * 10).in_steps(trainer.batch_sizes(64).steps).warmup_steps == 4  # 2, 2, 2, 4 sequences

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"batch_start": 2}, "is no warm-up"),
            ({"batch_warmup_steps": 2}, "is no warm-up"),
            ({"batch_start": 2, "batch_warmup_steps": 2, "batch_warmup_tokens": 2}, "give batch_start and one of the others"),
            ({"batch_start": 3, "batch_warmup_steps": 2}, r"allows 4, 2, 1 \(half"),
            ({"batch_start": 2, "batch_warmup_steps": 0}, "batch_warmup_steps=0 is out of range"),
            (
                {"batch_start": 2, "batch_warmup_steps": 2, "devices": 4},
                "batch_start=2 sequences cannot .* by 4 devices; use a multiple of 4",
            ),
        ],
    )
    def test_refusals(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            TrainerConfig(max_steps=10, global_batch_size=8, **fields)


def test_schedules_go_by_positions_over_lengths_steps_and_ranks(prepared):
    """The rate at a step is that of the positions before it, whatever the length of its sequences, and validation has the last rate."""
    objective = MLMConfig(rate=0.1, rate_start=0.9, rate_tokens=8 * 8 * 64)

    def shares(**changes) -> list[float]:
        loader = module(prepared, objective, global_batch_size=8, **changes).train_dataloader()
        return [float(np.mean([float((b.labels_BS != IGNORE).float().mean()) for b in step])) for step in loader]

    plain, warm, growing = shares(), shares(**WARM), shares(**GROWING, **WARM)
    for step in range(12):
        expected = 0.9 - 0.8 * min((step + 0.5) / 8, 1)
        assert abs(plain[step] - expected * 15 / 16) < 0.12
        assert abs(warm[step] - expected * 15 / 16) < 0.12
        read = BatchSizes(8, 2, 6, 64).sequences(step) / 8  # steps of 8
        assert abs(growing[step] - (0.9 - 0.8 * min((read + 0.3) / 8, 1)) * 15 / 16) < 0.15
    held_out = module(prepared, objective).val_dataloader()
    assert np.mean([float((b.labels_BS != IGNORE).float().mean()) for b in held_out]) < 0.15


def test_padding_is_counted():
    segments = np.array([[0, 0, PADDING], [0, PADDING, PADDING]], np.int32)
    ids = np.zeros((2, 3), np.int64)
    assert Batch.from_examples(Examples(ids, ids, segments), Attention.causal).num_padding == 3
    assert Batch.from_examples(Examples(ids, ids), Attention.causal).num_padding == 0


def test_a_loader_that_is_the_limit_is_said_once():
    said: list[str] = []
    callback = MetricsCallback(
        lambda *_: None, every_steps=10, waited_seconds=lambda: 0.0, tokens_read=lambda steps: 64 * steps, warn=said.append
    )
    values = {"speed/data_wait_share": 0.6, "speed/tokens_per_second": 1234.0}
    callback._check_loader(values, 10)  # the first point waits for caches to fill
    callback._check_loader(values | {"speed/data_wait_share": 0.05}, 20)
    assert not said
    callback._check_loader(values, 30)
    callback._check_loader(values, 40)
    assert len(said) == 1
    assert "waited for data 60% of the time up to step 30" in said[0]
    assert "1,234 positions/s" in said[0]
