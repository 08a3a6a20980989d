"""heads_lightning: declarative experiments for language models.

An **objective** makes examples, a **backbone** makes hidden states, a **head** turns hidden states into a score, a **loss
implementation** computes that score; each is one override away. Importing this package imports neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from heads_lightning.configs.head import LMHeadConfig, LMHeadType, LMLossImplementation

if TYPE_CHECKING:
    from heads_lightning.backbones.masks import AttentionMask, t5_extended_attention_mask, t5_position_ids
    from heads_lightning.composition import compose
    from heads_lightning.configs.t5 import T5Config
    from heads_lightning.t5_model import T5LMHead, T5Model

__version__ = "0.1.0"
__all__ = [
    "AttentionMask",
    "LMHeadConfig",
    "LMHeadType",
    "LMLossImplementation",
    "T5Config",
    "T5LMHead",
    "T5Model",
    "__version__",
    "compose",
    "t5_extended_attention_mask",
    "t5_position_ids",
]

_LAZY = {
    "AttentionMask": "backbones.masks",
    "T5Config": "configs.t5",
    "T5LMHead": "t5_model",
    "T5Model": "t5_model",
    "compose": "composition",
    "t5_extended_attention_mask": "backbones.masks",
    "t5_position_ids": "backbones.masks",
}
"""Names that cost an import (Hydra: 0.1 s, torch: 1 s), and the module each comes from when it is first used."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"heads_lightning.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
