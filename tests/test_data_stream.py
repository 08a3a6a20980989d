"""Samples and loaders: a sample is a function of (seed, epoch, index); ranks, micro-batches, threads and resuming change nothing."""

import itertools
from typing import ClassVar

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heads_lightning.batch import IGNORE, Attention, Batch, Examples
from heads_lightning.configs.batch_sizes import BatchSizes
from heads_lightning.configs.data import RepeatConfig
from heads_lightning.configs.tokenizer import ByteConfig
from heads_lightning.data.datamodule import StepBatches, TokenDataModule, TrainLoader
from heads_lightning.data.prepare import prepare
from heads_lightning.data.shards import PreparedData, Shard
from heads_lightning.data.stream import SampleStream, permute
from heads_lightning.objectives.base import Objective, SampleRandom, Window
from heads_lightning.registry import ConfigError


class Causal(Objective):
    """Next token, with a random number of labels hidden in each row so that randomness and uneven counts show."""

    attention: ClassVar[Attention] = Attention.causal

    def window(self, sequence_length: int) -> Window:
        return Window(sequence_length, sequence_length + 1)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        tokens_BR = tokens_BR.astype(np.int64)
        labels_BS = tokens_BR[:, 1:].copy()
        labels_BS[rng.uniform(sequence_length) < rng.uniform(1)] = IGNORE
        labels_BS[:, -1] = tokens_BR[:, -1]
        return Examples(tokens_BR[:, :-1], labels_BS)


class Rewriting(Causal):
    """Shifts every id by the epoch, behind a marker."""

    rewrites_stream = True

    def rewrite(self, stream: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        return np.concatenate([[epoch], stream.astype(np.int64) + 1000 * (epoch + 1)])


def counting(*lengths: int) -> list[Shard]:
    """Shards whose ids tell where they come from."""
    return [Shard(np.arange(n, dtype=np.uint32) + 10_000 * i, np.zeros(0, np.int64)) for i, n in enumerate(lengths)]


def stream(*lengths: int, sequence_length: int = 8, seed: int = 0, objective: Objective | None = None, shift: bool = True) -> SampleStream:
    return SampleStream(counting(*lengths), objective or Causal(), sequence_length=sequence_length, seed=seed, shift=shift)


def equal(a: Examples, b: Examples) -> bool:
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# the permutation


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_is_elementwise_and_keyed():
    size = 1_000_003
    indices = np.array([5, size - 1, 0, 77])
    assert permute(indices, size, 1).tolist() == [int(permute(np.array([i]), size, 1)[0]) for i in indices]
    assert permute(indices, size, 1).tolist() != permute(indices, size, 2).tolist()


def test_permute_looks_random():
    size, keys = 7, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, key * 0x9E3779B97F4A7C15)] += 1
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert chi_square < 80  # 36 degrees of freedom: 99.99 % of uniform tables are below 76
    order = permute(np.arange(10_000), 10_000, 3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04


# samples


def test_a_sample_is_the_same_alone_and_in_any_batch():
    whole = stream(500, 300).examples(0, 200)
    other = stream(500, 300)
    for first, count in [(150, 50), (0, 1), (7, 13), (93, 107)]:
        assert equal(other.examples(first, count), Examples(whole.tokens_BS[first : first + count], whole.labels_BS[first : first + count]))
    assert not equal(stream(500, 300, seed=1).examples(0, 50), stream(500, 300).examples(0, 50))


def test_every_window_comes_once_an_epoch_and_epochs_differ():
    samples = stream(800, 300)
    starts = [samples.examples(epoch * samples.windows, samples.windows).tokens_BS[:, 0] for epoch in range(3)]
    for epoch_starts in starts:
        ordered = np.sort(epoch_starts)
        assert len(set(ordered.tolist())) == samples.windows
        gaps = np.diff(ordered)
        assert np.count_nonzero(gaps != 8) == 1  # where the second shard begins
    assert not np.array_equal(starts[0], starts[1])
    assert len({int(s.min()) for s in starts}) > 1  # shifted


def test_the_order_differs_from_epoch_to_epoch_and_seed_to_seed():
    orders = [
        tuple(samples.examples(epoch * samples.windows, samples.windows).tokens_BS[:, 0].tolist())
        for samples in (stream(500, seed=0, shift=False), stream(500, seed=1, shift=False))
        for epoch in range(3)
    ]
    assert len(set(orders)) == 6
    assert len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("length", [57, 60, 64])
def test_windows_begin_at_every_place_in_time(length):
    samples = stream(length)
    starts = samples.examples(0, samples.windows * 80).tokens_BS[:, 0] % 8
    assert set(starts.tolist()) == set(range(8))


def test_all_positions_are_seen_in_time():
    samples = stream(60)
    seen = np.unique(samples.examples(0, samples.windows * 60).tokens_BS)
    assert seen.tolist() == list(range(59))  # the last is only ever a label


def test_windows_stay_inside_their_shard():
    samples = stream(100, 9, 5, 40)
    examples = samples.examples(0, samples.windows * 20)
    assert (np.diff(examples.tokens_BS, axis=1) == 1).all()
    assert {int(t) // 10_000 for t in examples.tokens_BS.ravel()} == {0, 1, 3}  # the third is shorter than a window


@pytest.mark.parametrize("sequence_length", [8, 300])
def test_labels_and_tokens_agree_for_short_and_long_windows(sequence_length):
    examples = stream(2000, sequence_length=sequence_length).examples(0, 20)
    assert examples.tokens_BS.dtype == examples.labels_BS.dtype == np.int64
    has_label = examples.labels_BS != IGNORE
    assert (examples.labels_BS == examples.tokens_BS + 1)[has_label].all()


def test_without_shift_windows_begin_at_zero():
    samples = stream(100, shift=False)
    starts = sorted(samples.examples(0, samples.windows).tokens_BS[:, 0].tolist())
    assert starts == list(range(0, 96, 8))[: samples.windows]
    assert samples.windows == 12  # (100 - 9) // 8 + 1


def test_an_objective_may_rewrite_the_stream_of_each_epoch():
    samples = stream(200, objective=Rewriting())
    per_epoch = samples.windows
    examples = samples.examples(0, 3 * per_epoch)  # a batch over three epochs
    for epoch in range(3):
        tokens = examples.tokens_BS[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert set((tokens // 1000).ravel().tolist()) <= {epoch + 1, 0}
    assert equal(samples.examples(0, per_epoch), Examples(examples.tokens_BS[:per_epoch], examples.labels_BS[:per_epoch]))
    assert len(samples._rewritten) <= 2


# steps


def batches(world_size: int = 1, rank: int = 0, micro_batch_size: int = 3, global_batch_size: int = 8) -> StepBatches:
    return StepBatches(
        stream(500),
        Causal(),
        sizes=BatchSizes(global_batch_size, global_batch_size, 0, 1),
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
    )


def rows(parts: list[Batch]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([b.tokens_BS.numpy() for b in parts]), np.concatenate([b.labels_BS.numpy() for b in parts])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_a_step_is_the_same_however_it_is_cut(world_size, micro_batch_size):
    reference = rows(batches(micro_batch_size=8).step(11))
    shares = [batches(world_size, rank, micro_batch_size).step(11) for rank in range(world_size)]
    for a, b in zip(reference, rows([batch for share in shares for batch in share]), strict=True):
        np.testing.assert_array_equal(a, b)
    for share in shares:
        assert all(b.tokens_BS.shape[0] <= micro_batch_size for b in share)
        assert {b.step_targets for b in share} == {sum(b.num_targets for b in share)}
        assert all(b.num_targets == int((b.labels_BS != IGNORE).sum()) for b in share)
        assert len(share) == -(-(8 // world_size) // micro_batch_size)


def test_steps_read_one_sample_after_the_other():
    """None is left out and none comes twice, wherever training begins."""
    taken = np.concatenate([rows(batches().step(step))[0] for step in range(6)])
    np.testing.assert_array_equal(taken, stream(500).examples(0, 6 * 8).tokens_BS)


def test_an_uneven_share_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.global_batch_size=8 .*multiple of 3"):
        batches(world_size=3)


@pytest.mark.parametrize("first_step", [0, 5])
def test_the_thread_changes_nothing(first_step):
    loaders = [TrainLoader(batches(), total_steps=first_step + 7, first_step=first_step, prefetch=prefetch) for prefetch in (False, True)]
    taken = [rows([batch for step in loader for batch in step]) for loader in loaders]
    assert len(taken[0][0]) == 7 * 8
    np.testing.assert_array_equal(taken[0][0], taken[1][0])
    np.testing.assert_array_equal(taken[0][1], taken[1][1])
    np.testing.assert_array_equal(taken[0][0][:8], rows(batches().step(first_step))[0])


def test_an_error_in_the_thread_is_raised():
    class Failing:
        def step(self, step):
            if step == 2:
                raise ValueError("step 2")
            return batches().step(step)

    with pytest.raises(ValueError, match="step 2"):
        for _ in TrainLoader(Failing(), total_steps=9):  # pyright: ignore[reportArgumentType]
            pass


def test_waiting_is_measured():
    import time

    class Slow:
        def step(self, step):
            time.sleep(0.02)
            return batches().step(step)[:1]

    loader = TrainLoader(Slow(), total_steps=6)  # pyright: ignore[reportArgumentType]
    assert len(list(loader)) == len(loader) == 6
    assert loader.wait_seconds > 0.06


# the data module


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedData:
    config = RepeatConfig(num_documents=2000, validation_fraction=0.2, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare(config, ByteConfig(num_sentinels=0))


def module(prepared: PreparedData, **changes) -> TokenDataModule:
    fields = {
        "sequence_length": 32,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "seed": 3,
        "total_steps": 12,
        "validation_sequences": 13,
    }
    return TokenDataModule(prepared, Causal(), **(fields | changes))


def take(loader, steps: int) -> list[Batch]:
    """Micro-batches of some steps."""
    return [batch for step in itertools.islice(loader, steps) for batch in step]


@pytest.mark.parametrize("world_size", [1, 2, 5, 20])
def test_validation_is_the_same_for_every_seed_and_split(prepared, world_size):
    reference = rows(list(module(prepared).val_dataloader()))
    assert len(reference[0]) == 13
    loaders = [module(prepared, seed=99, micro_batch_size=2, rank=r, world_size=world_size).val_dataloader() for r in range(world_size)]
    parts = [list(loader) for loader in loaders]
    assert [len(p) for p in parts] == [len(loader) for loader in loaders]
    assert len({len(loader) for loader in loaders}) == 1  # a sharded strategy would wait for the rank that has more
    for a, b in zip(reference, rows([b for p in parts for b in p if b.num_targets]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(b.step_targets == b.num_targets for p in parts for b in p)


def test_validation_takes_what_there_is(prepared):
    whole = module(prepared, validation_sequences=10**6)
    assert whole.validation_sequences == whole.validation_stream.windows
    assert sum(b.tokens_BS.shape[0] for b in whole.val_dataloader()) == whole.validation_sequences


def test_the_position_is_a_number(prepared):
    unbroken = take(module(prepared).train_dataloader(), 10)
    first = module(prepared)
    first.seek(6)
    state = first.state_dict()
    assert state["step"] == 6
    second = module(prepared)
    second.load_state_dict(state)
    np.testing.assert_array_equal(rows(take(second.train_dataloader(), 4))[0], rows(unbroken[12:])[0])
    loader = first.train_dataloader()
    first.seek(9)
    np.testing.assert_array_equal(rows(take(loader, 1))[0], rows(unbroken[18:])[0])


@pytest.mark.parametrize("change", [{"global_batch_size": 16}, {"sequence_length": 16}, {"seed": 4}])
def test_a_state_of_other_data_is_refused(prepared, change):
    with pytest.raises(ConfigError, match="position in the data does not carry over") as error:
        module(prepared, **change).load_state_dict(module(prepared).state_dict())
    assert next(iter(change)) in str(error.value)


def test_too_little_data_is_one_line(prepared):
    with pytest.raises(ConfigError, match=r"the train split has \d+ tokens in a row, and data.sequence_length=1000000") as error:
        module(prepared, sequence_length=1_000_000)
    assert "\n" not in str(error.value)


class Probe(lightning.LightningModule):
    """Records what Lightning hands to a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.validated: list[int] = []

    def training_step(self, step: list[Batch], batch_idx: int) -> torch.Tensor:
        for batch in step:
            assert isinstance(batch, Batch)
            assert batch.attention is Attention.causal
            assert isinstance(batch.num_targets, int)
            assert batch.segments_BS is None
            self.seen.append(batch.tokens_BS.clone())
        return (self.weight - 1) ** 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch.tokens_BS.shape[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(prepared: PreparedData, path, max_steps: int, resume: bool = False) -> tuple[Probe, TokenDataModule]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    probe, data = Probe(), module(prepared)
    trainer.fit(probe, data, ckpt_path=path if resume else None, weights_only=True if resume else None)
    trainer.save_checkpoint(path)
    return probe, data


def test_lightning_resumes_to_the_same_batches(prepared, tmp_path):
    unbroken, _ = fit(prepared, tmp_path / "whole.ckpt", 10)
    first, data = fit(prepared, tmp_path / "half.ckpt", 6)
    assert data.state_dict()["step"] == 6  # though batches of step 7 were made ahead
    second, _ = fit(prepared, tmp_path / "half.ckpt", 10, resume=True)
    assert len(first.seen) == 12
    torch.testing.assert_close(torch.cat([*first.seen, *second.seen]), torch.cat(unbroken.seen), rtol=0, atol=0)
    assert unbroken.validated[:4] == [4, 4, 4, 1]


def test_batches_move_as_a_whole(prepared):
    data = module(prepared)
    batch = take(data.train_dataloader(), 1)[0]
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.tokens_BS.device.type == moved.labels_BS.device.type == "meta"
    assert moved[2:5] == batch[2:5]
