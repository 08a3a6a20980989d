"""Hugging Face's Auto classes come to know ours, without an import of transformers for those who do not use it.

`announce` is called when heads_lightning is imported. If transformers' table of configurations is imported already, it is extended at once;
if not, a finder on sys.meta_path extends it right after it is imported. The models follow when a first BiGSConfig is made, which every
Auto class does before it looks for a model; others who import transformers (torchmetrics does, in every training) do not pay for them. So
`AutoModelForMaskedLM.from_pretrained(folder)` works whichever of the two packages is imported first.
"""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


def register_config() -> None:
    """AutoConfig knows BiGSConfig, and the first BiGSConfig makes the models known."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from heads_lightning.models.bigs_config import BiGSConfig

    AutoConfig.register(BiGSConfig.model_type, BiGSConfig, exist_ok=True)
    BiGSConfig.before_first.append(register_models)


def register_models() -> None:
    """AutoModel, AutoModelForMaskedLM and AutoModelForCausalLM know the BiGS classes."""
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    from heads_lightning.models import bigs as bigs_models

    AutoModel.register(bigs_models.BiGSConfig, bigs_models.BiGSModel, exist_ok=True)
    AutoModelForMaskedLM.register(bigs_models.BiGSConfig, bigs_models.BiGSForMaskedLM, exist_ok=True)
    AutoModelForCausalLM.register(bigs_models.BiGSConfig, bigs_models.BiGSForCausalLM, exist_ok=True)


TABLE = "transformers.models.auto.configuration_auto"
"""The module of transformers that register_config extends."""


class _AfterImport(MetaPathFinder):
    """Finds the module TABLE as the other finders do, and extends it after it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for every other module: the other finders are asked next."""
        if fullname != TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def _register() -> None:
    try:
        register_config()
    except Exception as error:  # an import of transformers must not fail because of us
        warnings.warn(f"heads_lightning's models are unknown to the Auto classes: {type(error).__name__}: {error}", stacklevel=2)


def announce() -> None:
    """Extend the table now if it is imported already, else as soon as it is."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
