"""stub"""

from contextlib import contextmanager

from hydra.core.override_parser.overrides_parser import OverridesParser


@contextmanager
def explained(overrides=(), config_dir=None):
    yield


def refuse_additions(overrides): ...
def parse(overrides):
    return OverridesParser.create().parse_overrides(list(overrides))
