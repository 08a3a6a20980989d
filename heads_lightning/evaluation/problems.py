"""Infilling problems of others, from local files: HumanEval-Infilling (OpenAI, arXiv 2207.14255) and SAFIM (arXiv 2403.04814).

Both are lines of JSON, plain or gzipped. A problem is a prefix, a suffix and the answer of a person; tests decide whether a program with
another middle is right. Answers to HumanEval-Infilling are taken as the model ends them, those to SAFIM are cut as SAFIM cuts them: see
`truncated`.
"""

from __future__ import annotations

import ast
import gzip
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from heads_lightning.evaluation.execution import run_program
from heads_lightning.evaluation.protocol import edit_similarity
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
    kind: str = ""
    """SAFIM: what is missing, `block`, `control` (an expression) or `api` (a call). Empty: of another collection."""


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
        str(record.get("task_id", "")).partition("_")[0],
    )


# -- where SAFIM ends an answer -----------------------------------------------------------------------------------------


def truncated(problem: Problem, answer: str) -> str:
    """The part of an answer that SAFIM counts (arXiv 2403.04814, section 3.4, and its published post-processors).

    A block loses lines from its end until the program parses and nothing outside the hole is another statement than with `pass` in it;
    here Python's own parser decides, and blocks of other languages are left as they are. An expression of a control structure is the first
    line that is not blank, or in languages with brackets what stands before the bracket that closes the structure's. A call ends with its
    bracket.
    """
    if problem.kind == "block" and problem.language == "python":
        return _truncated_block(problem, answer)
    if problem.kind == "control" and problem.language == "python":
        return next((line for line in answer.splitlines() if line.strip()), "")
    if problem.kind in ("control", "api"):
        return _balanced(answer, closed=problem.kind == "api")
    return answer


def _truncated_block(problem: Problem, answer: str) -> str:
    around = _trace(problem.program("pass"))
    lines = answer.splitlines(keepends=True)
    while lines and not _only_the_hole_differs(around, _trace(problem.program("".join(lines)))):
        lines.pop()
    return "".join(lines)


def _only_the_hole_differs(around: list[str] | None, program: list[str] | None) -> bool:
    """Whether a program is another one with more in the place of its `pass`."""
    if around is None or program is None or len(program) < len(around):
        return False
    front = next((k for k, (a, b) in enumerate(zip(around, program, strict=False)) if a != b), len(around))
    back = next((k for k, (a, b) in enumerate(zip(reversed(around), reversed(program), strict=False)) if a != b), len(around))
    return front + back >= len(around) - len(_PASS)


_PASS = ["<Pass", "Pass>"]


def _trace(program: str) -> list[str] | None:
    """The nodes of a program as they begin and end; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None

    def visit(node: ast.AST) -> Iterator[str]:
        yield f"<{type(node).__name__}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)
        yield f"{type(node).__name__}>"

    return list(visit(tree))


def _balanced(answer: str, *, closed: bool) -> str:
    """Up to a closing bracket: the one of the first that is open (`closed`), or before one that nothing opened."""
    depth = 0
    for k, character in enumerate(answer):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == ")" and depth <= (0 if closed else -1):
            return answer[: k + closed]
    return answer


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
    answers = [truncated(problem, answer) for problem, answer in zip(problems, answers, strict=True)]
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
