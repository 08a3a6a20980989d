"""heads_lightning: declarative experiments for language models.

An **objective** makes examples, a **backbone** makes hidden states, a **head** turns hidden states into a score, a **loss
implementation** computes that score; each is one override away. Importing this package imports neither torch nor Lightning.
"""

from typing import TYPE_CHECKING, Any

from heads_lightning.configs.head import LMHeadConfig, LMHeadType, LMLossImplementation

if TYPE_CHECKING:
    from heads_lightning.composition import compose

__version__ = "0.1.0"
__all__ = ["LMHeadConfig", "LMHeadType", "LMLossImplementation", "__version__", "compose"]


def __getattr__(name: str) -> Any:
    """Names that cost an import are imported when they are first used (Hydra: 0.1 s)."""
    if name == "compose":
        from heads_lightning.composition import compose

        return compose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
