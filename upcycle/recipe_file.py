"""From a YAML file to a frozen dataclass: an unknown key is an error, a field that is a dataclass is a section."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from upcycle.errors import RecipeError


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
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: the recipe is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path}: a recipe must be a list of 'key: value' lines")
    return values


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """An object of a dataclass from plain values; `where` begins every message.

    Raises:
        RecipeError: a key is unknown or missing, or a value is not allowed.
    """
    try:
        return _build(kind, values, "")
    except RecipeError as error:
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
        section_kind, others = _section_kind(known[name])
        if section_kind is not None and value is None:  # a section whose lines are all commented out
            continue
        if section_kind is not None and isinstance(value, Mapping):
            value = _build(section_kind, value, name)
        elif section_kind is not None and not others:
            raise RecipeError(f"{name} must be a section of 'key: value' lines, got {value!r}")
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def _section_kind(f: Field) -> tuple[type | None, bool]:
    """The dataclass that a field holds, if any, and whether it may hold something else but None."""
    kinds = get_args(f.type) or (f.type,)
    section = next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)
    return section, any(kind not in (section, NoneType) for kind in kinds)
