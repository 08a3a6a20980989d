"""The GitHub action's own lines, run by hand in a clean clone and an environment of their own: it passes, and fails, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ACTION = yaml.safe_load((ROOT / ".github/actions/check/action.yml").read_text(encoding="utf-8"))
RUNS = [step for step in ACTION["runs"]["steps"] if "run" in step]
HOOK = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))[0]


def run(script: str, folder: Path, *, action_path: Path, conf: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A `run:` as GitHub's runner does it: expressions filled in, bash that stops at the first failure."""
    script = script.replace("${{ github.action_path }}", str(action_path)).replace("${{ inputs.conf }}", conf)
    assert "${{" not in script
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)


def recipes(folder: Path, steps: str) -> None:
    path = folder / "conf" / "experiment"
    path.mkdir(parents=True, exist_ok=True)
    (path / "mine.yaml").write_text(f"# @package _global_\ndefaults:\n  - override /objective: causal\ntrainer:\n  {steps}\n")


def test_the_steps_say_where_they_run() -> None:
    assert all(step["shell"] == "bash" for step in RUNS)
    assert RUNS[-1]["run"].strip() == 'heads-lightning check --config-only --config-dir "${{ inputs.conf }}"'
    assert HOOK["entry"] == "heads-lightning check --config-only --config-dir conf"


@pytest.mark.slow
def test_the_action_passes_and_fails(tmp_path: Path) -> None:
    """The clone is of the last commit; packages come from pip's configured index."""
    clone, work = tmp_path / "clone", tmp_path / "work"
    work.mkdir()
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    unset = ("PYTHONPATH", "HEADS_LIGHTNING_PLUGINS")
    environment = {k: v for k, v in os.environ.items() if k not in unset} | {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}"}
    where = {"action_path": clone / ".github/actions/check", "conf": ACTION["inputs"]["conf"]["default"], "environment": environment}
    recipes(work, "max_steps: 10")
    done = [run(step["run"], work, **where) for step in RUNS]
    assert [each.returncode for each in done] == [0] * len(RUNS), done
    assert "experiment=mine" in done[-1].stdout
    assert subprocess.run([f"{tmp_path}/venv/bin/python", "-c", "import torch"], capture_output=True, check=False).returncode != 0
    recipes(work, "max_stps: 10")
    failed = run(RUNS[-1]["run"], work, **where)
    assert (failed.returncode, failed.stderr) == (1, "")
    assert [line for line in failed.stdout.splitlines() if line.startswith("failed")] == [
        line for line in failed.stdout.splitlines() if "experiment=mine" in line
    ]
