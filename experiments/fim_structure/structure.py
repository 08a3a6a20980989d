"""How much of fill-in-the-middle survives packing, in three orders of work, on the standard library's documents.

    python experiments/fim_structure/structure.py [--json FILE]

- ours: the window is chosen, room is reserved, then each piece of it is cut (objective=fim, level=context)
- document, then pack: whole documents are transformed, concatenated and cut into windows (level=document, most public pipelines)
- cut back: each piece of a window is transformed, then the window is cut back to its length (Megatron, bigcode)

A transformed piece is broken in a window when one of its four markers, or text between them, is not in that window. Everything is counted
from ids alone, by the same function for all three.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from transforms import corpus

from heads_lightning.configs.objective import FIMConfig, FIMLevel
from heads_lightning.objectives.base import SampleRandom, Vocabulary

EOD, PAD, _, PRE, SUF, MID, END = range(7)
LENGTHS = (512, 1024, 2048, 8192)


def ours(stream: np.ndarray, vocabulary: Vocabulary, length: int) -> list[np.ndarray]:
    """Windows of objective=fim."""
    objective = FIMConfig(rate=0.5).build(vocabulary)
    stride, width = objective.window(length)
    rows = []
    for first in range(0, (len(stream) - width) // stride, 64):
        indices = np.arange(first, min(first + 64, (len(stream) - width) // stride))
        windows = stream[indices[:, None] * stride + np.arange(width)]
        rows += list(objective.examples(windows, SampleRandom(0, 0, indices), length).tokens_BS)
    return rows


def pack_after(stream: np.ndarray, vocabulary: Vocabulary, length: int) -> list[np.ndarray]:
    """Windows cut from transformed documents."""
    out = FIMConfig(rate=0.5, level=FIMLevel.document).build(vocabulary).rewrite(stream, 0, 0)
    return list(out[: len(out) // length * length].reshape(-1, length))


def cut_back(stream: np.ndarray, length: int) -> list[np.ndarray]:
    """Windows whose pieces are transformed (between tokens), then cut back to the length. Each piece gets its end marker before that."""
    random = np.random.default_rng(0)
    rows = []
    for start in range(0, len(stream) - length, length):
        out: list[int] = []
        window = stream[start : start + length].astype(np.int64)
        for piece in np.split(window, np.flatnonzero(window == EOD)):
            opens = int(len(piece) > 0 and piece[0] == EOD)
            body = piece[opens:].tolist()
            out += piece[:opens].tolist()
            if not body or random.random() >= 0.5:
                out += body
                continue
            a, b = sorted(random.integers(0, len(body) + 1, 2).tolist())
            prefix, middle, suffix = body[:a], body[a:b], body[b:]
            spm = random.random() < 0.5
            psm = [PRE, *prefix, SUF, *suffix, MID, *middle, END]
            out += [PRE, SUF, *suffix, MID, *prefix, *middle, END] if spm else psm
        rows.append(np.array((out + [PAD] * length)[:length]))
    return rows


def count(rows: list[np.ndarray]) -> dict[str, float]:
    """Shares of broken pieces, of middles that still see all around them, of windows with a part of a piece.

    A run of PRE, SUF, MID, END in this order, with no other marker between them, is a whole piece. Other markers are of broken ones.
    """
    whole = broken = seen_tokens = middle_tokens = windows = 0
    for row in rows:
        marks = np.flatnonzero(np.isin(row, [EOD, PRE, SUF, MID, END]))
        kinds = row[marks].tolist()
        at, parts = 0, 0
        while at < len(kinds):
            if kinds[at : at + 4] == [PRE, SUF, MID, END]:
                size = marks[at + 3] - marks[at + 2] - 1
                whole, seen_tokens, middle_tokens, at = whole + 1, seen_tokens + size, middle_tokens + size, at + 4
            elif kinds[at] == EOD:
                at += 1
            else:
                end = next((k for k in range(at + 1, len(kinds)) if kinds[k] in (EOD, PRE)), len(kinds))
                parts, middle_tokens = parts + 1, middle_tokens + _middle(row, marks, kinds, at, end)
                at = end
        broken, windows = broken + parts, windows + (parts > 0)
    return {
        "broken_pieces": broken / max(whole + broken, 1),
        "middle_tokens_that_see_all": seen_tokens / max(middle_tokens, 1),
        "windows_with_a_broken_piece": windows / len(rows),
        "pieces": whole + broken,
    }


def _middle(row: np.ndarray, marks: np.ndarray, kinds: list[int], first: int, end: int) -> int:
    """Tokens after MID in a broken piece (with the prefix, in suffix-prefix-middle), as far as the window goes."""
    stop = int(marks[end]) if end < len(marks) else len(row)
    after = [int(marks[k]) for k in range(first, end) if kinds[k] == MID]
    ended = [int(marks[k]) for k in range(first, end) if kinds[k] == END]
    begin = after[0] + 1 if after else int(marks[first]) if kinds[first] != END else 0
    return max((ended[0] if ended else stop) - begin, 0) if after or kinds[first] == END else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, vocabulary, stream = corpus(args.tokens)
    table = []
    for length in LENGTHS:
        ways = {
            "ours": ours(stream, vocabulary, length),
            "document, then pack": pack_after(stream, vocabulary, length),
            "cut back": cut_back(stream, length),
        }
        for name, rows in ways.items():
            found = count(rows)
            table.append({"length": length, "order": name, **{k: round(float(v), 4) for k, v in found.items()}})
            print(
                f"{length:5d}  {name:20s}  broken pieces {found['broken_pieces']:6.1%}   middle tokens that see all "
                f"{found['middle_tokens_that_see_all']:6.1%}   windows with a broken piece {found['windows_with_a_broken_piece']:6.1%}"
            )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
