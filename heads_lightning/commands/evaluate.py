"""Evaluate: the held-out protocol on a trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from heads_lightning.commands.arguments import read
from heads_lightning.configs.requests import EvaluateRequest

Arguments = EvaluateRequest
"""What the command takes."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning evaluate checkpoint=RUN [infill_lines=N] [save=true] [problems=FILE [execute=true]] [json=true]`."""
    request, _ = read(EvaluateRequest, arguments)
    from heads_lightning.data.prepare import PreparedData
    from heads_lightning.evaluation.scoring import evaluate, value_metrics
    from heads_lightning.experiment import load, prepare_data
    from heads_lightning.summary import report_text, values_text

    model = load(request.checkpoint, run_root=request.run_root, device=request.device)
    asked = {k: v for k in ("text_tokens", "infill_lines") if (v := getattr(request, k)) is not None}
    model = replace(model, config=replace(model.config, evaluation=replace(model.config.evaluation, **asked)))
    if request.problems is not None:
        _problems(model, request)
        return
    prepared = prepare_data(model.config)
    if model.config.objective.predicts == "value":
        values = value_metrics(model, prepared)
        print(json.dumps(values) if request.json else values_text(model.config, values))
        return
    assert isinstance(prepared, PreparedData)
    outcome = evaluate(model, prepared)
    if request.save:
        (model.checkpoint.parent.parent / "evaluation.json").write_text(json.dumps(asdict(outcome.report), indent=1))
    if request.json:
        print(json.dumps(asdict(outcome.report)))
    else:
        print(report_text(outcome.report, outcome.samples))


def _problems(model: Any, request: EvaluateRequest) -> None:
    """Problems of others instead of the held-out text."""
    from heads_lightning.evaluation.problems import judge, read_problems
    from heads_lightning.evaluation.scoring import infill_texts

    assert request.problems is not None
    problems = read_problems(request.problems, request.max_problems)
    report = judge(problems, infill_texts(model, [(p.prefix, p.suffix) for p in problems]), execute=request.execute)
    if request.json:
        print(json.dumps(report._asdict()))
        return
    print(f"{report.problems} problems: exact match {report.exact_match:.1%}, edit similarity {report.edit_similarity:.3f}")
    if report.pass_at_1 is not None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.failures.items(), key=lambda item: -item[1]))
        print(f"pass@1 {report.pass_at_1:.1%} of the {report.executed} that were run{f' (failed: {reasons})' if reasons else ''}")
    elif request.execute:
        print("none was run: programs are run that are in Python and have tests")
