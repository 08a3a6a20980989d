"""heads_lightning: declarative experiments for language models.

An **objective** makes examples, a **backbone** makes hidden states, a **head** turns hidden states into a score, a **loss
implementation** computes that score; each is one override away. Importing this package imports neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from heads_lightning.configs.head import LMHeadConfig, LMHeadType, LMLossImplementation

if TYPE_CHECKING:
    from heads_lightning.composition import compose
    from heads_lightning.heads.value import ValueHead
    from heads_lightning.value_models import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        create_reference_model,
    )

__version__ = "0.1.0"
__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "LMHeadConfig",
    "LMHeadType",
    "LMLossImplementation",
    "ValueHead",
    "__version__",
    "compose",
    "create_reference_model",
]

_LATER = {
    "compose": "heads_lightning.composition",  # Hydra: 0.1 s
    "ValueHead": "heads_lightning.heads.value",
    "AutoModelForCausalLMWithValueHead": "heads_lightning.value_models",
    "AutoModelForSeq2SeqLMWithValueHead": "heads_lightning.value_models",
    "create_reference_model": "heads_lightning.value_models",
}
"""Names that cost an import, and where they are: imported when they are first used."""


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
