"""Training on a device without float64 (Apple's GPUs): here the processor, with float64 refused as such a device refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from heads_lightning.composition import compose
from heads_lightning.precision import widest_float
from heads_lightning.run import train

WHERE = ("totals", "module", "backbones.ssm", "losses.value")
"""Modules that ask for the widest type of a device."""
MODELS = {
    "fim": ["objective=fim"],
    "mlm_bigs": ["objective=mlm", "head=mlm", "backbone=bigs_tiny"],
    "value": ["objective=value", "head=value"],
    "t5": ["objective=span_corruption", "backbone=t5_tiny", "head=t5", "tokenizer.num_sentinels=20"],
}


class NoFloat64(TorchDispatchMode):
    """Refuses every tensor of float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} made float64, which the device does not have")
        return out


def test_the_widest_float() -> None:
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("model", MODELS)
def test_training_needs_no_float64(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    for name in WHERE:
        monkeypatch.setattr(f"heads_lightning.{name}.widest_float", lambda device: torch.float32)
    sized = ("backbone.d_model", "backbone.num_layers", "backbone.num_heads")  # the presets have sizes of their own
    kept = [field for field in tiny if field.split("=")[0] not in sized or "tiny" not in str(MODELS[model])]
    overrides = [*kept, *MODELS[model], "trainer.max_steps=2", "trainer.linear_kernel=torch"]
    with NoFloat64():
        train(compose(overrides), tmp_path / "run")
