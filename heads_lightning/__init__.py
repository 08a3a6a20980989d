"""heads_lightning: declarative experiments for language models.

An **objective** makes examples, a **backbone** makes hidden states, a **head** turns hidden states into a score, a **loss
implementation** computes that score; each is one override away. Importing this package imports neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from heads_lightning.auto_classes import announce
from heads_lightning.configs.head import LMHeadConfig, LMHeadType, LMLossImplementation

if TYPE_CHECKING:
    from heads_lightning.bigs_config import BiGSConfig
    from heads_lightning.bigs_models import BiGSForCausalLM, BiGSForMaskedLM, BiGSModel
    from heads_lightning.composition import compose

__version__ = "0.1.0"
__all__ = [
    "BiGSConfig",
    "BiGSForCausalLM",
    "BiGSForMaskedLM",
    "BiGSModel",
    "LMHeadConfig",
    "LMHeadType",
    "LMLossImplementation",
    "__version__",
    "compose",
]
_LATER = {
    "compose": "composition",
    "BiGSConfig": "bigs_config",
    **dict.fromkeys(("BiGSForCausalLM", "BiGSForMaskedLM", "BiGSModel"), "bigs_models"),
}
"""Names that cost an import (Hydra: 0.1 s; transformers: seconds) and the module that each is imported from when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise ImportError(f"{name} needs transformers: pip install 'heads-lightning[huggingface]'", name="transformers") from None
        raise


announce()
