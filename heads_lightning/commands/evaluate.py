"""Evaluate: the held-out protocol on a trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from heads_lightning.commands.arguments import read
from heads_lightning.configs.requests import EvaluateRequest

Arguments = EvaluateRequest
"""What the command takes."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning evaluate checkpoint=RUN [infill_lines=N] [json=true]`."""
    request, _ = read(EvaluateRequest, arguments)
    from heads_lightning.data.prepare import PreparedData
    from heads_lightning.experiment import load, prepare_data
    from heads_lightning.scoring import evaluate, value_metrics
    from heads_lightning.summary import report_text, values_text

    model = load(request.checkpoint, run_root=request.run_root, device=request.device)
    asked = {k: v for k in ("text_tokens", "infill_lines") if (v := getattr(request, k)) is not None}
    model = replace(model, config=replace(model.config, evaluation=replace(model.config.evaluation, **asked)))
    prepared = prepare_data(model.config)
    if model.config.objective.predicts == "value":
        values = value_metrics(model, prepared)
        print(json.dumps(values) if request.json else values_text(model.config, values))
        return
    assert isinstance(prepared, PreparedData)
    outcome = evaluate(model, prepared)
    if request.json:
        print(json.dumps(asdict(outcome.report)))
    else:
        print(report_text(outcome.report, outcome.samples))
