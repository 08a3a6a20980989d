"""`new`: a working part to start from: the walkthrough of CONTRIBUTING.md under a name of your own.

There is one text for both: the files of the walkthrough, which a test runs, are written with other names. A head, an objective and a
backbone go to a plugin, a package in the working folder; a loss implementation goes into a clone of this project, whose enum it joins.
"""

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from heads_lightning.commands.arguments import read
from heads_lightning.composition.describe import group_options
from heads_lightning.composition.store import conf_dir, prepare_store
from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.registry import ConfigError, nearest

WALKTHROUGHS = "CONTRIBUTING.md"
PACKAGE = "my_parts"
LOSSES, ENUM = "heads_lightning/losses", "heads_lightning/configs/head.py"
LAST_MEMBER = '    auto = "auto"\n'
"""A new loss implementation is put before it."""


class Example(NamedTuple):
    """The part of a walkthrough, as it is called there."""

    option: str
    builder: str
    """Its class, as its names begin."""
    try_it: str
    """Overrides of a run that uses it, NAME for the new option."""


EXAMPLES = {
    "head": Example("low_rank", "LowRank", "head=NAME"),
    "objective": Example("reverse", "Reverse", "objective=NAME"),
    "backbone": Example("min_gru", "MinGRU", "backbone=NAME objective=fim"),
    "loss": Example("checkpointed", "Checkpointed", "head.loss_implementation=NAME"),
}
KINDS = (*EXAMPLES, "study")


@dataclass
class Arguments:
    """Where a part goes. A study goes to experiments/NAME, a loss implementation into heads_lightning/losses."""

    package: str = PACKAGE
    """Package for the part, in the working folder; created where it is missing."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning new head|objective|backbone|loss|study NAME [package=NAME]`."""
    words = [word for word in arguments if "=" not in word and not word.startswith("-")]
    options, _ = read(Arguments, [word for word in arguments if word not in words])
    known = words[0] if words and words[0] in KINDS else ""
    if len(words) != 2 or not known:
        meant = nearest(words[0], KINDS) if words and not known else ""
        raise ConfigError(f"`new {' '.join(words)}`: new takes a kind and a name, e.g. new {known or 'head'} my_{known or 'head'}.{meant} "
                          f"Kinds: {', '.join(KINDS)}")  # fmt: skip
    kind, name = words
    _check_name("NAME", name)
    _check_name("package", options.package)
    files = _study(name) if kind == "study" else _loss(name) if kind == "loss" else _part(kind, name, options.package)
    for path in files:
        if path.exists() and path.as_posix() not in (f"{options.package}/__init__.py", ENUM):
            raise ConfigError(f"{path} exists already; choose another name than {name!r}, or take the file away")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print("\n".join([*(f"wrote {path}" for path in files), "", *_next(kind, name, options.package)]))


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"{what}={name} cannot name a module; use small letters, digits and _, e.g. {what}=my_part")


def _next(kind: str, name: str, package: str) -> list[str]:
    """Commands that go on from here."""
    if kind == "study":
        return ["write the question into its README.md, then:", f"  {_study_command(name)}"]
    plugin = [] if kind == "loss" else [f"  export PYTHONPATH=. HEADS_LIGHTNING_PLUGINS={package}"]
    overrides = EXAMPLES[kind].try_it.replace("NAME", name)
    return ["it works as it is; make it yours, then:", *plugin, f"  python -m pytest tests/test_{name}.py",
            f"  heads-lightning train {overrides} trainer.max_steps=2"]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the walkthroughs


def walkthrough_files() -> dict[str, str]:
    """The files of CONTRIBUTING.md by their path: beside conf/, in a checkout and in an installed package."""
    page = conf_dir().parent / WALKTHROUGHS
    if not page.is_file():
        raise ConfigError(f"{WALKTHROUGHS} is missing beside {conf_dir()}; install the package again")
    blocks = re.findall(r"^```(?:python|yaml)\n# (.*?)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return dict(blocks)


def _renamed(text: str, example: Example, name: str, package: str) -> str:
    """The text with the example's identifiers replaced; prose about what it does stays."""
    camel = "".join(word.capitalize() for word in name.split("_"))
    text = re.sub(rf"(?<=[\"'=._/`]){example.option}(?![a-z])|\b{example.option}(?=_)", name, text)
    text = re.sub(rf"\b{example.builder}(?=[(:,.)\n]|Config|Head)", camel, text)
    return text.replace(PACKAGE, package)


def _part(kind: str, name: str, package: str) -> dict[Path, str]:
    """Config, module and test of a plugin's part, and the line that registers it."""
    prepare_store()
    if name in group_options(kind):
        raise ConfigError(f"{kind}={name} exists already; choose another name")
    example = EXAMPLES[kind]
    config, module, test = (f"{PACKAGE}/{example.option}.py", f"{PACKAGE}/{example.option}_{kind}.py", f"tests/test_{example.option}.py")
    renamed = {f: (_renamed(f, example, name, package), _renamed(walkthrough_files()[f], example, name, package))
               for f in (config, module, test)}  # fmt: skip
    first = Path(package) / "__init__.py"
    before = first.read_text(encoding="utf-8") if first.is_file() else '"""Parts of our own."""\n\n'
    register = f"from {package} import {name}  # noqa: F401  importing registers\n"
    return {first: before + register, **{Path(path): text for path, text in renamed.values()}}


def _loss(name: str) -> dict[Path, str]:
    """Module, member of the enum, and test of a loss implementation, in a clone of this project."""
    if not (Path(LOSSES).is_dir() and Path(ENUM).is_file()):
        raise ConfigError(f"a loss implementation is a member of a closed set: run `new loss {name}` in a clone of the project, "
                          f"where {LOSSES}/ is")  # fmt: skip
    if name in LMLossImplementation.__members__:
        raise ConfigError(f"head.loss_implementation={name} exists already; choose another name")
    example, enum = EXAMPLES["loss"], Path(ENUM).read_text(encoding="utf-8")
    assert enum.count(LAST_MEMBER) == 1
    files = walkthrough_files()
    member, module, test = (
        _renamed(files[f], example, name, PACKAGE).replace(f"    {example.option} =", f"    {name} =")
        for f in (f"{ENUM}, in LMLossImplementation", f"{LOSSES}/{example.option}.py", f"tests/test_{example.option}.py")
    )
    return {
        Path(LOSSES) / f"{name}.py": module,
        Path(ENUM): enum.replace(LAST_MEMBER, member + LAST_MEMBER),
        Path(f"tests/test_{name}.py"): test,
    }


# --------------------------------------------------------------------------------------------------------------------- a study


def _study_command(name: str) -> str:
    return f"heads-lightning train -m --config-dir experiments/{name} --config-name study"


def _study(name: str) -> dict[Path, str]:
    folder = Path("experiments") / name
    return {
        folder / "README.md": README.replace("NAME", name).replace("COMMAND", _study_command(name)),
        folder / "study.yaml": STUDY.replace("NAME", name),
        folder / "analysis.py": ANALYSIS,
    }


README = """# NAME

**Question.** What changes when … ?

**Command.**

```bash
COMMAND
python experiments/NAME/analysis.py runs/sweeps/DATE
```

**Result.** The table that `analysis.py` prints; say what was not measured.

**Conclusion.** One sentence; a negative result stays.
"""

STUDY = """# What the study runs: every combination of the values below.
defaults:
  - train
  - _self_

name: NAME

hydra:
  sweeper:
    params:
      objective: causal,fim
      seed: 0,1,2
"""

ANALYSIS = '''"""From the runs of a sweep to the README's table: python analysis.py SWEEP_FOLDER"""

import sys
from pathlib import Path

from heads_lightning.composition import from_yaml
from heads_lightning.tracking.run_folder import read_metrics


def main(sweep: Path) -> None:
    """One row a run: what was varied, and the last held-out loss (nats per target; compare it within one objective alone)."""
    print("| objective | seed | held-out loss |\\n| --- | --- | --- |")
    for file in sorted(sweep.glob("*/config.yaml")):
        config = from_yaml(file)
        losses = [point.values["val/loss"] for point in read_metrics(file.parent) if "val/loss" in point.values]
        print(f"| {config.objective.name} | {config.seed} | {f'{losses[-1]:.3f}' if losses else 'none'} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
'''
