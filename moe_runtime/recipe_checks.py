"""What the sections of a recipe check: a value is one of some, of a kind, or in a range."""

import sys

from moe_runtime.errors import RecipeError

# Of one layer: as many as routing plans hold.
MAX_EXPERTS = 1024


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_type(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    words = {str: "a text", int: "a whole number", bool: "true or false", tuple: "a list"}
    wanted_bool = kind is bool
    if not isinstance(value, kind) or (isinstance(value, bool) and not wanted_bool):
        expected = words.get(kind, "a number") if isinstance(kind, type) else "a number"
        raise RecipeError(f"{name} must be {expected}, got {value!r}")
    # zero bytes and halves of characters, which no path or file can hold
    if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise RecipeError(f"{name} must be a text of whole characters, got {value!r}")


def check_whole(name: str, value: object, least: int) -> None:
    check_type(name, value, int)
    assert isinstance(value, int)
    if value < least:
        raise RecipeError(f"{name} must be at least {least}, got {value}")


def check_finite(name: str, value: object) -> None:
    check_type(name, value, (int, float))
    assert isinstance(value, int | float)
    # a whole number may be larger than any float, which math.isfinite cannot say
    if not abs(value) <= sys.float_info.max:
        raise RecipeError(f"{name} must be finite, got {value}")


def check_not_negative(name: str, value: object) -> None:
    check_type(name, value, (int, float))
    assert isinstance(value, int | float)
    if not 0 <= value <= sys.float_info.max:
        raise RecipeError(f"{name} must be finite and not negative, got {value}")


def check_share(name: str, value: object) -> None:
    check_type(name, value, (int, float))
    assert isinstance(value, int | float)
    if not 0 <= value <= 1:
        raise RecipeError(f"{name} must be between 0 and 1, got {value}")
