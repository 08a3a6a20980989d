"""Span corruption and prefix language modelling: exact inversion, T5's lengths and statistics, no position sees its target."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_data import vocabulary, windows

from heads_lightning.batch import IGNORE, PADDING
from heads_lightning.configs.objective import Form, PrefixLMConfig, SpanCorruptionConfig, SpanEdges
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.objectives.span_corruption import _compositions, restore
from heads_lightning.registry import ConfigError

EOD, PAD = 0, 1


def make(objective, length, indices):
    raw = windows(objective, length, indices)
    return raw, objective.examples(raw, SampleRandom(0, 0, np.asarray(indices)), length)


class TestSpanCorruption:
    @pytest.mark.parametrize(
        ("rate", "mean", "inputs", "raw", "targets"),
        [(0.15, 3.0, 512, 568, 114), (0.5, 3.0, 512, 767, 513), (0.2, 2.0, 64, 70, 22), (0.2, 1.0, 64, 63, 27)],
    )
    def test_lengths_of_seqio(self, rate, mean, inputs, raw, targets):
        """At a rate of exactly 0.5 seqio takes one token off (766, 512), so that the target is not longer than the input; here not."""
        objective = SpanCorruptionConfig(form=Form.encoder_decoder, rate=rate, mean_length=mean, edges=SpanEdges.seqio).build(
            dataclasses.replace(vocabulary(), sentinels=tuple(range(7, 207)))
        )
        assert objective.window(inputs).length == raw
        assert objective.lengths(raw)[1] == targets

    @settings(max_examples=40, deadline=None)
    @given(st.floats(0.02, 0.9), st.floats(1, 20), st.integers(6, 90), st.sampled_from(list(SpanEdges)), st.booleans())
    def test_every_example_gives_back_its_window(self, rate, mean, length, edges, encoder_decoder):
        v = vocabulary()
        form = Form.encoder_decoder if encoder_decoder else Form.decoder_only
        config = SpanCorruptionConfig(form=form, rate=rate, mean_length=mean, edges=edges)
        objective = config.build(v)
        raw, examples = make(objective, length, range(20))
        hidden, spans = objective.counts(raw.shape[1])
        for b in range(20):
            read, labels = examples.tokens_BS[b], examples.labels_BS[b]
            target = labels[labels != IGNORE]
            assert target[-1] == EOD
            if encoder_decoder:
                source = examples.encoder_tokens_BT[b][examples.encoder_segments_BT[b] != PADDING]
                assert source[-1] == EOD
                source = source[:-1]
                assert read[0] == PAD
                assert np.array_equal(read[1 : len(target)], target[:-1])
            else:
                source = read[examples.prefix_BS[b]]
                assert np.array_equal(read[examples.segments_BS[b] != PADDING], [*source, *target[:-1]])
                assert np.array_equal(np.flatnonzero(labels != IGNORE), len(source) - 1 + np.arange(len(target)))
            assert np.array_equal(restore(source, target[:-1], v), raw[b])
            used = target[np.isin(target, v.sentinels)]
            assert len(used) in (spans, spans + (edges is SpanEdges.uniform))
            assert np.array_equal(used, v.sentinels[: len(used)])
            assert len(target) - 1 - len(used) == hidden

    @pytest.mark.parametrize("edges", list(SpanEdges))
    def test_statistics(self, edges):
        """seqio: the first token is never hidden, the last always. uniform: each token equally often."""
        v = vocabulary()
        objective = SpanCorruptionConfig(form=Form.encoder_decoder, edges=edges).build(v)
        count = 6000
        length = objective.window(64).length
        raw = np.tile(np.arange(200, 200 + length), (count, 1))
        examples = objective.examples(raw, SampleRandom(0, 0, np.arange(count)), 64)
        hidden = np.bincount(examples.labels_BS[examples.labels_BS >= 200] - 200, minlength=length) / count
        expected = objective.counts(length)[0] / length
        assert abs(hidden.mean() - expected) < 1e-9
        if edges is SpanEdges.uniform:
            assert np.abs(hidden - expected).max() < 5 * np.sqrt(expected * (1 - expected) / count)
        else:
            assert hidden[0] == 0
            assert hidden[-1] == 1

    def test_compositions_are_uniform(self):
        parts = _compositions(SampleRandom(0, 0, np.arange(6000)), 5, 3)
        kinds, counts = np.unique(parts, axis=0, return_counts=True)
        assert len(kinds) == 6  # 4 over 2
        assert (parts.sum(axis=1) == 5).all()
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)

    def test_the_encoder_may_go_without_an_end(self):
        given, plain = (SpanCorruptionConfig(form=Form.encoder_decoder, encoder_end=end).build(vocabulary()) for end in (True, False))
        assert (given.lengths(100)[0], given.lengths(100)[1]) == (plain.lengths(100)[0] + 1, plain.lengths(100)[1])
        raw, examples = make(plain, 64, range(10))
        for b in range(10):
            source = examples.encoder_tokens_BT[b][examples.encoder_segments_BT[b] != PADDING]
            target = examples.labels_BS[b][examples.labels_BS[b] != IGNORE]
            assert np.array_equal(restore(source, target[:-1], vocabulary()), raw[b])
        with pytest.raises(ConfigError, match="needs an encoder"):
            SpanCorruptionConfig(form=Form.decoder_only, encoder_end=False)

    def test_refusals(self):
        v = vocabulary()
        with pytest.raises(ConfigError, match="num_sentinels=100"):
            SpanCorruptionConfig().build(dataclasses.replace(v, sentinels=()))
        with pytest.raises(ConfigError, match=r"needs \d+ sentinels at data.sequence_length=4096, the tokenizer has 100"):
            SpanCorruptionConfig().build(v).window(4096)
        with pytest.raises(ConfigError, match=r"rate=1\.0"):
            SpanCorruptionConfig(rate=1.0)


class TestPrefixLM:
    def test_targets_are_outside_the_prefix_and_every_document_has_one(self):
        raw, examples = make(PrefixLMConfig().build(vocabulary()), 256, range(300))
        assert np.array_equal(examples.tokens_BS, raw[:, :-1])
        shares = []
        for b in range(300):
            for number in range(examples.segments_BS[b].max() + 1):
                where = np.flatnonzero(examples.segments_BS[b] == number)
                prefix = examples.prefix_BS[b][where].sum()
                assert examples.prefix_BS[b][where[:prefix]].all()  # the beginning
                targets = np.flatnonzero(examples.labels_BS[b][where] != IGNORE)
                assert np.array_equal(targets, np.arange(max(prefix - 1, 0), len(where)))
                assert np.array_equal(examples.labels_BS[b][where[targets]], raw[b][where[targets] + 1])
                shares.append(prefix / len(where))
        assert abs(np.mean(shares) - 0.5) < 0.06
        assert min(shares) < 0.05
        assert max(shares) > 0.95

    @settings(max_examples=20, deadline=None)
    @given(st.integers(4, 200), st.floats(0, 1), st.integers(0, 500), st.integers(2, 60))
    def test_encoder_decoder_gives_back_every_piece(self, length, low, first, every):
        """Prefix and rest of each document, in the same segment of the encoder and the decoder."""
        objective = PrefixLMConfig(form=Form.encoder_decoder, prefix_min=low).build(vocabulary())
        raw = windows(objective, length, [first])
        raw[:, 1::every] = EOD  # many short documents
        examples, pieces = (
            o.examples(raw, SampleRandom(0, 0, np.array([first])), length) for o in (objective, PrefixLMConfig().build(vocabulary()))
        )
        assert set(np.unique(examples.segments_BS)) - {PADDING} == set(np.unique(pieces.segments_BS))
        for number in range(pieces.segments_BS.max() + 1):
            piece = np.flatnonzero(pieces.segments_BS[0] == number)
            prefix = examples.encoder_tokens_BT[0][examples.encoder_segments_BT[0] == number]
            where = np.flatnonzero(examples.segments_BS[0] == number)
            read, labels = examples.tokens_BS[0][where], examples.labels_BS[0][where]
            assert 1 <= len(prefix) <= len(piece)
            assert np.array_equal([*prefix, *labels], raw[0][piece[0] : piece[-1] + 2])
            assert read[0] == PAD
            assert np.array_equal(read[1:], labels[:-1])

    def test_bounds(self):
        _, examples = make(PrefixLMConfig(prefix_min=0.25, prefix_max=0.5).build(vocabulary()), 256, range(100))
        share = examples.prefix_BS.mean(axis=1)
        assert share.min() > 0.23
        assert share.max() < 0.51
        with pytest.raises(ConfigError, match="prefix_max"):
            PrefixLMConfig(prefix_min=0.5, prefix_max=0.2)
