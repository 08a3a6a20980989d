"""Many compositions in a row: each file and option is read once.

Hydra parses every file and makes the tree of every option anew for each composition, a quarter of the time of one. What it loads is
kept here as bytes: Hydra writes into what it was handed, and unpickling a tree costs a quarter of copying it.
"""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.config_source import ConfigResult

_kept: dict[tuple[str, ...], bytes] | None = None
"""What was loaded, by where it was looked for and its name; None outside `loaded_once`."""


@contextmanager
def loaded_once() -> Iterator[None]:
    """Inside, compositions share what they load: files and registry must not change meanwhile."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def keep_what_hydra_loads() -> None:
    """Make the Hydra that was just initialised read through what is kept, inside `loaded_once`."""
    if _kept is not None:
        loader = GlobalHydra.instance().config_loader()
        loader.repository = KeepingRepository(loader.get_search_path(), _kept)  # pyright: ignore[reportAttributeAccessIssue]


class KeepingRepository(ConfigRepository):
    """Where Hydra looks for files and options, with a memory."""

    def __init__(self, config_search_path: ConfigSearchPath, kept: dict[tuple[str, ...], bytes]) -> None:
        super().__init__(config_search_path)
        self.kept = kept

    def __deepcopy__(self, memo: dict[int, object]) -> "KeepingRepository":
        """Hydra copies its repository for each composition, to give the copy other sources."""
        return copy.copy(self)

    def load_config(self, config_path: str) -> ConfigResult | None:
        """A result of its own for every caller."""
        key = (*(f"{source.provider} {source.path}" for source in self.sources), config_path)
        if key not in self.kept:
            loaded = super().load_config(config_path)
            try:
                self.kept[key] = pickle.dumps(loaded, pickle.HIGHEST_PROTOCOL)
            except (pickle.PicklingError, AttributeError, TypeError):  # the class of an option that was made inside a function
                return loaded
        return pickle.loads(self.kept[key])
