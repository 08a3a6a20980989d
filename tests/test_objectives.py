"""Objectives: what holds for every one, causal, masked, schedules and prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from objective_data import num_windows, stream, vocabulary, windows
from objective_pieces import END, EOD, MASK, PAD, VARIANTS, equal, make, name_of, quick, row

from heads_lightning.batch import IGNORE, PADDING
from heads_lightning.configs.objective import (
    CausalConfig,
    FIMConfig,
    FIMLevel,
    MixtureConfig,
    MLMConfig,
    MLMCount,
    MLMUnit,
)
from heads_lightning.objectives.base import SampleRandom, document_segments
from heads_lightning.objectives.causal import Causal
from heads_lightning.objectives.multi_token import MultiToken
from heads_lightning.registry import ConfigError


@pytest.fixture(params=VARIANTS, ids=name_of)
def objective(request):
    return request.param.build(vocabulary())


class TestEveryObjective:
    @pytest.mark.parametrize("length", [3, 16, 128])
    def test_shapes_types_and_ranges(self, objective, length):
        if length == 3 and any(
            "span" in type(x).__module__ for x in [objective, *(p.objective for p in getattr(objective, "components", ()))]
        ):
            with pytest.raises(ConfigError, match="sequence_length=3 is too short"):  # sentinels alone are longer
                objective.window(length)
            return
        examples = make(objective, length, range(12))
        assert examples.tokens_BS.dtype == examples.labels_BS.dtype == np.int64
        assert examples.tokens_BS.shape == examples.segments_BS.shape == (12, length)
        assert examples.labels_BS.shape == (12, (1 + objective.steps_ahead) * length)
        assert examples.segments_BS.dtype == np.int32
        size = vocabulary().size
        assert ((examples.tokens_BS >= 0) & (examples.tokens_BS < size)).all()
        targets = examples.labels_BS[examples.labels_BS != IGNORE]
        assert ((targets >= 0) & (targets < size)).all()
        assert not np.isin(targets, [PAD, MASK]).any()
        padded = examples.segments_BS == PADDING
        assert (examples.labels_BS[np.tile(padded, (1, 1 + objective.steps_ahead))] == IGNORE).all()
        assert (examples.tokens_BS[padded] == PAD).all()
        assert (examples.tokens_BS[~padded] != PAD).all()
        for array in examples:
            assert array is None or array.flags["C_CONTIGUOUS"]

    def test_a_row_depends_on_its_own_sample_alone(self, objective):
        """Order, batch size and neighbours (so workers, ranks and resuming too) change nothing."""
        count = min(60, num_windows(objective, 96))
        whole = make(objective, 96, range(count))
        order = np.random.default_rng(0).permutation(count)
        for chunk in np.array_split(order, 7):
            mixed = make(objective, 96, chunk)
            for b, i in enumerate(chunk):
                assert equal(row(mixed, b), row(whole, i))

    def test_the_same_call_gives_the_same_bits_and_another_epoch_or_seed_others(self, objective):
        first = make(objective, 96, range(20), seed=3, epoch=1)
        assert equal(first, make(objective, 96, range(20), seed=3, epoch=1))
        if isinstance(objective, (Causal, MultiToken)) or objective.rewrites_stream:
            return
        for seed, epoch in ((3, 2), (4, 1)):
            assert not equal(first, make(objective, 96, range(20), seed=seed, epoch=epoch))

    def test_the_windows_given_are_not_changed(self, objective):
        given_BR = windows(objective, 64, range(8))
        copy = given_BR.copy()
        objective.examples(given_BR, SampleRandom(0, 0, np.arange(8)), 64)
        assert np.array_equal(given_BR, copy)

    @pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
    def test_any_integer_type_of_shards(self, objective, dtype):
        source = stream().astype(dtype)
        assert equal(make(objective, 64, range(8), source=source), make(objective, 64, range(8)))

    def test_parts_are_declared(self, objective):
        examples = make(objective, 64, range(8))
        if examples.part_BS is not None:
            assert examples.part_BS.dtype == np.int8
            assert set(np.unique(examples.part_BS)) <= set(range(len(objective.parts)))


class TestSampleRandom:
    def test_uniform(self):
        rng = SampleRandom(0, 0, np.arange(400))
        draws = rng.uniform(250)
        assert abs(draws.mean() - 0.5) < 0.004  # 4 standard deviations
        assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.2
        assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.26
        assert np.bincount(rng.uint16(1000).ravel() >> 12, minlength=16).std() < 4 * np.sqrt(25000)

    def test_draws_at_slots_do_not_depend_on_the_batch_or_on_other_draws(self):
        rng = SampleRandom(5, 1, np.array([7, 3, 9]))
        rng.bits(10)
        alone = SampleRandom(5, 1, np.array([9]))
        assert np.array_equal(rng.bits_at(np.array([2, 2]), np.array([0, 4])), alone.bits_at(np.array([0, 0]), np.array([0, 4])))
        assert rng.bits_at(np.array([0]), np.array([0]), stream=0) != rng.bits_at(np.array([0]), np.array([0]), stream=1)

    def test_slots_are_uniform_and_apart_from_the_sequence(self):
        rng = SampleRandom(0, 0, np.arange(100))
        slots = rng.uniform_at(np.arange(100)[:, None], np.arange(500))
        assert abs(slots.mean() - 0.5) < 0.006
        assert not np.isin(slots, SampleRandom(0, 0, np.arange(100)).uniform(2000)).any()


class TestDocumentSegments:
    @quick
    @given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**32 - 1))
    def test_equals_a_running_count(self, rows, width, seed):
        tokens = (np.random.default_rng(seed).random((rows, width)) < 0.7).astype(np.uint16)
        starts = tokens == 0
        starts[:, 0] = False
        segments = document_segments(tokens, 0)
        assert segments.dtype == np.int32
        assert np.array_equal(segments, np.cumsum(starts, axis=1))


class TestCausal:
    def test_labels_are_the_next_tokens_document_ends_included(self):
        objective = CausalConfig().build(vocabulary())
        count = num_windows(objective, 64)
        examples = make(objective, 64, range(count))
        source = stream()[: count * 64 + 1].astype(np.int64)
        assert np.array_equal(examples.tokens_BS.ravel(), source[:-1])
        assert np.array_equal(examples.labels_BS.ravel(), source[1:])
        assert (examples.labels_BS == EOD).any()

    def test_a_document_is_a_segment_and_its_marker_belongs_to_it(self):
        examples = make(CausalConfig().build(vocabulary()), 512, range(200))
        opens = np.diff(examples.segments_BS, axis=1) != 0
        assert np.array_equal(opens, examples.tokens_BS[:, 1:] == EOD)


class TestSchedules:
    """A row depends on (seed, epoch, index) and on how much was trained before it, which follows from them."""

    def trained(self, config, positions, count=400, length=128):
        objective = config.build(vocabulary())
        rng = SampleRandom(0, 0, np.arange(count), np.full(count, positions))
        return objective.examples(windows(objective, length, range(count)), rng, length)

    def test_a_rate_goes_from_its_start_to_its_end(self):
        config = MLMConfig(rate=0.1, rate_start=0.5, rate_tokens=1000)
        for positions, rate in ((0, 0.5), (500, 0.3), (1000, 0.1), (10**9, 0.1)):
            share = (self.trained(config, positions).labels_BS != IGNORE).mean()
            assert abs(share - rate) < 0.02
        assert equal(self.trained(config, 10**6), make(config.build(vocabulary()), 128, range(400)))  # validation: the end

    def test_fim_begins_causal(self):
        config = FIMConfig(rate=1.0, rate_start=0.0, rate_tokens=1000)
        assert END not in self.trained(config, 0).tokens_BS
        half, end = (np.isin(self.trained(config, at).tokens_BS, [END]).sum() for at in (500, 1000))
        assert 0.4 < half / end < 0.6

    def test_a_mixture_anneals(self):
        parts = {"causal": {"name": "causal", "weight": 0, "weight_start": 1}, "fim": {"name": "fim", "rate": 1.0, "weight_start": 0}}
        config = MixtureConfig(parts=parts, anneal_tokens=1000)
        shares = [(self.trained(config, at).part_BS.max(axis=1) == 0).mean() for at in (0, 500, 1000)]
        assert shares[0] == 1
        assert 0.4 < shares[1] < 0.6
        assert shares[2] == 0

    def test_rows_of_different_age_in_one_batch(self):
        objective = MLMConfig(rate=0.1, rate_start=0.9, rate_tokens=1000).build(vocabulary())
        ages = np.tile([0, 1000], 50)
        examples = objective.examples(windows(objective, 128, range(100)), SampleRandom(0, 0, np.arange(100), ages), 128)
        share = (examples.labels_BS != IGNORE).mean(axis=1)
        assert share[0::2].mean() > 0.7
        assert share[1::2].mean() < 0.15

    @pytest.mark.parametrize(
        ("kind", "fields", "message"),
        [
            (FIMConfig, {"rate_start": 0.1}, "half a schedule; add e.g. objective.rate_tokens"),
            (MLMConfig, {"rate_tokens": 10}, "half a schedule; add e.g. objective.rate_start"),
            (FIMConfig, {"rate_start": 0.1, "rate_tokens": 5, "level": FIMLevel.document}, "level=context"),
            (MixtureConfig, {"anneal_tokens": 10}, "half a schedule"),
            (MLMConfig, {"count": MLMCount.exact, "unit": MLMUnit.word}, "use objective.unit=token"),
            (MLMConfig, {"count": MLMCount.exact, "rate_start": 0.1, "rate_tokens": 5}, "leave one of them out"),
        ],
    )
    def test_refusals(self, kind, fields, message):
        with pytest.raises(ConfigError, match=message):
            kind(**fields)


class TestMLM:
    def test_exact_counts(self):
        objective = MLMConfig(count=MLMCount.exact, rate=0.3).build(vocabulary())
        examples = make(objective, 100, range(300))
        assert ((examples.labels_BS != IGNORE).sum(axis=1) == 30).all()
        at = np.nonzero(examples.labels_BS != IGNORE)[1]
        assert abs(np.bincount(at, minlength=100) - 90).max() < 5 * np.sqrt(90)  # every position alike
        few = np.zeros((50, 100), np.uint16)
        few[:, 7:9] = 900
        assert ((objective.examples(few, SampleRandom(0, 0, np.arange(50)), 100).labels_BS != IGNORE).sum(axis=1) == 2).all()

    def test_spans(self):
        v = vocabulary()
        objective = MLMConfig(unit=MLMUnit.span, rate=0.2, mask_share=1.0, random_share=0.0).build(v)
        raw = np.full((4000, 64), 900, np.uint16)
        target = objective.examples(raw, SampleRandom(0, 0, np.arange(4000)), 64).labels_BS != IGNORE
        share = target.mean(axis=0)
        assert abs(share - 0.2).max() < 6 * np.sqrt(0.2 * 0.8 / 4000)  # edges like the middle
        runs = [len(run) for row in target for run in "".join(map(str, row.astype(int))).strip("0").split("0") if run]
        assert 3.4 < np.mean(runs) < 4.6  # 3.8, fewer at the edges, more where two meet

    @pytest.mark.parametrize("unit", list(MLMUnit))
    @pytest.mark.parametrize(
        ("rate", "mask", "random"), [(0.15, 0.8, 0.1), (0.4, 1.0, 0.0), (0.3, 0.0, 1.0), (0.2, 0.0, 0.0), (1.0, 0.5, 0.5)]
    )
    def test_shares(self, unit, rate, mask, random):
        v = vocabulary()
        objective = MLMConfig(rate=rate, mask_share=mask, random_share=random, unit=unit).build(v)
        examples = make(objective, 128, range(1000))
        raw = windows(objective, 128, range(1000)).astype(np.int64)
        target = examples.labels_BS != IGNORE
        ordinary = ~v.special_V[raw]
        assert np.array_equal(examples.labels_BS[target], raw[target])
        assert not (target & ~ordinary).any()
        assert np.array_equal(examples.tokens_BS[~target], raw[~target])
        # 5 standard deviations of the binomial; a word's tokens go together, which widens it by the root of their mean square number
        spread = 5 * {MLMUnit.token: 1.0, MLMUnit.word: 2.0, MLMUnit.span: 2.5}[unit]
        n = ordinary.sum()
        assert abs(target.sum() / n - rate) < spread * np.sqrt(rate * (1 - rate) / n) + 2**-16
        n = target.sum()
        masked = (examples.tokens_BS == MASK)[target].mean()
        kept = (examples.tokens_BS == raw)[target].mean()
        assert abs(masked - mask) < spread * np.sqrt(mask * (1 - mask) / n) + 2**-14
        chance = random / ordinary.sum()
        assert abs(kept - (1 - mask - random)) < spread * np.sqrt(0.25 / n) + 2**-14 + chance + random * 2e-3
        drawn = examples.tokens_BS[target & (examples.tokens_BS != MASK)]
        assert not v.special_V[drawn].any()

    def test_words_are_whole(self):
        v = vocabulary()
        objective = MLMConfig(unit=MLMUnit.word).build(v)
        examples = make(objective, 128, range(200))
        raw = windows(objective, 128, range(200))
        target = examples.labels_BS != IGNORE
        inner = ~v.word_start_V[raw]
        inner[:, 0] = False
        inner[:, 1:] &= ~v.special_V[raw[:, :-1]]
        assert inner.any()
        b, s = np.nonzero(inner)
        assert np.array_equal(target[b, s], target[b, s - 1])
        masked = examples.tokens_BS == MASK
        assert np.array_equal(masked[b, s], masked[b, s - 1])

    @pytest.mark.parametrize("unit", list(MLMUnit))
    def test_a_row_with_an_ordinary_token_has_a_target(self, unit):
        v = vocabulary()
        objective = MLMConfig(rate=0.001, unit=unit).build(v)
        tokens = np.zeros((2000, 5), np.uint16)
        tokens[1:, 3] = 900
        tokens[1000:, 2] = 901
        examples = objective.examples(tokens, SampleRandom(0, 0, np.arange(2000)), 5)  # fewer draws choose one than rows need
        per_row = (examples.labels_BS != IGNORE).sum(axis=1)
        assert per_row[0] == 0  # nothing but markers
        assert (per_row[1:] >= 1).all()
        assert 0.75 < (examples.tokens_BS == MASK).any(axis=1)[1:].mean() < 0.85  # forced ones are split like the others

    def test_refusals(self):
        with pytest.raises(ConfigError, match="mask"):
            MLMConfig().build(vocabulary().__class__(size=10, end_of_document=0, padding=1))
        with pytest.raises(ConfigError, match="sum to more than 1"):
            MLMConfig(mask_share=0.8, random_share=0.3)
