"""The README's snippets do what it shows."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from heads_lightning.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_snippet_runs() -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_the_mistake_gets_the_message_shown(capsys) -> None:
    shown = re.findall(r"\$ heads-lightning (.*)\n(heads-lightning: .*)", README)
    assert shown
    for command, message in shown:
        assert main(command.split()) == 2
        assert capsys.readouterr().err.strip() == message


def test_the_capability_tables_are_current() -> None:
    """Of heads and losses; that they are true is tests/test_losses.py's."""
    path = ROOT / "experiments" / "loss_implementations" / "capabilities.py"
    spec = importlib.util.spec_from_file_location("capabilities", path)
    assert spec is not None
    assert spec.loader is not None
    capabilities = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(capabilities)
    assert capabilities.readme_with(capabilities.compact()) == README, f"run: python {path.relative_to(ROOT)}"
    assert path.with_suffix(".md").read_text(encoding="utf-8") == capabilities.table()
