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
    from heads_lightning.data.prepare import prepare
    from heads_lightning.experiment import load
    from heads_lightning.scoring import evaluate
    from heads_lightning.summary import report_text

    model = load(request.checkpoint, run_root=request.run_root, device=request.device)
    asked = {k: v for k in ("text_tokens", "infill_lines") if (v := getattr(request, k)) is not None}
    model = replace(model, config=replace(model.config, evaluation=replace(model.config.evaluation, **asked)))
    prepared = prepare(model.config.data, model.config.tokenizer)
    outcome = evaluate(model, prepared)
    if request.json:
        print(json.dumps(asdict(outcome.report)))
    else:
        print(report_text(outcome.report, outcome.samples))
