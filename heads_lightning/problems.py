"""Infilling problems of others, from local files: HumanEval-Infilling (OpenAI, arXiv 2207.14255) and SAFIM (arXiv 2403.04814).

Both are lines of JSON, plain or gzipped. A problem is a prefix, a suffix and the answer of a person; tests decide whether a program with
another middle is right. Answers are taken as the model ends them: SAFIM's own truncation by syntax is not applied, so its published
numbers are not to be compared with these.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from heads_lightning.evaluation import edit_similarity
from heads_lightning.execution import run_program
from heads_lightning.registry import ConfigError

_HOLES = {"python": "# TODO: Your code here", "java": "/* TODO: Your code here */"}
_HOLES |= {"cpp": _HOLES["java"], "csharp": _HOLES["java"]}
_COMPLETION = "{{completion}}"


class Problem(NamedTuple):
    """Fill the hole between two texts."""

    name: str
    prefix: str
    suffix: str
    answer: str
    """What stood there."""
    language: str
    program: Callable[[str], str]
    """The whole program for an answer, with what tests it."""
    tests: tuple[tuple[str, tuple[str, ...]], ...]
    """(standard input, right outputs); empty: the program tests itself by failing, or there is no test (`tested`)."""
    tested: bool


def read_problems(file: str, most: int | None = None) -> list[Problem]:
    """The problems of a file, at most so many, spread evenly; one line says what is wrong with it."""
    path = Path(file).expanduser()
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise ConfigError(f"problems={file} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise ConfigError(f"problems={file} is not lines of JSON ({error})") from None
    count = len(records) if most is None else min(most, len(records))
    chosen = [records[int((k + 0.5) * len(records) / count)] for k in range(count)]
    return [_problem(record, file) for record in chosen]


def _problem(record: Any, file: str) -> Problem:
    known = set(record) if isinstance(record, dict) else set()
    if {"prompt", "suffix", "canonical_solution", "test", "entry_point"} <= known:
        return _humaneval(record)
    if {"prompt", "eval_prompt", "ground_truth", "lang"} <= known:
        return _safim(record, file)
    raise ConfigError(f"problems={file}: a line has {', '.join(sorted(known)) or 'no fields'}; it is neither HumanEval-Infilling nor SAFIM")


def _humaneval(record: dict[str, str]) -> Problem:
    def program(answer: str) -> str:
        return f"{record['prompt']}{answer}{record['suffix']}\n{record['test']}\ncheck({record['entry_point']})\n"

    return Problem(
        str(record.get("task_id", "")), record["prompt"], record["suffix"], record["canonical_solution"], "python", program, (), True
    )


def _safim(record: dict[str, Any], file: str) -> Problem:
    language = record["lang"]
    prefix, hole, suffix = record["prompt"].partition(_HOLES.get(language, "\0"))
    if not hole or _COMPLETION not in record["eval_prompt"]:
        raise ConfigError(f"problems={file}: {record.get('task_id')} ({language}) has no hole to fill")
    tests = record.get("unit_tests") or []
    tests = json.loads(tests) if isinstance(tests, str) else tests
    cases = tuple((str(test["input"]), tuple(map(str, test["output"]))) for test in tests)
    return Problem(
        str(record.get("task_id", "")),
        prefix,
        suffix,
        record["ground_truth"],
        language,
        lambda answer: record["eval_prompt"].replace(_COMPLETION, answer),
        cases,
        bool(cases),
    )


class ProblemReport(NamedTuple):
    """What a model's answers are worth."""

    problems: int
    exact_match: float
    """Share of answers that equal the person's, white space at the ends aside."""
    edit_similarity: float
    executed: int
    """Problems whose programs were run: in Python, with tests, and only when asked for."""
    pass_at_1: float | None
    """Share of those that pass."""
    failures: dict[str, int]
    """Why the others failed: number by reason."""


def judge(problems: Sequence[Problem], answers: Sequence[str], *, execute: bool) -> ProblemReport:
    """Compare answers with those of people and, if asked to, run them.

    Args:
        problems, answers: one for each.
        execute: run the programs (see execution.run_program).
    """
    pairs = [(answer.strip(), problem.answer.strip()) for answer, problem in zip(answers, problems, strict=True)]
    reasons = [
        failure(problem, answer) for problem, answer in zip(problems, answers, strict=True) if execute and problem.tested and runs(problem)
    ]
    failures: dict[str, int] = {}
    for reason in filter(None, reasons):
        failures[reason] = failures.get(reason, 0) + 1
    count = max(len(pairs), 1)
    return ProblemReport(
        problems=len(pairs),
        exact_match=sum(a == b for a, b in pairs) / count,
        edit_similarity=sum(edit_similarity(a, b) for a, b in pairs) / count,
        executed=len(reasons),
        pass_at_1=reasons.count("") / len(reasons) if reasons else None,
        failures=failures,
    )


def runs(problem: Problem) -> bool:
    """Whether its program can be run here."""
    return problem.language == "python"


def failure(problem: Problem, answer: str) -> str:
    """Why an answer is wrong (`output`, `time`, or the kind of error); nothing if it passes every test."""
    program = problem.program(answer)
    for given, right in problem.tests or (("", ()),):
        finished = run_program(program, stdin=given)
        if not finished.ok:
            return finished.reason.partition(":")[0][:40]
        if right and finished.output.strip() not in {output.strip() for output in right}:
            return "output"
    return ""
