"""heads_lightning: declarative experiments for language models.

An **objective** makes examples, a **backbone** makes hidden states, a **head** turns hidden states into a score, a **loss
implementation** computes that score; each is one override away. Importing this package imports neither torch nor Lightning.
"""

from heads_lightning.configs.head import LMHeadConfig, LMHeadType, LMLossImplementation

__version__ = "0.1.0"
__all__ = ["LMHeadConfig", "LMHeadType", "LMLossImplementation", "__version__"]
