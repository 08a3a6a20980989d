"""Cuts between characters: ids equal to encoding each part in full, on whole documents and for several pre-tokenizers."""

from __future__ import annotations

import ast
import dataclasses
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from objective_data import MULTI_BYTE, documents, text_of, tokenizer, vocabulary

from heads_lightning.objectives.base import Vocabulary, gather_ranges
from heads_lightning.objectives.cuts import CharCutter, TokenCutter
from heads_lightning.objectives.syntax import node_span
from heads_lightning.registry import ConfigError

PATTERNS = {
    "gpt2": None,
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def parts_of(cutter, ids, draws, start=0):
    """[(prefix, middle, suffix)] as lists of ids."""
    ends = np.full(len(draws), len(ids))
    cut = cutter.cut(cutter.measure(ids), np.full(len(draws), start), ends, draws)
    source = np.concatenate([ids, cut.extra]).tolist()
    for starts, lengths in zip(cut.starts_7P.T.tolist(), cut.lengths_7P.T.tolist(), strict=True):
        a, b, c, d, e, f, g = (source[s : s + n] for s, n in zip(starts, lengths, strict=True))
        yield a + b, c + f + d, e + g


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_equal_to_encoding_each_part_in_full(pattern):
    v = vocabulary(1500, pattern)
    cutter = CharCutter(v)
    rng = np.random.default_rng(1)
    checked = 0
    for text in documents():
        text = text[:2500]
        ids = np.array(v.encode(text), np.uint16)
        draws = rng.random((18, 2))
        draws[:9, 1] = np.minimum(draws[:9, 0] + rng.random(9) * 20 / len(text), 0.999999)  # also cuts near one another
        for draw, parts in zip(draws, parts_of(cutter, ids, draws), strict=True):
            a, b = sorted((draw * (len(text) + 1)).astype(int).tolist())
            for got, part in zip(parts, (text[:a], text[a:b], text[b:]), strict=True):
                assert text_of(got, v).decode() == part
                assert got == v.encode(part)
            checked += 1
    assert checked > 900


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_every_place_of_a_multi_byte_text(pattern):
    v = vocabulary(1500, pattern)
    ids = np.array(v.encode(MULTI_BYTE), np.uint16)
    places = (np.arange(len(MULTI_BYTE) + 1) + 0.5) / (len(MULTI_BYTE) + 1)
    draws = np.stack([places, np.roll(places, 1)], axis=1)
    for k, parts in enumerate(parts_of(CharCutter(v), ids, draws)):
        a, b = sorted([k, (k - 1) % len(places)])
        for got, part in zip(parts, (MULTI_BYTE[:a], MULTI_BYTE[a:b], MULTI_BYTE[b:]), strict=True):
            assert got == v.encode(part)


@pytest.mark.parametrize("last", ["", "\n", "no line end", "\n\n"])
def test_cuts_between_lines(last):
    """At line starts and the ends of the piece alone, each as often as another; ids as of each part alone."""
    v = vocabulary()
    text = "\n\n\ndef f():\n    return 'é'\n\n\n\t# 日本\n    x = 1\n" + last
    ids = np.array(v.encode("before\n") + v.encode(text) + v.encode("\n\nafter"), np.uint16)
    start, end = len(v.encode("before\n")), len(ids) - len(v.encode("\n\nafter"))
    cutter = CharCutter(v, lines=True)
    draws = np.random.default_rng(0).random((3000, 2))
    cut = cutter.cut(cutter.measure(ids), np.full(3000, start), np.full(3000, end), draws)
    source = np.concatenate([ids, cut.extra])
    places = []
    for starts, lengths in zip(cut.starts_7P.T, cut.lengths_7P.T, strict=True):
        a, b, c, d, e, f, g = (source[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True))
        parts = [text_of(part, v).decode() for part in (a + b, c + f + d, e + g)]
        assert "".join(parts) == text
        assert [a + b, c + f + d, e + g] == [v.encode(part) for part in parts]
        places += [len(parts[0]), len(parts[0]) + len(parts[1])]
    allowed = sorted({0, len(text), *(k + 1 for k, c in enumerate(text) if c == "\n")})
    kinds, counts = np.unique(places, return_counts=True)
    assert kinds.tolist() == allowed
    assert np.abs(counts - 6000 / len(allowed)).max() < 5 * np.sqrt(6000 / len(allowed))


def test_long_words_and_a_full_table():
    """Cells longer than the cutter looks at once; tables that are emptied on the way."""
    v = vocabulary()
    text = "'" + "'x" * 60 + "日本語テキスト" * 20 + "a" * 90
    ids = np.array(v.encode(text), np.uint16)
    cutter = CharCutter(v)
    cutter.cells.table_size = 50
    rng = np.random.default_rng(2)
    for _ in range(30):
        draws = rng.random((10, 2))
        for draw, parts in zip(draws, parts_of(cutter, ids, draws), strict=True):
            a, b = sorted((draw * (len(text) + 1)).astype(int).tolist())
            assert [*map(list, parts)] == [v.encode(text[:a]), v.encode(text[a:b]), v.encode(text[b:])]
    assert len(cutter.cells) <= 50


def test_threads_share_the_tables():
    """The thread that makes training's next step cuts while a validation does; the tables are emptied again and again."""
    v = vocabulary()
    text = documents()[0][:1500]
    ids = np.array(v.encode(text), np.uint16)
    cutter = CharCutter(v)
    cutter.cells.table_size = 90

    def cut(seed: int) -> int:
        rng, wrong = np.random.default_rng(seed), 0
        for _ in range(25):
            draws = rng.random((20, 2))
            for draw, parts in zip(draws, parts_of(cutter, ids, draws), strict=True):
                a, b = sorted((draw * (len(text) + 1)).astype(int).tolist())
                wrong += [text_of(part, v).decode() for part in parts] != [text[:a], text[a:b], text[b:]]
        return wrong

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(cut, range(4))) == [0] * 4
    finally:
        sys.setswitchinterval(interval)


def test_special_tokens_in_a_text_are_atoms():
    v = vocabulary()
    ids = np.array([*v.encode("ab"), v.sentinels[0], *v.encode("cd ef")], np.uint16)
    for parts in parts_of(CharCutter(v), ids, np.random.default_rng(0).random((200, 2))):
        joined = [i for part in parts for i in part]
        assert joined.count(v.sentinels[0]) == 1
        assert text_of(joined[: joined.index(v.sentinels[0])], v) == b"ab"


def test_a_byte_vocabulary_needs_no_encoding():
    def refuse(text):
        assert text.startswith("def readAll(self")  # the probe's text alone
        return list(text.encode())

    v = Vocabulary(size=257, end_of_document=256, padding=256, token_bytes=tuple(bytes([b]) for b in range(256)), encode=refuse)
    with pytest.raises(AssertionError):
        CharCutter(v)  # the probe compares with encoding in full
    cutter = CharCutter(dataclasses.replace(v, encode=lambda text: list(text.encode())))
    text = "aéb日c"
    for a, b, c in parts_of(cutter, np.array(list(text.encode())), np.random.default_rng(0).random((100, 2))):
        assert "".join(bytes(x).decode() for x in (a, b, c)) == text


def test_refusals():
    v = vocabulary()
    with pytest.raises(ConfigError, match="byte-level"):
        CharCutter(dataclasses.replace(v, token_bytes=v.token_bytes[:50]))
    lower = tokenizer()
    with pytest.raises(ConfigError, match="use objective"):
        CharCutter(dataclasses.replace(v, encode=lambda text: lower.encode(text.lower()).ids))
    with pytest.raises(ConfigError, match="use objective"):
        CharCutter(dataclasses.replace(v, encode=lambda text: lower.encode(" " + text).ids))  # an implicit space, as of SentencePiece


def test_token_cuts_are_uniform():
    ids = np.arange(5)
    places = [len(a) for a, _, _ in parts_of(TokenCutter(), ids, np.random.default_rng(0).random((6000, 2)))]
    first = np.bincount(places, minlength=6) / 6000
    expected = np.array([11, 9, 7, 5, 3, 1]) / 36  # the lower of two uniform places
    assert np.abs(first - expected).max() < 0.03


def test_gather_ranges():
    assert gather_ranges(np.array([5, 0, 2]), np.array([2, 0, 3])).tolist() == [5, 6, 2, 3, 4]
    assert gather_ranges(np.array([-2]), np.array([2])).tolist() == [-2, -1]
    assert len(gather_ranges(np.zeros(0, np.int64), np.zeros(0, np.int64))) == 0


class TestSyntax:
    def spans(self, text: str, count: int = 300) -> set[str]:
        draws = np.random.default_rng(0).random((count, 2))
        found = [node_span(text.encode(), a, b) for a, b in draws]
        return {text.encode()[a:b].decode() for a, b in (span for span in found if span is not None)}

    def test_a_span_is_a_statement_or_an_expression(self):
        text = "x = f(a, 'é') + 1\nif x:\n    y = [1]\n"
        whole = {"x = f(a, 'é') + 1", "f(a, 'é') + 1", "f(a, 'é')", "if x:\n    y = [1]", "y = [1]", "[1]", "x", "f", "a", "'é'", "1", "y"}
        found = self.spans(text)
        assert found <= whole
        assert len(found) > 8

    @pytest.mark.parametrize(
        "text",
        [
            "        y = g(1)\n        return y\n\n    def other(self):\n        pass\n\nz = 3\n",  # begins two levels deep
            "ef broken(:\nx = 1\ny = [2]\n",  # begins inside a line
            "x = 1\ny = [2]\nz = (3 +\n",  # ends inside an expression
            "x = 1\ny = x * [x, 'a', 'b', 'c']\ndef f():\n    '''never closed\n",
            "    pass\nelse:\n    x = 1\n",
        ],
    )
    def test_a_piece_may_begin_and_end_anywhere(self, text):
        found = self.spans(text)
        assert found
        assert "if 1:" not in found
        for span in found:
            ast.parse(textwrap.dedent(span))

    def test_broken_characters_at_the_edges_are_left_out(self):
        text = "é = 1\nx = 'naïve' + y\n"
        raw = text.encode()[1:]
        spans = {raw[a:b] for a, b in filter(None, (node_span(raw, *d) for d in np.random.default_rng(0).random((100, 2))))}
        assert b"x = 'na\xc3\xafve' + y" in spans
        assert all(span.decode() in text for span in spans)

    @pytest.mark.parametrize(
        "text", ["", "\n\n", "it is no code, is it?\nreally not.\nnone\nof\nit at all,\nnot even a bit\n" * 3, "x\r\ny\r\n", "# a\n"]
    )
    def test_what_does_not_parse_has_no_span(self, text):
        assert node_span(text.encode(), 0.5, 0.5) is None

    def test_pieces_that_do_not_parse_are_cut_between_lines_and_counted(self):
        v = vocabulary()
        cutter, lines = CharCutter(v, lines=True, nodes=True), CharCutter(v, lines=True)
        prose = np.array(v.encode("this is, no code:\nnot, at all!\nnor; is this?\n" * 4), np.uint16)
        code = np.array(v.encode("def f(x):\n    return [x, x + 1]\n"), np.uint16)
        draws = np.random.default_rng(0).random((40, 2))
        assert list(parts_of(cutter, prose, draws)) == list(parts_of(lines, prose, draws))
        assert cutter.counters() == {"parsed": 0, "unparsed": 40}
        for prefix, middle, suffix in parts_of(cutter, code, draws):
            assert b"".join(text_of(part, v) for part in (prefix, middle, suffix)).decode() == "def f(x):\n    return [x, x + 1]\n"
            ast.parse(textwrap.dedent(text_of(middle, v).decode()))
        assert cutter.counters() == {"parsed": 40, "unparsed": 40}
        assert lines.counters() == {}
