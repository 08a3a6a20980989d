"""The layers of DESIGN.md section 3, read from the syntax tree: who may import whom, and that a file is named after its option.

The rules range over the files that exist: a new head, objective or command falls under them by being there.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from heads_lightning.composition.store import prepare_store
from heads_lightning.registry import Registry

PACKAGE = Path(__file__).resolve().parents[1] / "heads_lightning"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
MOST_LINES, FEW = 400, 3
"""Lines of a module, and how many modules may be somewhat longer (DESIGN.md 6.11: few over 400)."""

LAYERS: dict[str, float] = {
    "registry": 0, "batch": 0, "new_tokens": 0, "onednn": 0, "precision": 0,
    "hub": 0.2,
    "configs": 0.5,
    "tracking": 1, "losses": 1, "objectives": 1, "backbones": 1,
    "heads": 2, "data": 2, "training": 2,
    "totals": 2.5,
    "module": 3,
    "composition": 4, "experiment": 4, "generation": 4, "models": 4.5,
    "evaluation": 5, "conversion": 5, "testing": 5, "memory_plan": 4.9, "planning": 5, "preflight": 5.5, "summary": 5.3, "html_report": 5.3,
    "html_comparison": 5.35, "served_model": 5.4, "run": 5.6, "library": 5.7, "sweeps": 5.8,
    "commands": 6, "__main__": 7,
}  # fmt: skip
"""Parts of the package by layer; a part not named here is on layer 5."""
FILES_ABOVE = {"training/callbacks.py": 3.5, "training/saving.py": 3.5, "training/trainer.py": 3.5}
"""Files above their folder: callbacks act on the LanguageModule, and the trainer is given them. The module imports neither."""
SIBLINGS = {("heads", "losses"), ("data", "objectives"), ("experiment", "composition"), ("training", "heads")}
"""(importer, imported) on one layer: those that DESIGN.md names; parameter groups are made from what a head declares (heads/base.py)."""
COMPOSITION_MAY = {"registry", "batch", "configs", "composition"}
NUMPY_ONLY = ("objectives",)
TORCH_FREE = ("registry", "configs", "composition")
HEAVY = {"torch", "lightning", "mlflow", "transformers", "liger_kernel", "tokenizers"}


def part_of(path: Path) -> str:
    """The first name below the package: `heads` for heads/default.py, `batch` for batch.py."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports; `top_level`: only what importing the file imports (not in functions, not for type checkers)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif top_level and _runs_later(node):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def parts_imported(path: Path, *, top_level: bool) -> set[str]:
    """Parts of this package that a file imports."""
    names = {name.split(".")[1] for name in imports(path, top_level=top_level) if name.startswith("heads_lightning.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def layer(part: str) -> float:
    return LAYERS.get(part, 5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_lower_layers_only(path):
    part = part_of(path)
    if part == "__init__":
        return
    # a config's `build` imports its builder when it is called: that is the seam, not a dependency
    own = FILES_ABOVE.get(path.relative_to(PACKAGE).as_posix(), layer(part))
    for other in parts_imported(path, top_level=part == "configs"):
        allowed = other == part or layer(other) < own or (part, other) in SIBLINGS
        assert allowed, f"{path.relative_to(PACKAGE)} (layer {own}) imports {other} (layer {layer(other)})"


def test_the_module_does_not_import_the_files_above_it():
    if (PACKAGE / "module.py").is_file():
        above = {"heads_lightning." + name.removesuffix(".py").replace("/", ".") for name in FILES_ABOVE}
        assert not imports(PACKAGE / "module.py") & above


@pytest.mark.parametrize("part", ["losses", "objectives", "backbones", "heads"])
def test_the_four_words_do_not_import_each_other(part):
    words = {"losses", "objectives", "backbones", "heads"} - {part} - ({"losses"} if part == "heads" else set())
    for path in FILES:
        if part_of(path) == part:
            assert not parts_imported(path, top_level=False) & words, path


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) == "composition"], ids=lambda path: path.name)
def test_composition_knows_configs_alone(path):
    assert parts_imported(path, top_level=False) <= COMPOSITION_MAY


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in TORCH_FREE], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_configuration_is_free_of_heavy_imports(path):
    assert not {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in NUMPY_ONLY], ids=lambda path: path.name)
def test_objectives_are_numpy_only(path):
    assert not {name.split(".")[0] for name in imports(path)} & HEAVY


@pytest.mark.parametrize("group", ["losses", "objectives", "backbones", "heads"])
def test_a_file_is_named_after_its_option(group):
    """heads/normalized.py holds head=normalized: every option that has a builder has its file, where the folder holds any option yet."""
    prepare_store()
    if group == "losses":
        from heads_lightning.configs.head import LMLossImplementation

        options = {member.value for member in LMLossImplementation} - {"auto"}
    else:
        registry = Registry.groups[group.removesuffix("s")]
        options = {name for name, cls in registry.items() if cls.__module__.startswith("heads_lightning.")}
        options -= {name for name, cls in registry.items() if getattr(cls, "builds_another", False)}
    written = {path.stem for path in (PACKAGE / group).glob("*.py")} - {"__init__", "base"}
    if written & options:
        assert options <= written, f"{sorted(options - written)} have no file in {group}/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_short_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES * 1.1
    assert not text or ast.get_docstring(ast.parse(text)), f"{path} does not say what it is"


def test_few_modules_are_long():
    long = [str(path.relative_to(PACKAGE)) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES]
    assert len(long) <= FEW, long


def test_there_is_no_drawer():
    assert not [path for path in PACKAGE.rglob("*") if path.stem in ("utils", "common", "components", "helpers", "misc")]


def test_the_commands_that_are_offered_exist():
    from heads_lightning.commands import dispatch

    for command in dispatch.available().values():
        module, function = command.target.split(":")
        if module in ("hydra_application", "list", "config", "schema"):  # others may import torch
            assert inspect.isfunction(getattr(importlib.import_module(f"heads_lightning.commands.{module}"), function))
