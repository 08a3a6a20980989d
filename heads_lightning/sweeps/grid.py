"""The cells of a grid: lists of values multiplied, keys of `sweep.zip` advancing together, `sweep.filter` left out.

A condition is a Python expression over settings by their dotted names. It is walked, not evaluated as code: comparisons, arithmetic,
`and`, `or`, `not`, `in` and nothing else.
"""

import ast
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from heads_lightning.composition.mistakes import parse
from heads_lightning.composition.saved import leaves, plain
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError, nearest


def varied(overrides: Sequence[str]) -> list[str]:
    """Keys that are given several values."""
    return [override.get_key_element() for override in parse(overrides) if override.is_sweep_override()]


def grid(overrides: Sequence[str], zipped: Sequence[str] = ()) -> Iterator[list[str]]:
    """The overrides of each cell.

    Args:
        overrides: of the command line.
        zipped: groups of keys that advance together, each joined by `+`.

    Raises:
        ConfigError: an interval, which is no list; keys of a group that are not varied, or have different numbers of values.
    """
    fixed: list[str] = []
    values: dict[str, list[str]] = {}
    for override in parse(overrides):
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise ConfigError(f"`{override.input_line}` is no list of values; write A,B,C, or let hydra/sweeper=optuna choose from it")
    together = [keys.split("+") for keys in zipped]
    _check_zipped(together, values)
    axes = []
    for key in values:
        names = next((names for names in together if key in names), [key])
        if key == names[0]:
            axes.append(list(zip(*(values[name] for name in names), strict=True)))
    return ([*fixed, *itertools.chain.from_iterable(cell)] for cell in itertools.product(*axes))


def _check_zipped(together: Sequence[Sequence[str]], values: Mapping[str, list[str]]) -> None:
    for names in together:
        text = "+".join(names)
        for name in names:
            if name not in values:
                near = nearest(name, values)
                raise ConfigError(f"sweep.zip={text}: {name} is not given several values.{near} Write {name}=A,B, or leave it out")
        if len({len(values[name]) for name in names}) > 1:
            counts = ", ".join(f"{name} has {len(values[name])}" for name in names)
            raise ConfigError(f"sweep.zip={text} needs as many values of each: {counts}")
    every = [name for names in together for name in names]
    for name in every:
        if every.count(name) > 1:
            raise ConfigError(f"sweep.zip names {name} twice; a key advances with one group")


# -------------------------------------------------------------------------------------------------------------- filters

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Not: operator.not_, ast.USub: operator.neg,
    ast.In: lambda item, items: item in items, ast.NotIn: lambda item, items: item not in items,
}  # fmt: skip


def meets(config: ExperimentConfig, conditions: Sequence[str]) -> bool:
    """Whether a cell is to be run: every condition holds.

    Raises:
        ConfigError: a condition that is not an expression over settings.
    """
    values = dict(leaves(plain(config)))
    values |= {group: values[f"{group}.name"] for group in plain(config) if f"{group}.name" in values}
    return all(bool(_evaluated(condition, values)) for condition in conditions)


def _evaluated(condition: str, values: Mapping[str, Any]) -> Any:
    try:
        return _value(ast.parse(condition, mode="eval").body, values, condition)
    except (SyntaxError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"sweep.filter: {condition!r} cannot be decided ({error})") from None


def _value(node: ast.expr, values: Mapping[str, Any], condition: str) -> Any:
    def inner(node: ast.expr) -> Any:
        return _value(node, values, condition)

    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name() | ast.Attribute():
            return _setting(ast.unparse(node), values, condition)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [inner(item) for item in items]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](inner(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](inner(left), inner(right))
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(inner(part) for part in parts)
        case ast.BoolOp(values=parts):
            return any(inner(part) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in OPERATORS for op in ops):
            operands = [inner(left), *(inner(other) for other in others)]
            return all(OPERATORS[type(op)](a, b) for op, a, b in zip(ops, operands, operands[1:], strict=False))
    raise ConfigError(f"sweep.filter: {condition!r} may compare and calculate with settings, nothing else; `{ast.unparse(node)}` is more")


def _setting(name: str, values: Mapping[str, Any], condition: str) -> Any:
    constants = {"true": True, "false": False, "null": None}
    if name in values or name in constants:
        return values[name] if name in values else constants[name]
    raise ConfigError(f"sweep.filter: {condition!r} names {name}, which is no setting of the cell.{nearest(name, values)}")
