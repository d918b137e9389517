"""Checks of configuration values; every message names the field, what it must be and what it was."""

import math
from typing import get_args


def check_choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_above_zero(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
