"""Fill-in-the-middle: layouts, pieces, documents, prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from objective_data import num_windows, stream, text_of, vocabulary, windows
from objective_pieces import END, EOD, MID, PRE, SUF, equal, make, name_of, quick

from heads_lightning.batch import IGNORE
from heads_lightning.configs.objective import (
    CausalConfig,
    FIMConfig,
    FIMCut,
    FIMLevel,
    FIMLoss,
    SPMLayout,
)
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.objectives.fim import split_pieces
from heads_lightning.objectives.fim_layout import fim_prompt, invert
from heads_lightning.registry import ConfigError


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

    def test_a_suffix_first_prompt_alone_needs_no_middle_sentinel(self):
        v, part = replace(vocabulary(), fim_middle=None), np.array([9])
        assert fim_prompt(part, part, v, "spm", SPMLayout.suffix_first).tolist() == [EOD, SUF, 9, PRE, 9]
        with pytest.raises(ConfigError, match="fim_middle"):
            fim_prompt(part, part, v, "psm", SPMLayout.suffix_first)

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
