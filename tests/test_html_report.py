"""report.html stands alone, shows what the run recorded, and lets nothing of a run act as markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from heads_lightning.charts import COLOURS, LEFT, MOST_POINTS, TOP, _ticks, thinned
from heads_lightning.evaluation.scoring import Sample
from heads_lightning.html_report import samples_page, write_report

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "line", "polyline", "circle", "img", "br"}


class Tags(HTMLParser):
    """Names and attributes of the tags of a page, whose nesting is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 1000 steps; one loss is not a number."""
    lines = [{"step": s, "tokens": s * 10, "time": float(s), "values": {"train/loss": 5 / s if s != 7 else float("nan"), EVIL: 1.0}}
             for s in range(1, 1001)]  # fmt: skip
    lines.append({"step": 1000, "tokens": 10000, "time": 1000.0, "values": {"val/loss": 2.5}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "provenance.json").write_text(json.dumps({"packages": {"torch": "2.x", "evil": EVIL}, "git": {"commit": "abc"}}))
    return tmp_path


def test_the_page_stands_alone_and_escapes_what_it_shows(run_dir):
    sample = Sample(prefix=f"a\nb{EVIL}", infill=f"c{EVIL}", truth=f"d{EVIL}", suffix=f"e{EVIL}")
    path = write_report(
        run_dir, name=EVIL, config_yaml=f"name: {EVIL}", numbers={EVIL: 1.5, "val/loss": 2.5}, samples=[sample], summary=EVIL
    )
    page = path.read_text()
    tags = Tags(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert tags.addresses == []
    assert "http" not in page
    for shown in (
        "&lt;script&gt;",
        "2.5",
        "torch",
        "<span class='prefix'>a\nb&lt;",
        "<span class='middle'>c&lt;",
        "<span class='suffix'>e&lt;",
    ):
        assert shown in page
    assert "1 values were not finite" in page
    assert "nan" not in page


def test_a_curve_is_drawn_where_its_values_are(run_dir):
    page = write_report(run_dir, name="x", config_yaml="", numbers={}).read_text()
    points = [tuple(map(float, p.split(","))) for p in re.search(rf"<polyline stroke='{COLOURS[0]}'.*?points='(.*?)'", page)[1].split()]  # pyright: ignore
    assert points[0] == (LEFT, TOP)  # the first and largest loss: left, top
    assert points[-1][0] == 628
    assert len(points) == MOST_POINTS
    assert [y for _, y in points] == sorted(y for _, y in points)  # the loss falls: down the page
    assert f"<circle stroke='{COLOURS[1]}'" in page  # a single held-out loss is a point


def test_thinning_keeps_both_ends():
    curve = [(float(i), float(i)) for i in range(1001)]
    kept = thinned(curve)
    assert (kept[0], kept[-1], len(kept)) == (curve[0], curve[-1], MOST_POINTS)
    assert thinned(kept) == kept


def test_samples_alone_are_a_page():
    page = samples_page([Sample(prefix="a", infill=EVIL, truth="d", suffix="e")])
    assert Tags(page).open == []
    assert "<span class='middle'>&lt;script" in page


def test_a_run_without_anything_has_a_page(tmp_path):
    assert Tags(write_report(tmp_path, name="empty", config_yaml="a: 1", numbers={}).read_text()).open == []


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (3.41, 6.25, [3.5, 4, 4.5, 5, 5.5, 6]),
        (1, 60, [10, 20, 30, 40, 50, 60]),
        (0.000425, 0.01, [0.002, 0.004, 0.006, 0.008, 0.01]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (7, 7, [7]),
        (3610, 17253, [4000, 6000, 8000, 10000, 12000, 14000, 16000]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert _ticks(low, high) == pytest.approx(ticks)
