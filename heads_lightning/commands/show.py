"""Tables and paragraphs: coloured by rich on a terminal, plain aligned text elsewhere (pipes, logs, tests)."""

import json
import sys
from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]], headers: Sequence[str] = ()) -> None:
    """Print rows of text in aligned columns; the last column wraps on a terminal and is cut nowhere."""
    if sys.stdout.isatty():
        _rich_table(rows, headers)
        return
    lines = [*([headers] if headers else []), *rows]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(max(map(len, lines), default=1) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        print("  ".join([*cells, *line[len(widths) :]]).rstrip())


def _rich_table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = max((len(row) for row in rows), default=len(headers))
    grid = Table(box=None, show_header=bool(headers), header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for i in range(columns):
        grid.add_column(headers[i] if headers else "", style="bold cyan" if i == 0 else "dim" if i == columns - 1 and columns > 2 else "",
                        no_wrap=i == 0)  # fmt: skip
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    Console().print(grid)


def title(text: str) -> None:
    """A line above a table."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(text, style="bold", markup=False, highlight=False)
    else:
        print(text)


def as_json(value: Any) -> None:
    """Print for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def text_of(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
