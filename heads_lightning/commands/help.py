"""The parts of `COMMAND --help` that are read from the registry and from conf/."""

from heads_lightning.composition.describe import group_options, groups
from heads_lightning.composition.store import prepare_store

HYDRA_FLAGS = """flags:
  -m, --multirun       run every combination of KEY=A,B,C
  --cfg job            print the configuration and stop (--resolve fills interpolations in)
  --config-dir FOLDER  your own YAML files: FOLDER/GROUP/OPTION.yaml, FOLDER/experiment/RECIPE.yaml
  --config-name NAME   another primary file than train.yaml
  --info, --hydra-help Hydra's own; also hydra/launcher=…, hydra/sweeper=…, --shell-completion install=bash"""


def choices() -> list[str]:
    """The groups and what each offers, one line a group."""
    prepare_store()
    lines = [f"  {group:10} {', '.join(group_options(group))}" for group in groups()]
    return ["options (heads-lightning list GROUP=OPTION shows their fields):", *lines]
