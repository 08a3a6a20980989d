"""Cuts around a node of Python's syntax tree, for pieces of files that may begin and end anywhere.

A place in the text is drawn, then one of the statements and expressions around it: large nodes are met more often, and every nesting level
has its turn. A piece seldom is a whole file, so up to a few times a line that does not parse is left out at the beginning, or everything
from it on at the end; indented code is put under `if 1:` lines of its own. Where less than half is left, or it still does not parse, the
caller cuts between lines, and it is counted. The tree is that of the running Python: newer syntax than its own does not parse.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

_ATTEMPTS = 6
"""Parses of one piece, at most."""
_NAME = "<piece of a training document>"


class SyntaxPlaces:
    """Finds the two places around a node; the same for the same tokens and draws.

    Args:
        token_bytes: UTF-8 bytes of each id.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._bytes = token_bytes
        self.parsed = 0
        self.unparsed = 0
        warnings.filterwarnings("ignore", module=_NAME)  # what the text does wrong (escapes) is none of the user's business

    def put(
        self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray, at_P2: np.ndarray, byte_P2: np.ndarray
    ) -> None:
        """Replace, in place, the places of the pieces that parse: the token that each falls in (or the end), and before which byte."""
        for piece, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            texts = [self._bytes[token] for token in tokens[start:end].tolist()]
            span = node_span(b"".join(texts), float(draws_P2[piece, 0]), float(draws_P2[piece, 1]))
            if span is None:
                self.unparsed += 1
                continue
            self.parsed += 1
            edges = np.cumsum([0, *map(len, texts)])
            token_2 = np.searchsorted(edges, span, side="right") - 1
            at_P2[piece], byte_P2[piece] = start + token_2, np.array(span) - edges[token_2]


def node_span(text: bytes, place: float, depth: float) -> tuple[int, int] | None:
    """Bytes [start, end) of a node of the text, or None if it does not parse.

    Args:
        text: UTF-8; characters that are broken at its edges are left out.
        place, depth: in [0, 1): where in the text, and which of the nodes around that place.
    """
    head, whole = _whole_characters(text)
    if whole is None or "\r" in whole or "\0" in whole:
        return None
    lines = whole.split("\n")
    found = _parse(lines)
    if found is None:
        return None
    tree, first, added = found
    line_bytes = np.cumsum([head, *(len(line.encode()) + 1 for line in lines)])

    def offset(line: int, column: int) -> int:
        return int(line_bytes[line - 1 - added + first]) + column

    spans = [
        (offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset))  # pyright: ignore[reportArgumentType]
        for node in _nodes(tree)
        if node.lineno > added
    ]
    if not spans:
        return None
    low, high = min(s for s, _ in spans), max(e for _, e in spans)
    at = low + int(place * (high - low))
    around = [span for span in spans if span[0] <= at < span[1]] or spans  # a comment or an empty line has none
    return around[int(depth * len(around))]


def _whole_characters(text: bytes) -> tuple[int, str | None]:
    """(bytes left out at the beginning, the text without broken characters at its edges); None: broken inside."""
    head = next((k for k, byte in enumerate(text[:4]) if byte & 0xC0 != 0x80), len(text[:4]))
    try:
        return head, text[head:].decode()
    except UnicodeDecodeError as error:
        if error.start + head < len(text) - 4:
            return head, None
        return head, text[head : head + error.start].decode()


def _parse(lines: list[str]) -> tuple[ast.Module, int, int] | None:
    """(tree, first line parsed, lines put before it) of as much of the lines as a few attempts make parse."""
    first, last = 0, len(lines)
    for _ in range(_ATTEMPTS):
        while first < last and not lines[first].strip():
            first += 1
        if first >= last:
            return None
        headers = _headers(lines[first:last])
        if 2 * sum(map(len, lines[first:last])) < sum(map(len, lines)):
            return None  # prose has words that parse
        try:
            return ast.parse("\n".join([*headers, *lines[first:last]]), filename=_NAME), first, len(headers)
        except SyntaxError as error:
            wrong = first + (error.lineno or 1) - 1 - len(headers)
        except (ValueError, RecursionError, MemoryError):
            return None
        if wrong <= first or wrong >= last:
            first += 1  # the beginning of a statement is outside the piece
        else:
            last = wrong
    return None


def _headers(lines: list[str]) -> list[str]:
    """`if 1:` lines that give indented code the blocks that it ends."""
    margins = [line[: len(line) - len(line.lstrip())] for line in lines if line.strip()]
    if not margins[0]:
        return []
    levels, least = [""], margins[0]
    for margin in margins[1:]:
        if len(margin) < len(least):
            least = margin
            levels.append(margin)
    return [f"{level}if 1:" for level in sorted(set(levels), key=len)]


def _nodes(tree: ast.AST) -> Iterator[ast.stmt | ast.expr]:
    """Statements and expressions, in a fixed order. Not inside f-strings: before Python 3.12 their insides have no true places."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt | ast.expr):
            yield node
        if not isinstance(node, ast.JoinedStr):
            waiting += ast.iter_child_nodes(node)
