"""Properties of the objectives: every row is a function of its own sample, targets are right, nothing transformed is ever broken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from objective_data import num_windows, stream, text_of, vocabulary, windows

from heads_lightning.batch import IGNORE, PADDING
from heads_lightning.configs.objective import (
    CausalConfig,
    FIMConfig,
    FIMCut,
    FIMLevel,
    FIMLoss,
    MixtureConfig,
    MLMConfig,
    MLMCount,
    MLMUnit,
    ObjectiveConfig,
    SPMLayout,
    objectives,
)
from heads_lightning.objectives.base import SampleRandom, document_segments
from heads_lightning.objectives.causal import Causal
from heads_lightning.objectives.fim import split_pieces
from heads_lightning.objectives.fim_layout import fim_prompt, invert
from heads_lightning.objectives.multi_token import MultiToken
from heads_lightning.registry import ConfigError

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
EOD, PAD, MASK, PRE, SUF, MID, END = range(7)

VARIANTS = [config() for _, config in objectives.items()] + [
    FIMConfig(rate=1.0, spm=SPMLayout.variant1),
    FIMConfig(rate=1.0, cut=FIMCut.token, loss_on=FIMLoss.middle),
    FIMConfig(level=FIMLevel.document),
    MLMConfig(unit=MLMUnit.word),
    MLMConfig(rate=0.4, mask_share=0.5, random_share=0.5),
    MLMConfig(unit=MLMUnit.span),
    MLMConfig(count=MLMCount.exact),
    FIMConfig(rate=1.0, cut=FIMCut.syntax),
    FIMConfig(rate=1.0, spm=SPMLayout.suffix_first),
    MixtureConfig(parts={"a": {"name": "causal", "mode": True}, "b": {"name": "fim", "rate": 1.0, "mode": True}}),
]


def name_of(config: ObjectiveConfig) -> str:
    changed = {k: v for k, v in vars(config).items() if v != getattr(type(config)(), k)}
    return " ".join([config.name, *(f"{k}={v}" for k, v in changed.items())])


@pytest.fixture(params=VARIANTS, ids=name_of)
def objective(request):
    return request.param.build(vocabulary())


def make(objective, length, indices, seed=0, epoch=0, source=None):
    indices = np.asarray(indices)
    return objective.examples(windows(objective, length, indices, source), SampleRandom(seed, epoch, indices), length)


def row(examples, b):
    return [None if x is None else x[b] for x in examples]


def equal(a, b):
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


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


def pieces_of(examples):
    """(row, ids, labels, parts) of every piece."""
    for b in range(len(examples.tokens_BS)):
        for number in range(examples.segments_BS[b].max() + 1):
            where = examples.segments_BS[b] == number
            assert np.ptp(np.flatnonzero(where)) == where.sum() - 1
            yield b, examples.tokens_BS[b][where], examples.labels_BS[b][where], examples.part_BS[b][where]


FIM_VARIANTS = [
    FIMConfig(rate=rate, spm_rate=spm_rate, cut=cut, spm=spm, loss_on=loss_on)
    for rate, spm_rate, cut, spm, loss_on in [
        (0.5, 0.5, FIMCut.char, SPMLayout.variant2, FIMLoss.all),
        (1.0, 0.5, FIMCut.char, SPMLayout.variant1, FIMLoss.all),
        (1.0, 0.0, FIMCut.token, SPMLayout.variant2, FIMLoss.middle),
        (0.7, 1.0, FIMCut.char, SPMLayout.variant2, FIMLoss.middle),
        (1.0, 1.0, FIMCut.token, SPMLayout.variant1, FIMLoss.all),
        (1.0, 0.5, FIMCut.line, SPMLayout.variant2, FIMLoss.all),
        (1.0, 0.5, FIMCut.syntax, SPMLayout.variant2, FIMLoss.all),
        (1.0, 1.0, FIMCut.char, SPMLayout.suffix_first, FIMLoss.all),
    ]
]


class TestFIM:
    @pytest.mark.parametrize("config", FIM_VARIANTS, ids=name_of)
    @pytest.mark.parametrize("length", [3, 8, 40, 128, 512])
    def test_no_piece_is_broken(self, config, length):
        """Every transformed piece has its sentinels once, its end marker last, and gives back its source: a stretch of the window."""
        v = vocabulary()
        objective = config.build(v)
        count = min(300, num_windows(objective, length))
        raw = windows(objective, length, range(count))
        transformed = 0
        for b, ids, labels, parts in pieces_of(make(objective, length, range(count))):
            source = invert(ids, v)
            assert text_of(source, v) in text_of(raw[b], v)
            assert (source[0] == EOD) == (ids[0] == EOD)
            if not np.isin(ids, [PRE, SUF, MID, END]).any():
                assert (labels[:-1] == ids[1:]).all()
                assert not parts.any()
                continue
            transformed += 1
            sentinels = [PRE, SUF, END] if config.spm is SPMLayout.suffix_first else [PRE, SUF, MID, END]
            assert sorted(ids[np.isin(ids, [PRE, SUF, MID, END])].tolist()) == sentinels
            assert ids[-1] == END
            assert labels[-1] == IGNORE
            assert labels[-2] == END
            self.check_targets(ids, labels, parts, config)
        assert transformed > 0 or config.rate == 0 or length < 5

    def check_targets(self, ids, labels, parts, config):
        assert parts[-2] == 1
        infill = np.flatnonzero(parts)
        assert np.array_equal(infill, np.arange(infill[0], len(ids) - 1))  # one run, up to END
        assert infill[0] >= np.flatnonzero(ids == (PRE if config.spm is SPMLayout.suffix_first else MID))[0]
        assert (labels[infill] == ids[infill + 1]).all()
        rest = np.setdiff1d(np.arange(len(ids) - 1), infill)
        if config.loss_on is FIMLoss.middle:
            assert (labels[rest] == IGNORE).all()
        else:
            marker = int(ids[0] == EOD)
            assert (labels[:marker] == IGNORE).all()
            assert (labels[rest[marker:]] == ids[rest[marker:] + 1]).all()

    @pytest.mark.parametrize("config", FIM_VARIANTS, ids=name_of)
    def test_pieces_cover_the_window(self, config):
        """In order, without gaps: only the end of the last pieces of a row may be missing, and little of it."""
        v = vocabulary()
        objective = config.build(v)
        count = min(200, num_windows(objective, 128))
        raw = windows(objective, 128, range(count))
        texts: dict[int, bytes] = {}
        for b, ids, _, _ in pieces_of(make(objective, 128, range(count))):
            texts[b] = texts.get(b, b"") + text_of(invert(ids, v), v)
        lost = 0
        for b in range(count):
            whole = text_of(raw[b][:-1], v)
            assert whole.startswith(texts[b])
            lost += len(whole) - len(texts[b])
        assert lost < 0.02 * count * 128 * 3

    def test_rate_zero_is_causal(self):
        v = vocabulary()
        for cut in (FIMCut.char, FIMCut.token):
            fim, causal = FIMConfig(rate=0.0, cut=cut).build(v), CausalConfig().build(v)
            assert fim.window(128) == causal.window(128)
            assert equal(make(fim, 128, range(100))[:3], make(causal, 128, range(100))[:3])

    @pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.2), (1.0, 1.0), (1.0, 0.0)])
    def test_rates(self, rate, spm_rate):
        objective = FIMConfig(rate=rate, spm_rate=spm_rate, cut=FIMCut.token, spm=SPMLayout.variant1).build(vocabulary())
        kinds = []
        for seed in range(3):
            for _, ids, _, _ in pieces_of(make(objective, 256, range(300), seed=seed)):
                if len(ids) > 20:  # those cut short for room may be left as they are
                    pre, suf = ([*np.flatnonzero(ids == k), -1][0] for k in (PRE, SUF))
                    kinds.append(0 if pre < 0 else 1 if pre < suf else 2)
        counts = np.bincount(kinds, minlength=3) / len(kinds)
        bound = 4.5 * np.sqrt(0.25 / len(kinds))
        assert abs(counts[1] + counts[2] - rate) <= bound * (rate < 1)
        assert abs(counts[2] - rate * spm_rate) <= bound * (spm_rate not in (0, 1) or rate < 1)

    def test_cuts_are_uniform_over_characters(self):
        v = vocabulary()
        text = "héllo wörld, ça va? 日本語 x = [1, 2]\n"
        objective = FIMConfig(rate=1.0, spm_rate=0.0).build(v)
        ids = np.array([EOD, *v.encode(text), EOD], np.uint16)
        raw = np.tile(ids, (6000, 1))
        length = len(ids) + 20
        objective.reserve = lambda length: 0  # the whole document fits in any case
        examples = objective.examples(raw, SampleRandom(0, 0, np.arange(6000)), length)
        cuts = []
        for _, piece, _, _ in pieces_of(examples):
            pre, suf, mid = (int(np.flatnonzero(piece == k)[0]) for k in (PRE, SUF, MID))
            prefix, middle = (text_of(x, v).decode() for x in (piece[pre:suf], piece[mid:]))
            cuts.append((len(prefix), len(prefix) + len(middle)))
        places = np.bincount(np.array(cuts).ravel(), minlength=len(text) + 1)
        assert len(places) == len(text) + 1
        expected = 12000 / len(places)
        assert (np.abs(places - expected) < 5 * np.sqrt(expected)).all()

    @quick
    @given(st.text(min_size=0, max_size=60), st.integers(0, 2**31), st.booleans(), st.sampled_from(list(SPMLayout)), st.floats(0, 1))
    def test_any_text_comes_back(self, text, seed, by_char, spm, spm_rate):
        """Also empty, multi-byte, and cut where a window splits a character."""
        v = vocabulary()
        config = FIMConfig(rate=1.0, spm_rate=spm_rate, spm=spm, cut=FIMCut.char if by_char else FIMCut.token)
        objective = config.build(v)
        ids = np.array([EOD, *v.encode(text), EOD, *v.encode("next"), EOD], np.uint16)
        for first in range(min(4, len(ids) - 3)):  # a later start may be inside a character
            window = ids[first:][None]
            length = len(ids) + 30
            examples = objective.examples(window, SampleRandom(seed, 0, np.array([first])), length)
            back = b"".join(text_of(invert(p, v), v) for _, p, _, _ in pieces_of(examples))
            assert back == text_of(window[0][:-1], v)

    def test_parts_are_tokenised_as_if_each_stood_alone(self):
        v = vocabulary()
        objective = FIMConfig(rate=1.0, spm_rate=0.0).build(v)
        checked = 0
        for _, ids, _, _ in pieces_of(make(objective, 256, range(400), seed=1)):
            if END not in ids:
                continue
            source = invert(ids, v)[int(ids[0] == EOD) :]
            text = text_of(source, v)
            pre, suf, mid, end = (int(np.flatnonzero(ids == k)[0]) for k in (PRE, SUF, MID, END))
            parts = [ids[pre + 1 : suf], ids[mid + 1 : end], ids[suf + 1 : mid]]
            try:
                whole = text.decode()
            except UnicodeDecodeError:
                continue  # a window's edge inside a character
            # the window's own edges keep the ids of the stream: judge the pieces whose ends are ends of tokenised text too
            if text_of(v.encode(whole)[:1], v) != text_of(source[:1], v) or text_of(v.encode(whole)[-1:], v) != text_of(source[-1:], v):
                continue
            checked += 1
            for part in parts:
                assert part.tolist() == v.encode(text_of(part, v).decode())
        assert checked > 200

    def test_packed_documents_are_apart(self):
        """Another first document changes nothing in the pieces after it but their places."""
        v = vocabulary()
        objective = FIMConfig(rate=0.0).build(v)
        a, b = v.encode("x = 1\n"), v.encode("y = 2\n")
        rest = [EOD, *v.encode("def f():\n    return 3\n"), EOD]
        both = np.array([[EOD, *a, *rest], [EOD, *b, *rest]], np.uint16)
        examples = objective.examples(both, SampleRandom(0, 0, np.array([0, 0])), both.shape[1] - 1)
        second = examples.segments_BS[0] == 1
        assert np.array_equal(examples.segments_BS[0], examples.segments_BS[1])
        assert np.array_equal(examples.tokens_BS[0][second], examples.tokens_BS[1][second])

    def test_many_small_documents_in_a_window(self):
        """More sentinels than any reserve: what does not fit is left out whole, nothing is broken."""
        v = vocabulary()
        objective = FIMConfig(rate=1.0).build(v)
        source = np.tile(np.array([EOD, *v.encode("ab cd")], np.uint16), 60)
        for length in (3, 5, 9, 16, 33, 64):
            examples = make(objective, length, range(3), source=source)
            for _, ids, _, _ in pieces_of(examples):
                assert text_of(invert(ids, v), v) in b"ab cd"
                assert not np.isin(ids, [PRE, SUF, MID]).any() or ids[-1] == END

    def test_refuses_a_vocabulary_without_sentinels(self):
        with pytest.raises(ConfigError, match="fim_prefix, fim_suffix, fim_middle, fim_end"):
            FIMConfig().build(vocabulary().__class__(size=10, end_of_document=0, padding=1))


class TestFIMOfDocuments:
    def test_suffix_first_is_refused(self):
        with pytest.raises(ConfigError, match="use level=context"):
            FIMConfig(level=FIMLevel.document, spm=SPMLayout.suffix_first).build(vocabulary())

    @pytest.mark.parametrize("cut", list(FIMCut))
    @pytest.mark.parametrize("spm", [SPMLayout.variant1, SPMLayout.variant2])
    def test_documents_come_back(self, cut, spm):
        v = vocabulary()
        objective = FIMConfig(level=FIMLevel.document, rate=0.8, cut=cut, spm=spm).build(v)
        source = stream()
        out = objective.rewrite(source, 3, 1)
        assert len(out) >= len(source)
        assert out.dtype == source.dtype
        originals, changed = (np.split(x, np.flatnonzero(x == EOD)[1:]) for x in (source, out))
        assert len(originals) == len(changed)
        assert all(text_of(invert(c, v), v) == text_of(o, v) for c, o in zip(changed, originals, strict=True))
        assert 0.6 < np.mean([END in c for c in changed]) < 0.95
        assert np.array_equal(out, objective.rewrite(source, 3, 1))
        assert not np.array_equal(out, objective.rewrite(source, 3, 2))

    def test_a_document_depends_on_its_number_alone(self):
        objective = FIMConfig(level=FIMLevel.document).build(vocabulary())
        source = stream()
        third = np.flatnonzero(source == EOD)[3]
        first = objective.rewrite(source[:third], 0, 0)
        assert np.array_equal(objective.rewrite(source, 0, 0)[: len(first)], first)

    def test_targets(self):
        v = vocabulary()
        for loss_on in FIMLoss:
            objective = FIMConfig(level=FIMLevel.document, rate=1.0, loss_on=loss_on).build(v)
            out = objective.rewrite(stream(), 0, 0)
            examples = make(objective, 1024, range(150), source=out)
            assert (examples.labels_BS[examples.tokens_BS == END] == IGNORE).all()
            assert (examples.labels_BS == END).any()
            after = examples.labels_BS[examples.tokens_BS == EOD]
            assert not np.isin(after, [PRE, SUF]).any()
            if loss_on is FIMLoss.middle:
                assert (examples.labels_BS[examples.tokens_BS == PRE] == IGNORE).all()
                assert (examples.part_BS[examples.labels_BS == END] == 1).all()


class TestPrompt:
    @pytest.mark.parametrize("spm", list(SPMLayout))
    @pytest.mark.parametrize("layout", ["psm", "spm"])
    def test_equals_the_layout_of_training(self, spm, layout):
        v = vocabulary()
        objective = FIMConfig(rate=1.0, spm_rate=float(layout == "spm"), spm=spm).build(v)
        checked = 0
        for _, ids, _, parts in pieces_of(make(objective, 200, range(100))):
            if END not in ids:
                continue
            first = np.flatnonzero(parts)[0] + 1
            middle = ids[first:-1]
            marker = int(ids[0] == EOD)
            pre, suf, mid = ([*np.flatnonzero(ids == k).tolist(), first][0] for k in (PRE, SUF, MID))
            suffix = ids[suf + 1 : pre if pre > suf else mid]
            prefix = ids[mid + 1 : first] if layout == "spm" and spm is SPMLayout.variant2 else ids[pre + 1 : mid if pre > suf else suf]
            prompt = fim_prompt(prefix, suffix, v, layout, spm, document_start=bool(marker))
            assert np.array_equal(np.concatenate([prompt, middle, [END]]), ids)
            checked += 1
        assert checked > 50

    def test_refuses_another_layout(self):
        with pytest.raises(ConfigError, match="psm or spm"):
            fim_prompt(np.array([9]), np.array([9]), vocabulary(), "mps")

    def test_invert_refuses_a_broken_piece(self):
        with pytest.raises(ValueError, match="not one whole"):
            invert(np.array([EOD, PRE, 200, SUF, 201, MID, 202]), vocabulary())


def test_what_stays_left_to_right_beside_transformed_pieces_is_the_stream_and_the_token_after_it():
    """Also at the end of a row, where pieces before it have grown and it has given up its end."""
    v, width = vocabulary(), 96
    objective = FIMConfig(rate=0.5).build(v)
    source = stream().copy()
    source[np.random.default_rng(0).integers(0, len(source), len(source) // 20)] = v.end_of_document
    rows = np.arange(num_windows(objective, width, source))
    raw = windows(objective, width, rows, source)
    made = objective.examples(raw, SampleRandom(0, 0, rows), width)
    pieces, flat, at_the_end = split_pieces(raw, v.end_of_document), raw.reshape(-1), 0
    for row, number, start in zip(pieces.rows.tolist(), pieces.numbers.tolist(), pieces.starts.tolist(), strict=True):
        ids, labels = (x[row][made.segments_BS[row] == number] for x in (made.tokens_BS, made.labels_BS))
        if len(ids) and PRE not in ids:
            assert ids.tolist() == flat[start : start + len(ids)].tolist()
            assert labels[-1] == flat[start + len(ids)] or labels[-1] == IGNORE
            at_the_end += bool(made.segments_BS[row, -1] == number and labels[-1] != IGNORE)
    assert at_the_end > 10
