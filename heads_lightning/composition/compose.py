"""From overrides to a checked ExperimentConfig, the same way for the command line and for Python."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from heads_lightning.composition.loaded_once import keep_what_hydra_loads
from heads_lightning.composition.mistakes import check_overrides, explained, refuse_loose_values
from heads_lightning.composition.store import conf_dir, prepare_store, version_base
from heads_lightning.composition.validation import validate
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "train") -> ExperimentConfig:
    """The experiment that `heads-lightning train OVERRIDES` would run, checked across its parts.

    Args:
        overrides: as on the command line, e.g. `["objective=mlm", "head=mlm", "trainer.max_steps=10"]`.
        config_dir: a folder of your own YAML files, as with `--config-dir`.
        config_name: the primary config.

    Raises:
        ConfigError: one line that says what was given, what is allowed and the override that works.

    >>> from heads_lightning import compose
    >>> config = compose(["objective=mlm", "head=mlm", "trainer.max_steps=10"])
    >>> config.name, config.trainer.max_steps
    ('mlm-mlm-transformer', 10)
    >>> compose(["objective=mln"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    heads_lightning.registry.ConfigError: objective=mln does not exist. Did you mean objective=mlm? Available: ...
    """
    return to_experiment(compose_tree(overrides, config_dir=config_dir, config_name=config_name), overrides)


def compose_tree(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "train") -> DictConfig:
    """The composed tree before it becomes an ExperimentConfig: interpolations are not resolved, parts are not checked together."""
    # Hydra looks for the primary file before it reads the search path
    own = config_dir if config_dir is not None and (Path(config_dir) / f"{config_name}.yaml").is_file() else None
    with initialized(config_dir, primary=own), explained(overrides, config_dir):
        check_overrides(overrides, config_dir)
        with _readable_files(config_dir):
            return hydra.compose(config_name, [*overrides, *search_path(overrides, config_dir if own is None else conf_dir())])


@contextmanager
def _readable_files(config_dir: str | Path | None) -> Iterator[None]:
    """A configuration file that cannot be read, or is no text, is named."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # Hydra's own: a file that is not there
            raise
        raise ConfigError(f"the configuration file {error.filename} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        files = [file for file in Path(config_dir or conf_dir()).rglob("*.yaml") if file.is_file()]
        found = [file for file in files if file.read_bytes().startswith(error.object[:512])]
        file = found[0] if found else "a configuration file"
        raise ConfigError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


@contextmanager
def initialized(config_dir: str | Path | None = None, *, primary: str | Path | None = None) -> Iterator[None]:
    """Hydra made ready for composing from `primary` (the shipped folder when left out); inside a running Hydra application its state
    comes back afterwards."""
    prepare_store()
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a folder that can be read")
    if config_dir is not None:
        refuse_hidden_files(Path(config_dir))
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(Path(primary or conf_dir()).resolve()), job_name="heads_lightning", **version_base()):
            keep_what_hydra_loads()
            yield
    finally:
        GlobalHydra.instance().hydra = running


def refuse_hidden_files(folder: Path) -> None:
    """Files of the user's that Hydra would pass over for shipped ones of the same name, without a word."""
    for shipped in sorted(conf_dir().rglob("*.yaml")):
        own = folder / shipped.relative_to(conf_dir())
        if own.is_file() and own.read_bytes() != shipped.read_bytes():
            name = own.relative_to(folder).as_posix()
            raise ConfigError(f"{own} would not be read: a shipped file has its name, {name}; rename it, e.g. my_{own.stem}.yaml")


def search_path(overrides: Sequence[str], config_dir: str | Path | None) -> list[str]:
    """The override that adds `config_dir` to Hydra's search path."""
    if config_dir is None or any(o.startswith("hydra.searchpath") for o in overrides):
        return []
    quoted = Path(config_dir).resolve().as_posix().replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.searchpath=['file://{quoted}']"]


def to_experiment(tree: DictConfig, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The typed, checked experiment of a composed tree (without Hydra's own node)."""
    prepare_store()
    with explained(overrides):
        config = OmegaConf.to_object(tree)
    assert isinstance(config, ExperimentConfig)
    refuse_loose_values(config, overrides)
    validate(config)
    return config
