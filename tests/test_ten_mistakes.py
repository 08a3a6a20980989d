"""Typical mistakes and the exact message that each prints: snapshots/mistakes.txt. HEADS_LIGHTNING_UPDATE=1 writes it anew."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

from heads_lightning.__main__ import main
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.mlflow_opening import connect
from heads_lightning.tracking.mlflow_store import resolve_store

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = Path(__file__).parent / "snapshots" / "mistakes.txt"
MISTAKES = {
    "wrong option": "train objective=mln",
    "wrong enum": "train head.loss_implementation=chunkd",
    "misspelt field": "train trainer.max_stps=10",
    "bad type": "train trainer.max_steps=ten",
    "incompatible pair": "train objective=fim backbone=bigs",
    "missing file": "train data=files data.root=no/such/folder tracking=none",
    "too-small vocabulary": "train tokenizer.vocab_size=100",
    "no GPU for fused": "train head.loss_implementation=fused_linear",
    "port taken": "ui port=PORT",
    "interrupted run": "train … (Ctrl-C, SIGTERM)",
    "full disk": "train",
    "no place to write": "schema --out taken/schema",
    "no Hub": "train backbone=huggingface backbone.source=someone/model",
    "run in use": "train resume=runs/mine",
}
"""Ten mistakes of the first day, and what a machine does to a run; the latter are made in other files than this."""
ELSEWHERE = ("port taken", "interrupted run", "full disk", "no place to write", "no Hub", "run in use")


def check(title: str, message: str) -> None:
    """Compare with the snapshot, or write it."""
    entry = f"## {title}\n$ heads-lightning {MISTAKES[title]}\n{message.strip()}\n"
    kept = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", SNAPSHOT.read_text() if SNAPSHOT.exists() else "", re.M | re.S))
    if os.environ.get("HEADS_LIGHTNING_UPDATE") == "1":
        kept[title] = entry.partition("\n")[2]
        SNAPSHOT.write_text("".join(f"## {name}\n{kept[name].strip()}\n\n" for name in MISTAKES if name in kept), encoding="utf-8")
    else:
        assert entry == f"## {title}\n{kept[title].strip()}\n"


@pytest.mark.parametrize("title", [title for title in MISTAKES if title not in ELSEWHERE])
def test_a_mistake_prints_its_line(title, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("heads_lightning.composition.validation.available_gpus", lambda: 0)
    assert main(shlex.split(MISTAKES[title])) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert out == "" or title == "missing file"  # which is found out when the data is prepared
    check(title, re.sub(r"(?<=Available: ).*", "…", err))  # a new option is no new message


def test_a_taken_port(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect(resolve_store(MLflowConfig(), Path("runs")))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert main(["ui", f"port={port}"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    check("port taken", re.sub(r"port=\d+ is free", "port=NEXT is free", line.replace(str(port), "PORT")))


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    overrides = [*(o for o in TINY if not o.startswith("trainer.max_steps")), "trainer.max_steps=100000", "hydra.run.dir=runs/mine"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "heads_lightning", "train", *overrides], cwd=tmp_path, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    metrics = tmp_path / "runs/mine/metrics.jsonl"
    for _ in range(480):
        if process.poll() is not None or (metrics.exists() and metrics.stat().st_size):
            break
        time.sleep(0.25)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    said = err[err.index("heads-lightning:") :]
    check("interrupted run", re.sub(r"step \d+", "step N", re.sub(r"step-\d+", "step-N", said.replace(str(tmp_path), "…"))))
