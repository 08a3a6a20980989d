"""How much of fill-in-the-middle survives packing, in three orders of work, on the standard library's documents.

    python experiments/fim_structure/structure.py [--json FILE]

- ours: the window is chosen, room is reserved, then each piece of it is cut (objective=fim, level=context)
- document, then pack: whole documents are transformed, concatenated and cut into windows (level=document, most public pipelines)
- cut back: each piece of a window is transformed, then the window is cut back to its length (Megatron, bigcode)

A transformed piece is broken when prefix, suffix, middle and end marker are not all in one window. The layout is prefix-suffix-middle,
so that where a middle begins can be told from the ids.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from transforms import corpus

from heads_lightning.configs.objective import FIMConfig, FIMLevel
from heads_lightning.objectives.base import SampleRandom, Vocabulary

EOD, END = 0, 6
LENGTHS = (512, 1024, 2048, 8192)
RATE = 0.5


class Pieces(NamedTuple):
    """Transformed pieces, as positions in all windows one after the other; prefix and suffix stand before the middle (PSM)."""

    starts: np.ndarray
    middles: np.ndarray
    """Where the middle begins."""
    ends: np.ndarray
    """After the end marker, whether or not that is inside the window."""
    limits: np.ndarray
    """After the last position that there is: less than `ends` where the window was cut back."""
    windows: int


def ours(stream: np.ndarray, vocabulary: Vocabulary, length: int) -> Pieces:
    """Of objective=fim: pieces from the segments of its examples."""
    objective = FIMConfig(rate=RATE, spm_rate=0.0).build(vocabulary)
    stride, width = objective.window(length)
    found, count = [], (len(stream) - width) // stride
    for first in range(0, count, 64):
        indices = np.arange(first, min(first + 64, count))
        made = objective.examples(stream[indices[:, None] * stride + np.arange(width)], SampleRandom(0, 0, indices), length)
        for b in range(len(indices)):
            for number in range(made.segments_BS[b].max() + 1):
                where = np.flatnonzero(made.segments_BS[b] == number)
                infill = where[made.part_BS[b, where] == 1]
                if len(infill):  # a middle whose end marker is missing would end past the piece
                    whole = made.tokens_BS[b, where[-1]] == END and made.labels_BS[b, infill[-1]] == END
                    offset = (first + b) * length
                    end = offset + where[-1] + 1
                    found.append((offset + where[0], offset + infill[0] + 1, end if whole else end + 1, end))
    return Pieces(*np.array(found).T, windows=count)


def pack_after(stream: np.ndarray, vocabulary: Vocabulary, length: int) -> Pieces:
    """Whole documents are transformed; windows are cut from what comes out."""
    config = FIMConfig(rate=RATE, spm_rate=0.0, level=FIMLevel.document)
    out = config.build(vocabulary).rewrite(stream, 0, 0)
    out = out[: len(out) // length * length]
    starts = np.flatnonzero(out == EOD)
    ends = np.append(starts[1:], len(out))
    middles = np.flatnonzero(out == vocabulary.fim_middle)
    document = np.searchsorted(starts, middles, side="right") - 1
    inside = out[ends[document] - 1] == END  # the stream's last document may be cut off
    document, middles = document[inside], middles[inside]
    return Pieces(starts[document], middles + 1, ends[document], ends[document], len(out) // length)


def cut_back(stream: np.ndarray, length: int) -> Pieces:
    """Each piece of a window is transformed, between tokens, with its markers; then the window is cut back to its length."""
    random = np.random.default_rng(0)
    found = []
    windows = range(0, len(stream) - length, length)
    for number, start in enumerate(windows):
        window = stream[start : start + length]
        at = number * length
        opens = np.flatnonzero(window == EOD)
        for piece in np.split(window, opens):
            body = len(piece) - int(len(piece) > 0 and piece[0] == EOD)
            marker = len(piece) - body
            if not body or random.random() >= RATE:
                at += len(piece)
                continue
            a, b = np.sort(random.integers(0, body + 1, 2)).tolist()
            end = at + len(piece) + 4
            found.append((at, end - 1 - (b - a), end, min(end, (number + 1) * length)))
            at += marker + body + 4
    kept = np.array([piece for piece in found if piece[0] < piece[3]])
    return Pieces(*kept.T, windows=len(windows))


def count(pieces: Pieces, length: int) -> dict[str, float]:
    """Shares of broken pieces, of middle tokens that see all of prefix and suffix, of windows that hold part of a broken piece."""
    broken = (pieces.starts // length != (pieces.ends - 1) // length) | (pieces.limits < pieces.ends)
    middle = np.maximum(pieces.limits - 1 - pieces.middles, 0)  # the end marker aside; cut tokens are not there
    first_window_end = (pieces.starts // length + 1) * length
    seen = np.clip(first_window_end - pieces.middles, 0, middle)
    touched = {
        w for s, e in zip(pieces.starts[broken], pieces.limits[broken], strict=True) for w in range(s // length, (e - 1) // length + 1)
    }
    return {
        "broken_pieces": broken.mean(),
        "middle_tokens_that_see_all": seen.sum() / middle.sum(),
        "windows_with_a_broken_piece": len(touched) / pieces.windows,
        "pieces": len(pieces.starts),
    }


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
        for name, pieces in ways.items():
            found = count(pieces, length)
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
