"""Problems of others: both formats, answers judged by tests in a process with limits, and only when asked for."""

from __future__ import annotations

import gzip
import json

import pytest

from heads_lightning.evaluation.execution import is_offline, run_program
from heads_lightning.evaluation.problems import failure, judge, read_problems, truncated
from heads_lightning.registry import ConfigError

HUMANEVAL = [
    {
        "task_id": f"SingleLineInfilling/{k}",
        "prompt": "def add(a, b):\n",
        "suffix": "    return c\n",
        "canonical_solution": "    c = a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3",
        "entry_point": "add",
    }
    for k in range(4)
]
SAFIM = {
    "task_id": "block_completion_1",
    "lang": "python",
    "prompt": "Description: print a + b\nCode:\n\na, b = map(int, input().split())\n# TODO: Your code here\nprint(c)\n",
    "eval_prompt": "a, b = map(int, input().split())\n{{completion}}\nprint(c)\n",
    "ground_truth": "c = a + b",
    "unit_tests": [{"input": "1 2\n", "output": ["3\n"]}, {"input": "5 6", "output": ["11"]}],
}


def write(path, records):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_humaneval_infilling(tmp_path, name):
    problems = read_problems(write(tmp_path / name, HUMANEVAL), 2)
    assert [p.name for p in problems] == ["SingleLineInfilling/1", "SingleLineInfilling/3"]
    assert failure(problems[0], problems[0].answer) == ""
    assert failure(problems[0], "    c = a - b\n") == "AssertionError"
    assert failure(problems[0], "    c = (\n") == "SyntaxError"


def test_safim(tmp_path):
    java = SAFIM | {
        "task_id": "j",
        "lang": "java",
        "prompt": "x /* TODO: Your code here */ y",
        "unit_tests": json.dumps(SAFIM["unit_tests"]),
    }
    api = SAFIM | {"task_id": "api", "unit_tests": []}
    problems = read_problems(write(tmp_path / "s.jsonl", [SAFIM, java, api]))
    assert problems[0].prefix.endswith("split())\n")
    assert problems[0].suffix == "\nprint(c)\n"
    assert problems[1].prefix == "x "
    assert failure(problems[0], "c = a + b") == ""
    assert failure(problems[0], "c = 3") == "output"  # right for the first test alone
    report = judge(problems, ["c = a * b", "c = a + b", " c = a + b "], execute=True)
    assert (report.problems, report.executed, report.pass_at_1) == (3, 1, 0.0)
    assert report.exact_match == pytest.approx(2 / 3)
    assert report.failures == {"output": 1}


@pytest.mark.parametrize(
    ("kind", "answer", "kept"),
    [
        ("block", "c = a + b", "c = a + b"),
        ("block", "c = a + b\nc += 0\nfor", "c = a + b\nc += 0\n"),  # the rest does not parse
        ("block", "c = a + b\nif c:", "c = a + b\n"),  # nor does this one: nothing indented follows
        ("block", "def (", ""),
        ("control", "\n a + b  # sum\nprint(c)\n", " a + b  # sum"),
        ("api", "numpy.add(a, (b)).sum()\nmore", "numpy.add(a, (b))"),
        ("other", "anything (", "anything ("),
    ],
)
def test_safim_ends_an_answer(tmp_path, kind, answer, kept):
    (problem,) = read_problems(write(tmp_path / "s.jsonl", [SAFIM | {"task_id": f"{kind}_completion_1"}]))
    assert truncated(problem, answer) == kept


def test_a_block_of_safim_ends_where_the_structure_around_it_goes_on(tmp_path):
    """A line that parses but belongs outside the hole is not part of the answer."""
    record = {"task_id": "block_completion_2", "prompt": "for i in x:\n    # TODO: Your code here\nprint(c)\n"}
    record["eval_prompt"] = "for i in x:\n    {{completion}}\nprint(c)\n"
    (problem,) = read_problems(write(tmp_path / "s.jsonl", [SAFIM | record]))
    assert truncated(problem, "c = i\n    c += 1\nprint(c)\nc = 3") == "c = i\n    c += 1\n"
    report = judge([problem], ["c = a + b\n) ("], execute=False)
    assert report.exact_match == 1  # of what is counted


@pytest.mark.parametrize("language", ["java", "cpp", "csharp"])
def test_safim_ends_an_expression_at_the_bracket_of_its_structure(tmp_path, language):
    record = {
        "task_id": "control_completion_3",
        "lang": language,
        "prompt": "for (/* TODO: Your code here */) {}",
        "eval_prompt": "{{completion}}",
    }
    (problem,) = read_problems(write(tmp_path / "s.jsonl", [SAFIM | record]))
    assert truncated(problem, "int i = f(0); i < n; i++) { c++; }") == "int i = f(0); i < n; i++"
    block = problem._replace(kind="block")
    assert truncated(block, "anything {") == "anything {"


def test_nothing_runs_unless_asked(tmp_path):
    mark = tmp_path / "it ran"
    problems = read_problems(write(tmp_path / "a.jsonl", HUMANEVAL))
    report = judge(problems, [f"    open({str(mark)!r}, 'w')\n    c = 3\n"] * 4, execute=False)
    assert report.pass_at_1 is None
    assert not mark.exists()


def test_limits():
    assert run_program("print(input())", stdin="hello").output == "hello\n"
    assert run_program("while True: pass", seconds=0.5).reason == "time"
    assert run_program("x = bytearray(3 << 30)").reason.startswith("MemoryError")
    assert not run_program("import sys\nfor _ in range(100): sys.stdout.write('x' * 10**6); sys.stdout.flush()").ok
    assert run_program("import os; print(len(os.environ) < 5, os.listdir('.') != [])").output == "True True\n"
    assert run_program("raise SystemExit(3)").reason == "status 3"
    # a child left behind is ended too
    import time

    started = time.monotonic()
    assert run_program("import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])").ok
    assert time.monotonic() - started < 20


@pytest.mark.skipif(not is_offline(), reason="this system lets no ordinary user take the network away")
def test_there_is_no_network():
    program = "import socket\nprint([name for _, name in socket.if_nameindex()])\nsocket.create_connection(('1.1.1.1', 53), 1)"
    finished = run_program(program)
    assert finished.output.strip() == "['lo']"
    assert finished.reason.startswith("OSError")


def test_refusals(tmp_path):
    for content, message in (("{", "not lines of JSON"), ('{"a": 1}', "neither HumanEval-Infilling nor SAFIM"), ("[]", "no fields")):
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_problems(str(tmp_path / "x.jsonl"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_problems(str(tmp_path / "missing.jsonl"))
    with pytest.raises(ConfigError, match="no hole to fill"):
        read_problems(write(tmp_path / "y.jsonl", [SAFIM | {"lang": "cobol"}]))
