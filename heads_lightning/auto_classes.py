"""Hugging Face's Auto classes come to know ours, without an import of transformers for those who do not use it.

`announce` is called when heads_lightning is imported. If transformers' tables of Auto classes are imported already, they are extended
at once; if not, a finder on sys.meta_path extends each table right after it is imported. So `AutoModelForMaskedLM.from_pretrained(folder)`
works whichever of the two packages is imported first.
"""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


def register_config() -> None:
    """AutoConfig knows BiGSConfig."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from heads_lightning.bigs_config import BiGSConfig

    AutoConfig.register(BiGSConfig.model_type, BiGSConfig, exist_ok=True)


def register_models() -> None:
    """AutoModel, AutoModelForMaskedLM and AutoModelForCausalLM know the BiGS classes."""
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    from heads_lightning import bigs_models

    register_config()
    AutoModel.register(bigs_models.BiGSConfig, bigs_models.BiGSModel, exist_ok=True)
    AutoModelForMaskedLM.register(bigs_models.BiGSConfig, bigs_models.BiGSForMaskedLM, exist_ok=True)
    AutoModelForCausalLM.register(bigs_models.BiGSConfig, bigs_models.BiGSForCausalLM, exist_ok=True)


TABLES: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    "transformers.models.auto.modeling_auto": register_models,
}
"""Modules of transformers, and what extends them."""


class _AfterImport(MetaPathFinder):
    """Finds the modules of TABLES as the other finders do, and runs a function after each is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for every other module: the other finders are asked next."""
        if fullname not in TABLES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _try(TABLES[fullname])

            spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def _try(register: Callable[[], None]) -> None:
    try:
        register()
    except Exception as error:  # an import of transformers must not fail because of us
        warnings.warn(f"heads_lightning's models are unknown to the Auto classes: {type(error).__name__}: {error}", stacklevel=2)


def announce() -> None:
    """Extend the tables that are imported already, and the others when they are."""
    for name, register in TABLES.items():
        if name in sys.modules:
            _try(register)
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
