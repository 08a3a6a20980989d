"""A trained model under lm-evaluation-harness: the extra `lm-eval`, imported by whoever runs the harness.

    import lm_eval, heads_lightning.evaluation.lm_eval
    lm_eval.simple_evaluate("heads_lightning", model_args="checkpoint=runs/NAME/DATE", tasks=["lambada_openai"])

The three questions of the harness (its `LM` class) are answered by the same functions as the held-out protocol: sums of nats in fp32,
documents opened by the marker of training, contexts cut to the length of training from the left.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from heads_lightning.evaluation.abilities import can_read_left_to_right, opening
from heads_lightning.evaluation.likelihood import next_token_row, score_rows
from heads_lightning.experiment import TrainedModel, load
from heads_lightning.generation import generate
from heads_lightning.registry import ConfigError

LM: Any = object
register_model: Any = None
with contextlib.suppress(ImportError):  # the missing harness is named when the class is used, so that the rest can be tested without it
    LM = importlib.import_module("lm_eval.api.model").LM
    register_model = importlib.import_module("lm_eval.api.registry").register_model


def score_continuations(model: TrainedModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding gives it) of each continuation after its context.

    A context ends where its trailing white space begins, which belongs to the continuation: both are tokenised as their concatenation is.
    """
    rows = []
    for context, continuation in pairs:
        kept = context.rstrip()
        before, rest = model.tokenizer.encode(kept), context[len(kept) :] + continuation
        target = model.tokenizer.encode_inside(rest) if kept else model.tokenizer.encode(rest)
        rows.append(next_token_row(*_cut(model, before, target)))
    scores = score_rows(model, rows, hits=True)
    asked = [row.labels >= 0 for row in rows]
    return [(-float(s.nats_BS.sum()), bool(s.hits_BS[where].all())) for s, where in zip(scores, asked, strict=True)]


def score_texts(model: TrainedModel, texts: Sequence[str]) -> list[float]:
    """Log-likelihood of whole texts, every token once: windows of training length, each with the half before it as context."""
    totals = []
    half = max(model.config.data.sequence_length // 2, 1)
    for text in texts:
        ids = model.tokenizer.encode(text)
        starts = range(0, max(len(ids), 1), half)
        rows = [next_token_row(*_cut(model, ids[max(s - half, 0) : s], ids[s : s + half], opens=s <= half)) for s in starts]
        totals.append(-sum(float(s.nats_BS.sum()) for s in score_rows(model, rows)))
    return totals


def _cut(model: TrainedModel, before: np.ndarray, target: np.ndarray, *, opens: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and target that fit the length of training: the context loses its beginning, and with it the marker."""
    room = model.config.data.sequence_length - len(target)
    if room < 1:
        before, target = target[:0], target[-model.config.data.sequence_length :]
        room = 1
    if (opens and len(before) < room) or not len(before):
        before = np.concatenate([[opening(model)], before])
    return before[-room:].astype(np.int64), target


def continue_texts(model: TrainedModel, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Greedy continuations, each up to the first of its `until` strings or `max_gen_toks` tokens."""
    answers = []
    end = model.tokenizer.vocabulary.end_of_document
    for context, settings in requests:
        new = int(settings.get("max_gen_toks", 128))
        room = max(model.config.data.sequence_length - new, 1)
        prompt = np.concatenate([[opening(model)], model.tokenizer.encode(context)])[-room:]
        ids = generate(model.backbone, model.head, [prompt.tolist()], max_new_tokens=new, stop_ids=[end])[0]
        text = model.tokenizer.decode(ids)
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        answers.append(text)
    return answers


class HeadsLightningLM(LM):
    """The harness's view of a model.

    Args:
        checkpoint: run folder, checkpoint file or MLflow run id.
        run_root: where an MLflow run id is looked up.
        device: cpu, cuda, mps.
    """

    def __init__(self, checkpoint: str, run_root: str = "runs", device: str = "cpu", **_: Any) -> None:
        if LM is object:
            raise ConfigError("the lm-eval adapter needs lm-evaluation-harness; pip install 'heads-lightning[lm-eval]'")
        super().__init__()
        self.model = load(checkpoint, run_root=run_root, device=device)
        if not can_read_left_to_right(self.model):
            raise ConfigError(f"{checkpoint} was trained with objective={self.model.config.objective.name} and does not read left to right")

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """Of continuations."""
        return score_continuations(self.model, [request.args for request in requests])

    def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
        """Of whole texts."""
        return score_texts(self.model, [request.args[0] for request in requests])

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        """Greedy continuations."""
        return continue_texts(self.model, [request.args for request in requests])


if register_model is not None:
    register_model("heads_lightning")(HeadsLightningLM)
