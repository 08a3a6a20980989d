"""`heads-lightning ui` shows the store of the runs, steps aside for a port that is taken, and ends with Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from heads_lightning.__main__ import main
from heads_lightning.commands.ui import choose_port
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.registry import RunError
from heads_lightning.tracking.mlflow_opening import connect, experiment_id
from heads_lightning.tracking.mlflow_store import resolve_store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def taken():
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port_is_one_line_and_names_a_free_one(taken):
    with pytest.raises(RunError, match=rf"port={taken} is taken; port=\d+ is free"):
        choose_port("127.0.0.1", taken)


def test_without_a_port_the_next_free_one_is_taken(monkeypatch):
    monkeypatch.setattr("heads_lightning.commands.ui._is_free", lambda host, port: port == 5003)
    assert choose_port("127.0.0.1", None) == 5003
    monkeypatch.setattr("heads_lightning.commands.ui._is_free", lambda host, port: False)
    with pytest.raises(RunError, match=r"ports 5000 to 5019 of 127.0.0.1 are all taken"):
        choose_port("127.0.0.1", None)


def test_mistakes_and_servers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["ui"]) == 2
    assert "there is no MLflow store at" in capsys.readouterr().err
    assert main(["ui", "uri=http://user:secret@somewhere:5000"]) == 0
    assert capsys.readouterr().out == "the runs are on a server, which shows them itself: http://user:***@somewhere:5000\n"
    assert main(["ui", "port=0"]) == 2
    connect(resolve_store(MLflowConfig(), Path("runs")))
    assert main(["ui", "host=nowhere.invalid"]) == 2
    assert "host=nowhere.invalid is no address of this machine" in capsys.readouterr().err


@pytest.mark.slow
def test_the_pages_show_the_store(tmp_path):
    store = resolve_store(MLflowConfig(), tmp_path / "runs", {})
    experiment_id(connect(store), store, "shown-here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "heads_lightning", "ui"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert address, said
        assert "shown-here" in _experiments(address[0])
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0


def _experiments(address: str) -> list[str]:
    """Names of the experiments that the server shows, once it answers."""
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/experiments/search", data=b'{"max_results": 10}',
                                     headers={"Content-Type": "application/json"})  # fmt: skip
    for _ in range(240):
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return [experiment["name"] for experiment in json.load(answer)["experiments"]]
        except OSError:
            time.sleep(0.5)
    raise AssertionError("no answer in two minutes")
