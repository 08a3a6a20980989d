"""The held-out protocol on models whose answers can be computed by hand, and the functions that adapters of other harnesses call."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bigram import bigram_model

from heads_lightning.batch import IGNORE, Attention
from heads_lightning.configs.evaluation import EvaluationConfig
from heads_lightning.configs.objective import SpanCorruptionConfig
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.evaluation import masked, span_filling
from heads_lightning.evaluation.abilities import infilling
from heads_lightning.evaluation.continuation import continuation as write_on
from heads_lightning.evaluation.lm_eval import HeadsLightningLM, continue_texts, score_continuations, score_texts
from heads_lightning.evaluation.protocol import LONGEST_SPAN, HiddenLine, hidden_lines, protocol, random_spans
from heads_lightning.evaluation.scoring import evaluate, infill, infill_texts, stop_accuracy
from heads_lightning.experiment import build_model
from heads_lightning.generation import denoise, score
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.objectives.mixture import open_with
from heads_lightning.objectives.ul2 import mode_tokens
from heads_lightning.registry import ConfigError

ASK = ["evaluation.infill_lines=8", "evaluation.random_spans=8", "evaluation.text_tokens=2000", "evaluation.max_new_tokens=4"]


@pytest.fixture(scope="module")
def overrides(tiny: list[str]) -> list[str]:
    return [*tiny, *ASK]


def bits_by_count(model, texts: list[str]) -> float:
    """Of a model that gives every token the same probability."""
    tokens = sum(len(model.tokenizer.encode(text)) for text in texts)
    return math.log2(model.tokenizer.size) * tokens / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("objective", ["fim", "causal", "prefix_lm", "mlm", "masked_diffusion", "span_corruption", "ul2"])
def test_a_model_that_knows_nothing_pays_for_every_token_alike(overrides, objective):
    """Every number of the protocol is log2 V bits a token: nothing is counted twice, left out, or divided by something else."""
    model, prepared = bigram_model([*overrides, f"objective={objective}"])
    report = evaluate(model, prepared).report
    texts = list(prepared.texts("validation"))
    questions, spans = hidden_lines(texts, model.config.evaluation), random_spans(texts, model.config.evaluation)
    lines = pytest.approx(bits_by_count(model, [q.line for q in questions]), rel=1e-6)
    stretches = pytest.approx(bits_by_count(model, [q.line for q in spans]), rel=1e-6)
    found = {name: value for name, value in vars(report).items() if name.endswith("bits_per_byte") and value is not None}
    expected = {
        "fim": {"left_to_right", "infill", "prefix", "random_span", "random_span_prefix", "ngram"},
        "causal": {"left_to_right", "prefix", "random_span_prefix", "ngram"},
        "prefix_lm": {"left_to_right", "prefix", "random_span_prefix", "ngram"},
        "mlm": {"masked", "ngram"},
        "span_corruption": {"infill", "prefix", "random_span", "random_span_prefix", "ngram"},
        "ul2": {"left_to_right", "infill", "prefix", "random_span", "random_span_prefix", "ngram"},
        "masked_diffusion": {"masked", "bound", "infill", "prefix", "random_span", "random_span_prefix", "ngram"},
    }[objective]
    assert set(found) == {f"{name}_bits_per_byte" for name in expected}
    for name in ("infill", "prefix"):
        assert found.get(f"{name}_bits_per_byte", lines) == lines
    for name in ("random_span", "random_span_prefix"):
        assert found.get(f"{name}_bits_per_byte", stretches) == stretches
    size, sizes = math.log2(model.tokenizer.size), [len(b) for b in model.tokenizer.vocabulary.token_bytes]
    stream = np.concatenate([shard.tokens for shard in prepared.validation.shards])[: 2000 * 40]
    bytes_per_token = np.mean([sizes[i] for i in stream if sizes[i]])
    for name in ("left_to_right", "masked", "bound"):  # over windows: to within their choice
        assert found.get(f"{name}_bits_per_byte", size / bytes_per_token) == pytest.approx(size / bytes_per_token, rel=0.15)


def test_the_bound_of_a_uniform_model_is_exact_for_every_draw():
    may = np.random.default_rng(0).random((300, 40)) < 0.8
    hidden, factor = masked._hide(may, SampleRandom(1, 0, np.arange(300)))
    assert not (hidden & ~may).any()
    assert np.allclose(hidden.sum(axis=1) * factor, may.sum(axis=1))  # L / l · l = L
    counts = np.sort(hidden.sum(axis=1) / may.sum(axis=1))
    assert np.abs(counts - (np.arange(300) + 1) / 300).max() < 0.05  # l is spread over 1 … L
    many, _ = masked._hide(np.ones((20_000, 10), bool), SampleRandom(1, 0, np.arange(20_000)))
    assert np.abs(many.mean(axis=0) - 0.55).max() < 0.02  # every position alike: (1 + … + 10) / 100


@pytest.mark.parametrize("objective", ["fim", "span_corruption"])
def test_stop_accuracy_is_about_the_end_and_nowhere_else(overrides, objective):
    """A model that ends after every `)`: right for lines whose one `)` is their last token."""
    model, prepared = bigram_model([*overrides, f"objective={objective}"])
    v = model.tokenizer.vocabulary
    (close,) = model.tokenizer.encode(")")
    table = torch.zeros(v.size, v.size)
    table[:, v.padding] = 1.0
    table[close, v.fim_end if objective == "fim" else v.end_of_document] = 9.0
    with torch.no_grad():
        model.head.w_out.weight.copy_(table.T)
    lines = ["\nfoo(a )", "\nfoo", "\nfoo (b ) (c )"]
    assert [model.tokenizer.encode(line).tolist().count(close) for line in lines] == [1, 0, 2]
    question = hidden_lines(list(prepared.texts("validation")), model.config.evaluation)[0]
    assert [stop_accuracy(model, [question._replace(line=line)]) for line in lines] == [1.0, 0.0, 0.0]


def test_random_stretches_are_fixed_and_inside_their_documents():
    texts = ["".join(chr(97 + (i * k) % 26) for i in range(900)) for k in (1, 5, 7)] + ["short"]
    config = EvaluationConfig(random_spans=300)
    spans = random_spans(texts, config)
    assert spans == random_spans(texts, config)
    for q in spans:
        assert any(q.prefix + q.line + q.suffix in text for text in texts)
        assert 1 <= len(q.line) <= LONGEST_SPAN
        assert not q.begins_document or any(text.startswith(q.prefix + q.line) for text in texts)
    assert {1, LONGEST_SPAN} <= {len(q.line) for q in spans}
    assert random_spans(["short"], config) == []


def test_the_protocol_names_what_was_asked():
    config = EvaluationConfig()
    same = protocol("content", 0.05, replace(config, samples=9, enabled=False))
    assert same == protocol("content", 0.05, config)
    others = [protocol("other", 0.05, config), protocol("content", 0.1, config), protocol("content", 0.05, replace(config, text_tokens=9))]
    assert len({same, *others}) == 4


def test_a_mixture_is_asked_with_the_mode_of_its_part(overrides):
    parts = "{a: {name: causal, mode: true}, b: {name: fim, rate: 1.0, mode: true}}"
    model, prepared = bigram_model([*overrides, "objective=mixture", f"objective.parts={parts}"])
    v = model.tokenizer.vocabulary
    asked = infilling(model)
    assert asked is not None
    assert asked.mode == v.sentinels[-2]
    # a mode that was never trained would be a silent loss: the prompt's first token is what training puts there
    objective = model.config.objective.build(v)
    ids = np.array([[v.end_of_document, *model.tokenizer.encode("x = 1\n" * 40)][:70]])
    rows = [objective.examples(ids, SampleRandom(0, 0, np.array([i])), 64) for i in range(20)]
    firsts = {(int(e.tokens_BS[0, 0]), bool((e.tokens_BS[0] == v.fim_middle).any())) for e in rows}
    assert firsts == {(v.sentinels[-1], False), (v.sentinels[-2], True)}
    assert evaluate(model, prepared).report.infill_bits_per_byte is not None


def test_a_mode_token_opens_every_piece_and_nothing_else_moves():
    from objective_data import vocabulary, windows

    from heads_lightning.configs.objective import FIMConfig

    v = vocabulary()
    objective = FIMConfig(rate=1.0).build(v)
    made = objective.examples(windows(objective, 96, range(40)), SampleRandom(0, 0, np.arange(40)), 96)
    opened = open_with(made, 106, v)
    for b in range(40):
        for number in range(made.segments_BS[b].max() + 1):
            before, after = (x.tokens_BS[b][x.segments_BS[b] == number] for x in (made, opened))
            labels = [x.labels_BS[b][x.segments_BS[b] == number] for x in (made, opened)]
            marked = int(before[0] == v.end_of_document)
            assert after[0] == 106
            assert np.array_equal(after[1:], before[marked:])
            assert np.array_equal(labels[1][1:], labels[0][marked:])
            assert labels[1][0] in (IGNORE, labels[0][0])


class TestDenoise:
    def test_the_surest_come_first_and_the_rest_stays(self, overrides):
        model, _ = bigram_model([*overrides, "objective=masked_diffusion", "head=mlm"])
        backbone, head = build_model(model.config, model.tokenizer.size)
        mask, given = model.tokenizer.vocabulary.mask, model.tokenizer.encode("import os\n").tolist()
        row = [*given, mask, mask, mask, *given]
        special = np.flatnonzero(model.tokenizer.vocabulary.special_V).tolist()
        for steps in (1, 2, 3, 50):
            (filled,) = denoise(backbone, head, [row], mask=mask, steps=steps, forbidden_ids=special)
            assert filled[: len(given)] == given == filled[-len(given) :]
            assert not set(filled) & set(special)
        both = denoise(backbone, head, [row, [mask, *given]], mask=mask, steps=2, temperature=1.0, seed=5, forbidden_ids=special)
        assert both[0] == denoise(backbone, head, [row], mask=mask, steps=2, temperature=1.0, seed=5, forbidden_ids=special)[0]
        assert both != denoise(backbone, head, [row, [mask, *given]], mask=mask, steps=2, temperature=1.0, seed=6, forbidden_ids=special)
        with pytest.raises(ValueError, match="steps=0"):
            denoise(backbone, head, [row], mask=mask, steps=0)

    def test_a_hole_is_filled_and_what_was_not_trained_is_refused(self, overrides):
        model, _ = bigram_model([*overrides, "objective=masked_diffusion"])
        v = model.tokenizer.vocabulary
        (token,) = model.tokenizer.encode("q")
        with torch.no_grad():
            model.head.w_out.weight[token, v.mask] = 5.0
        assert masked.fill(model, "import", "os", new_tokens=3) == "qqq"
        with pytest.raises(ConfigError, match="use max_new_tokens=32"):
            masked.fill(model, "", "", new_tokens=64)
        other, _ = bigram_model([*overrides, "objective=mlm"])
        with pytest.raises(ConfigError, match="objective=masked_diffusion is"):
            masked.fill(other, "", "", new_tokens=3)
        with pytest.raises(ConfigError, match="did not train infilling"):
            infill_texts(other, [("a", "b")])


@pytest.fixture(scope="module")
def span_model(overrides):
    """A transformer that knows nothing, of span_corruption, and held-out texts."""
    plain, prepared = bigram_model([*overrides, "objective=span_corruption", "objective.rate=0.1", "objective.mean_length=64"])
    backbone, head = build_model(plain.config, plain.tokenizer.size)
    return replace(plain, backbone=backbone.eval(), head=head.eval()), list(prepared.texts("validation"))


class TestSentinelsOfADecoder:
    """span_corruption and ul2 without an encoder: the hole is a sentinel in a prefix that is read from both sides."""

    def test_a_question_is_laid_out_as_training_laid_out_examples(self, span_model):
        asked, _ = span_model
        objective, v = asked.config.objective.build(asked.tokenizer.vocabulary), asked.tokenizer.vocabulary
        width = objective.window(64).length
        ids = np.array([v.end_of_document, *asked.tokenizer.encode("x = [1, 2]\nfor i in x: print(i)\n" * 9)][:width])[None]
        whole = 0
        for index in range(30):
            made = objective.examples(ids, SampleRandom(0, 0, np.array([index])), 64)
            count, used = int(made.prefix_BS.sum()), int((made.segments_BS == 0).sum())
            if (made.labels_BS == v.sentinels[1]).any():
                continue  # a span that the roll has cut in two
            hidden = made.labels_BS[0, count : used - 1]
            rows = [span_filling._Asked(made.tokens_BS[0, :count], hidden, np.append(hidden, v.end_of_document))]
            mine = span_filling._decoder_only(asked, rows)
            assert np.array_equal(mine.tokens_BS, made.tokens_BS[:, :used])
            assert np.array_equal(mine.prefix_BS, made.prefix_BS[:, :used])
            assert np.array_equal(mine.labels_BS[0, count:], made.labels_BS[0, count:used])  # training also asks for the sentinel itself
            whole += 1
        assert whole > 10

    def test_an_answer_is_what_scoring_finds_likeliest(self, span_model):
        """Token by token with a cache, and all at once: the same prefix, the same places, the same end."""
        asked, texts = span_model
        questions = hidden_lines(texts, asked.config.evaluation)
        answers = span_filling.fill(asked, questions, max_new_tokens=4)
        assert any(answers)
        for question, answer in zip(questions, answers, strict=True):
            ids = np.array(answer, np.int64)
            sources = span_filling.source(asked, question, with_suffix=True)
            if len(ids):
                (scores,) = span_filling._score(asked, [span_filling._Asked(sources, ids[:-1], ids)], hits=True)
                assert scores.hits_BS[-len(ids) :].all()
            v, text = asked.tokenizer.vocabulary, question
            before, after = asked.tokenizer.encode(text.prefix), asked.tokenizer.encode(text.suffix)
            at = sources.tolist().index(v.sentinels[0])
            assert before.tolist()[len(before) - 3 :] == sources[max(at - 3, 0) : at].tolist()[-len(before) :][-3:]
            assert after.tolist()[:3] == sources[at + 1 : at + 4].tolist()
            assert len(sources) + 1 + 4 <= asked.config.data.sequence_length

    @pytest.mark.parametrize("parts", [[], ["backbone=t5", "head=t5"]], ids=["decoder", "encoder-decoder"])
    @pytest.mark.parametrize("end", ["end_of_document", "sentinel"])
    def test_an_answer_goes_on_from_the_first_sentinel_to_the_next_or_the_end(self, overrides, parts, end):
        """A model that reads one token: `q` follows the first sentinel, `z` the start token, text and any other sentinel."""
        asked, prepared = bigram_model([*overrides, *parts, "objective=span_corruption"])
        v = asked.tokenizer.vocabulary
        (q,), (z,) = asked.tokenizer.encode("q"), asked.tokenizer.encode("z")
        table = torch.zeros(v.size, v.size)
        table[:, z] = 1.0
        table[v.sentinels[0], q] = 2.0
        table[q, v.end_of_document if end == "end_of_document" else v.sentinels[1]] = 2.0
        with torch.no_grad():
            asked.head.w_out.weight.copy_(table.T)
        questions = hidden_lines(list(prepared.texts("validation")), asked.config.evaluation)
        many = (questions * 20)[: span_filling.ROWS + 1]
        assert span_filling.fill(asked, many, max_new_tokens=3) == [[q]] * len(many)
        assert infill(asked, "import os", "", InfillRequest(checkpoint="somewhere", max_new_tokens=3)) == "q"

    @pytest.mark.parametrize("parts", [[], ["backbone=t5", "head=t5"]], ids=["decoder", "encoder-decoder"])
    def test_a_source_holds_what_the_question_tells_and_fits(self, overrides, parts):
        asked, _ = bigram_model([*overrides, *parts, "objective=ul2", "objective.mode_tokens=true"])
        v, objective, encode = asked.tokenizer.vocabulary, asked.config.objective, asked.tokenizer.encode
        encodes = objective.attention == Attention.encoder_decoder
        end = [v.end_of_document] if encodes else []
        (mode,), question = span_filling._mode(asked), HiddenLine("import os\n", "", "\nx = 1", "", "", begins_document=True)
        assert mode == mode_tokens(objective, v)["r"]  # in the place of the marker
        before, hole, after = encode("import os\n").tolist(), v.sentinels[0], encode("\nx = 1").tolist()
        assert span_filling.source(asked, question, with_suffix=True).tolist() == [mode, *before, hole, *after, *end]
        assert span_filling.source(asked, question, with_suffix=False).tolist() == [mode, *before, hole, *end]
        long = question._replace(prefix="a = 1\n" * 500, suffix="b = 2\n" * 500)
        written = 0 if encodes else 1 + asked.config.evaluation.max_new_tokens
        assert len(span_filling.source(asked, long, with_suffix=True)) + written == asked.config.data.sequence_length
        plain = replace(asked, config=replace(asked.config, objective=replace(objective, mode_tokens=False)))
        opened, inside = (
            span_filling.source(plain, question._replace(begins_document=begins), with_suffix=True)[0] for begins in (True, False)
        )
        assert (opened, inside) == (v.end_of_document, before[0])
        hot = InfillRequest(checkpoint="somewhere", max_new_tokens=4, temperature=1.0)
        assert len({infill(asked, "a", "b", replace(hot, seed=seed)) for seed in range(4)}) > 1
        if encodes:
            span = SpanCorruptionConfig(form=objective.form).build(v)
            window = np.tile(before, 99)[None, : span.window(64).length]
            read = span.examples(window, SampleRandom(0, 0, np.arange(1)), 64).tokens_BS
            assert span_filling._opening(asked) == read[0, :2].tolist()

    def test_the_command_answers_and_refuses_a_layout(self, span_model):
        asked, _ = span_model
        request = InfillRequest(checkpoint="somewhere", max_new_tokens=3)
        assert isinstance(infill(asked, "import os\n", "\nx = 1\n", request), str)
        with pytest.raises(ConfigError, match="leave layout out"):
            infill(asked, "a", "b", replace(request, layout="psm"))


@pytest.mark.parametrize("objective", ["fim", "span_corruption", "masked_diffusion", "causal"])
def test_an_answer_longer_than_the_sequences_is_refused(overrides, objective):
    asked, _ = bigram_model([*overrides, f"objective={objective}"])
    request = InfillRequest(checkpoint="somewhere", max_new_tokens=100_000)
    with pytest.raises(ConfigError, match="max_new_tokens=100000 does not fit sequences of 64 positions; use max_new_tokens=32"):
        write_on(asked, "a", request) if objective == "causal" else infill(asked, "a", "b", request)
    if objective == "causal":  # what is asked for by default is longer than these short sequences, and allowed
        assert isinstance(write_on(asked, "a", replace(request, max_new_tokens=100)), str)


@pytest.fixture(scope="module")
def model(overrides):
    """A causal one with random logits."""
    plain, _ = bigram_model([*overrides, "objective=causal"])
    with torch.no_grad():
        plain.head.w_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    return plain


class TestHarness:
    """What lm-eval would ask, without it."""

    def test_continuations_are_scored_as_by_score(self, model):
        pairs = [("def f(", "x):"), ("import os", " "), ("", "hello"), ("x " * 400, "end")]
        marker = model.tokenizer.vocabulary.end_of_document
        for (context, continuation), (loglikelihood, _) in zip(pairs, score_continuations(model, pairs), strict=True):
            kept = context.rstrip()
            before, target = model.tokenizer.encode(kept), model.tokenizer.encode(context[len(kept) :] + continuation)
            ids = [marker, *before[-40:].tolist(), *target.tolist()]  # a bigram needs no more
            marks = [False] * (len(ids) - len(target)) + [True] * len(target)
            assert loglikelihood == pytest.approx(-score(model.backbone, model.head, [ids], [marks])[0], rel=1e-5)

    def test_greedy_is_told(self, model):
        marker = model.tokenizer.vocabulary.end_of_document
        best = int((model.head.w_out.weight[:, marker]).argmax())
        text = model.tokenizer.decode([best])
        if model.tokenizer.encode(text).tolist() == [best]:
            assert score_continuations(model, [("", text)])[0][1]
        assert not score_continuations(model, [("import", " os.path as something")])[0][1]

    def test_a_long_text_is_scored_once_a_token(self, model):
        text = "for i in range(10): print(i)\n" * 30
        ids = [model.tokenizer.vocabulary.end_of_document, *model.tokenizer.encode(text).tolist()]
        marks = [False] + [True] * (len(ids) - 1)
        assert score_texts(model, [text])[0] == pytest.approx(-score(model.backbone, model.head, [ids], [marks])[0], rel=1e-5)

    def test_generation_stops_where_told(self, model):
        (answer,) = continue_texts(model, [("import", {"max_gen_toks": 12})])
        assert answer
        (cut,) = continue_texts(model, [("import", {"max_gen_toks": 12, "until": [answer[2]]})])
        assert cut == answer[: answer.index(answer[2])]

    def test_without_the_harness_the_extra_is_named(self):
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            with pytest.raises(ConfigError, match=r"pip install 'heads-lightning\[lm-eval\]'"):
                HeadsLightningLM("somewhere")
