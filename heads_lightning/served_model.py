"""A trained model in the form that MLflow loads: `mlflow models predict`, `mlflow.pyfunc.load_model`.

The folder is written by hand, as MLflow's own format for a loader module, so that training need not import MLflow (seconds):

    MLmodel            how to load it, and the signature      model.ckpt         weights, config and tokenizer, without optimizer
    requirements.txt   the versions that wrote it             python_env.yaml    the same, as MLflow wants to find it

One row is one question. A model that infills takes the columns `prefix` and `suffix` (either may be left out) and gives `middle`; one
that only continues a text takes `prefix`. The parameters are those of `heads-lightning infill`.
"""

from __future__ import annotations

import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml

from heads_lightning import __version__
from heads_lightning.composition import to_yaml
from heads_lightning.configs.objective import ObjectiveConfig
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.evaluation import masked
from heads_lightning.evaluation.abilities import infilling_parts
from heads_lightning.evaluation.continuation import can_continue, continuation
from heads_lightning.evaluation.scoring import infill
from heads_lightning.evaluation.span_filling import fills_spans
from heads_lightning.experiment import TrainedModel, load, tokenizer_files
from heads_lightning.registry import ConfigError
from heads_lightning.training.checkpoints import KEY, AtomicCheckpointIO

if TYPE_CHECKING:
    import pandas

WEIGHTS = "model.ckpt"
PARAMETERS = {"max_new_tokens": ("long", 100), "temperature": ("double", 0.0), "seed": ("long", 0)}
"""What a caller may set beside the rows: MLflow's type, and default."""
REQUIRED = ("torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "numpy")


class Signature(NamedTuple):
    """What a served model takes and gives, in columns of text."""

    inputs: tuple[str, ...]
    output: str = "middle"

    def as_dict(self) -> dict[str, str]:
        """MLflow's form: JSON in YAML. No column is required: a missing one is an empty text."""
        columns = [{"type": "string", "name": name, "required": False} for name in self.inputs]
        given = [{"type": "string", "name": self.output, "required": True}]
        parameters = [{"name": k, "default": default, "shape": None, "type": type_} for k, (type_, default) in PARAMETERS.items()]
        return {"inputs": json.dumps(columns), "outputs": json.dumps(given), "params": json.dumps(parameters)}


def signature_of(objective: ObjectiveConfig) -> Signature | None:
    """What a model of this objective can be asked; None for one that writes no text."""
    if infilling_parts(objective) or fills_spans(objective) or masked.writes_by_masks(objective):
        return Signature(("prefix", "suffix"))
    return Signature(("prefix",)) if can_continue(objective) else None


def check_servable(objective: ObjectiveConfig) -> None:
    """Refuse what could not be asked anything.

    Raises:
        ConfigError: in one line.
    """
    if signature_of(objective) is None:
        raise ConfigError(f"tracking.log_model=true serves models that write text, which objective={objective.name} does not teach; "
                          f"use tracking.log_model=false")  # fmt: skip


def write_model(folder: Path, model: TrainedModel) -> Path:
    """Write the model of a run as a folder that MLflow loads; returns it. The cost is one write of the weights."""
    signature = signature_of(model.config.objective)
    assert signature is not None, "checked when the run began"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    weights |= {f"head.{k}": v for k, v in model.head.state_dict().items()}
    record = {"config": to_yaml(model.config), "tokenizer": tokenizer_files(model.tokenizer)}
    AtomicCheckpointIO().save_checkpoint({"state_dict": weights, "global_step": model.step, KEY: record}, folder / WEIGHTS)
    requirements = [f"heads_lightning=={__version__}", *(f"{name}=={metadata.version(name)}" for name in REQUIRED)]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(yaml.safe_dump(environment), encoding="utf-8")
    (folder / "MLmodel").write_text(yaml.safe_dump(_description(signature), sort_keys=False), encoding="utf-8")
    return folder


def _description(signature: Signature) -> dict[str, Any]:
    flavor = {
        "loader_module": __name__,
        "data": WEIGHTS,
        "python_version": platform.python_version(),
        "env": {"virtualenv": "python_env.yaml"},
    }
    return {
        "flavors": {"python_function": flavor},
        "mlflow_version": metadata.version("mlflow"),
        "signature": signature.as_dict(),
        "utc_time_created": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


class ServedModel:
    """What MLflow calls.

    Args:
        model: from `experiment.load`.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        signature = signature_of(model.config.objective)
        assert signature is not None
        self.signature = signature

    @torch.no_grad()
    def predict(self, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> pandas.DataFrame:
        """One `middle` for each row.

        Args:
            model_input: columns of text, as the signature names them.
            params: some of PARAMETERS.
        """
        import pandas

        request = InfillRequest(checkpoint=str(self.model.checkpoint), **(params or {}))
        rows = model_input.reindex(columns=list(self.signature.inputs)).astype(object)
        rows = rows.where(rows.notna(), "")
        answers = [self._answer([str(text) for text in row], request) for row in rows.itertuples(index=False)]
        return pandas.DataFrame({self.signature.output: answers}, index=model_input.index)

    def _answer(self, texts: list[str], request: InfillRequest) -> str:
        if len(texts) == 1:
            return continuation(self.model, texts[0], request)
        prefix, suffix = texts
        return infill(self.model, prefix, suffix, request)


def _load_pyfunc(path: str) -> ServedModel:
    """MLflow's entry point of a loader module."""
    return ServedModel(load(path))
