"""heads_lightning: declarative experiments for language models.

An **objective** makes examples, a **backbone** makes hidden states, a **head** turns hidden states into a score, a **loss
implementation** computes that score; each is one override away. Importing this package imports neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from heads_lightning.models.auto_classes import announce

if TYPE_CHECKING:
    from heads_lightning.backbones.masks import AttentionMask, t5_extended_attention_mask, t5_position_ids
    from heads_lightning.composition import compose
    from heads_lightning.configs.experiment import ExperimentConfig
    from heads_lightning.configs.head import LMHeadConfig, LMHeadType, LMLossImplementation
    from heads_lightning.configs.t5 import T5Config
    from heads_lightning.heads import LMHead, LMOutputWithLoss, MLMHead, NormalizedLMHead
    from heads_lightning.heads.value import ValueHead
    from heads_lightning.library import build, infill, load, train
    from heads_lightning.losses import linear_cross_entropy
    from heads_lightning.models.bigs import BiGSForCausalLM, BiGSForMaskedLM, BiGSModel
    from heads_lightning.models.bigs_config import BiGSConfig
    from heads_lightning.models.reference import create_reference_model
    from heads_lightning.models.t5 import T5LMHead, T5Model
    from heads_lightning.models.value import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

__version__ = "0.1.0"
__all__ = [
    "AttentionMask",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BiGSConfig",
    "BiGSForCausalLM",
    "BiGSForMaskedLM",
    "BiGSModel",
    "ExperimentConfig",
    "LMHead",
    "LMHeadConfig",
    "LMHeadType",
    "LMLossImplementation",
    "LMOutputWithLoss",
    "MLMHead",
    "NormalizedLMHead",
    "T5Config",
    "T5LMHead",
    "T5Model",
    "ValueHead",
    "__version__",
    "build",
    "compose",
    "create_reference_model",
    "infill",
    "linear_cross_entropy",
    "load",
    "t5_extended_attention_mask",
    "t5_position_ids",
    "train",
]
_LATER = {
    "composition": ("compose",),
    "backbones.masks": ("AttentionMask", "t5_extended_attention_mask", "t5_position_ids"),
    "configs.experiment": ("ExperimentConfig",),
    "configs.head": ("LMHeadConfig", "LMHeadType", "LMLossImplementation"),
    "configs.t5": ("T5Config",),
    "heads": ("LMHead", "LMOutputWithLoss", "MLMHead", "NormalizedLMHead"),
    "heads.value": ("ValueHead",),
    "library": ("build", "infill", "load", "train"),
    "losses": ("linear_cross_entropy",),
    "models.bigs": ("BiGSForCausalLM", "BiGSForMaskedLM", "BiGSModel"),
    "models.bigs_config": ("BiGSConfig",),
    "models.reference": ("create_reference_model",),
    "models.t5": ("T5LMHead", "T5Model"),
    "models.value": ("AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead"),
}
"""What is imported when it is first used: the settings cost 0.03 s, Hydra 0.1 s, torch and transformers seconds."""
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise ImportError(f"{name} needs transformers: pip install 'heads-lightning[huggingface]'", name="transformers") from None
        raise


announce()
