"""From a YAML file to a frozen dataclass: unknown keys are errors, dataclass fields are sections."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from moe_runtime.errors import RecipeError

_MOST_VALUES = 10_000


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The 'key: value' lines of a recipe file.

    Raises:
        RecipeError: the file is missing or no YAML, or holds something else.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error}") from error
    except RecursionError:
        raise RecipeError(f"{path}: the recipe is nested too deeply") from None
    # a ValueError comes from numbers and dates that YAML allows and Python has not
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: the recipe is not valid YAML: {' '.join(str(error).split())}") from error
    if _num_values(values, {}) > _MOST_VALUES:
        raise RecipeError(
            f"{path}: the recipe must have numbers of at most 64 bits and, with aliases written out, at most "
            f"{_MOST_VALUES} values"
        )
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path}: a recipe must be a list of 'key: value' lines")
    return values


def _num_values(value: object, known: dict[int, float]) -> float:
    """How many values a message would print: infinite for one inside itself and for a number of no end."""
    if not isinstance(value, list | dict):
        return math.inf if isinstance(value, int) and abs(value) >= 2**64 else 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(value)]


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """An object of a dataclass from plain values; `where` begins every message.

    Raises:
        RecipeError: a key is unknown or missing, or a value is not allowed.
    """
    try:
        return _build(kind, values, "")
    except ValueError as error:  # sections of other packages raise plain ones
        raise RecipeError(f"{where}: {error}") from None


def _build(kind: type, values: Mapping[str, Any], section: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    under = f" under {section!r}" if section else ""
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
            raise RecipeError(f"unknown key {name!r}{under}{hint}")
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in values:
            raise RecipeError(f"key {name!r} is missing{under}")
    built = {}
    for name, value in values.items():
        section_kind, others = _section_kind(known[name].type)
        if section_kind is not None and value is None:  # a section whose lines are all commented out
            continue
        built[name] = _value(name, value, section_kind, others)
    return kind(**built)


def _value(name: str, value: object, section_kind: type | None, others: bool) -> object:
    if section_kind is not None and isinstance(value, Mapping):
        return _build(section_kind, value, name)
    if section_kind is not None and not others:
        raise RecipeError(f"{name} must be a section of 'key: value' lines, got {value!r}")
    if isinstance(value, list):
        return tuple(_value(name, element, section_kind, others) for element in value)
    return value


def _section_kind(annotation: Any) -> tuple[type | None, bool]:
    """The dataclass that a field or its elements hold, if any; and if it may hold more than that or None."""
    kinds = get_args(annotation) or (annotation,)
    for kind in kinds:
        if isinstance(kind, type) and is_dataclass(kind):
            return kind, any(other not in (kind, NoneType) for other in kinds)
    nested = (_section_kind(kind)[0] for kind in kinds if get_args(kind))
    return next((kind for kind in nested if kind is not None), None), True
