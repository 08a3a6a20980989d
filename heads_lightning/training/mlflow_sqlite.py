"""Points written straight into the two tables in which MLflow keeps them, where its store is a file of this machine.

MLflow makes an object of its mapper for every value, 0.05 ms of a core each; a training step of 5 ms that logs six values pays for that
with the core next to it. One statement for many rows costs a tenth, and leaves the same rows (a test compares them). It is done only in
tables that are the ones known here, column by column: whatever another version of MLflow has goes through its own interface.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

LOCK_SECONDS = 20.0
"""How long to wait for another writer; MLflow's own."""
KNOWN = {
    "metrics": {
        ("key", "VARCHAR(250)", 1, 1), ("timestamp", "BIGINT", 1, 2), ("step", "BIGINT", 1, 3), ("run_uuid", "VARCHAR(32)", 1, 4),
        ("value", "FLOAT", 1, 5), ("is_nan", "BOOLEAN", 1, 6),
    },
    "latest_metrics": {
        ("key", "VARCHAR(250)", 1, 1), ("run_uuid", "VARCHAR(32)", 1, 2), ("value", "FLOAT", 1, 0), ("timestamp", "BIGINT", 0, 0),
        ("step", "BIGINT", 1, 0), ("is_nan", "BOOLEAN", 1, 0),
    },
}  # fmt: skip
"""(name, type, whether it must be given, place in the primary key) of every column."""
ADD = """
INSERT INTO metrics (run_uuid, key, value, timestamp, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)
ON CONFLICT (key, timestamp, step, run_uuid, value, is_nan) DO NOTHING"""
RENEW = """
INSERT INTO latest_metrics (run_uuid, key, value, timestamp, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)
ON CONFLICT (key, run_uuid) DO UPDATE
SET value = excluded.value, timestamp = excluded.timestamp, step = excluded.step, is_nan = excluded.is_nan
WHERE (excluded.step, excluded.timestamp, excluded.value) > (step, timestamp, value)"""


class Value(NamedTuple):
    """One number of a run, finite."""

    name: str
    """As MLflow takes it."""
    value: float
    time: int
    """Unix time in milliseconds."""
    step: int


def known_tables(database: Path) -> bool:
    """Whether the file keeps points in the tables that `add_values` knows, and nothing else happens when one is written."""
    with closing(_open(database)) as connection:
        triggers = connection.execute("SELECT tbl_name FROM sqlite_master WHERE type = 'trigger'").fetchall()
        found = {table: _columns(connection, table) for table in KNOWN}
    return found == KNOWN and not any(table in KNOWN for (table,) in triggers)


def _columns(connection: sqlite3.Connection, table: str) -> set[tuple[str, str, int, int]]:
    rows = connection.execute(f"PRAGMA table_info({table})")
    return {(name, kind, required, key) for _, name, kind, required, _, key in rows}


def add_values(database: Path, run_id: str, values: Sequence[Value]) -> bool:
    """Store values in one transaction; one that is stored already stays once. False, and nothing stored, where the run is not active.

    Raises:
        sqlite3.Error: the file is locked for too long, full or gone.
    """
    newest: dict[str, Value] = {}
    for value in values:
        newest[value.name] = max(value, newest.get(value.name, value), key=lambda v: (v.step, v.time, v.value))
    with closing(_open(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT lifecycle_stage FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() != ("active",):
            return False
        connection.executemany(ADD, [(run_id, *value) for value in values])
        connection.executemany(RENEW, [(run_id, *value) for value in newest.values()])
        connection.execute("COMMIT")
    return True


def _open(database: Path) -> sqlite3.Connection:
    """A connection to a file that exists; transactions are spelled out."""
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_SECONDS, isolation_level=None)
