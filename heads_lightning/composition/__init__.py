"""Composition: from files, registry, plugins and command line to one typed, checked ExperimentConfig. No torch.

store.py       conf/ + registry + plugins -> Hydra
compose.py     overrides -> ExperimentConfig
loaded_once.py many compositions in a row: each file and option is read once
mistakes.py    Hydra's and OmegaConf's errors -> one line that names the override that works
validation.py  the parts checked together, and against this machine
saved.py       ExperimentConfig <-> plain YAML, without Hydra
describe.py    what can be set: fields, types, defaults, documentation
"""

from heads_lightning.composition.compose import compose, compose_tree, to_experiment
from heads_lightning.composition.loaded_once import loaded_once
from heads_lightning.composition.saved import config_hash, flatten, from_yaml, to_yaml
from heads_lightning.composition.store import conf_dir, plugin_origins, prepare_store, store_options
from heads_lightning.composition.validation import machine_problems, validate

__all__ = [
    "compose",
    "compose_tree",
    "conf_dir",
    "config_hash",
    "flatten",
    "from_yaml",
    "loaded_once",
    "machine_problems",
    "plugin_origins",
    "prepare_store",
    "store_options",
    "to_experiment",
    "to_yaml",
    "validate",
]
