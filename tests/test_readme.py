"""The README's snippets do what it shows."""

import re
import subprocess
import sys
from pathlib import Path

from heads_lightning.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


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
