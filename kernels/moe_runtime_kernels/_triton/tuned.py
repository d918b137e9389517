"""Measured launches, which the launch choices look up before they choose by sizes.

The table at the end is written by `python -m benchmarks tune` on a GPU, never by hand. A launch was measured
for one product of one size and is taken for all whose widths and rows per expert are the same powers of two,
rounded up. What is not in the table is chosen by the closed form beside the lookup; there is no search in a
call and no environment variable.
"""

from collections.abc import Callable
from dataclasses import fields as fields_of
from typing import Any, NamedTuple, TypeVar

from .launch import Options

Launch = TypeVar("Launch")
Fields = dict[str, int | bool]


class Key(NamedTuple):
    """What a launch was measured for; `inner`, `outer` and `rows` are powers of two, rounded up."""

    family: str  # of `launch.FAMILIES`
    itemsize: int
    inner: int
    outer: int
    rows: int  # of an expert on average, or of a product without experts


def round_up(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()


def make_key(family: str, itemsize: int, inner: int, outer: int, rows: int) -> Key:
    return Key(family, itemsize, round_up(inner), round_up(outer), round_up(rows))


def tuned(kernel: str, key: Key) -> Fields | None:
    """Fields of the measured launch, those of its options among them; None where nothing was measured."""
    return TABLE.get(kernel, {}).get(key)


def as_launch(launch_type: Callable[..., Launch], fields: Fields) -> Launch:
    """A launch choice's dataclass from the table's fields."""
    names = {field.name for field in fields_of(Options)}
    options: dict[str, Any] = {name: value for name, value in fields.items() if name in names}
    sizes = {name: value for name, value in fields.items() if name not in names}
    return launch_type(**sizes, options=Options(**options))


def tuned_launch(kernel: str, launch_type: Callable[..., Launch], key: Key) -> Launch | None:
    """As `tuned`, as the dataclass of the kernel's launch choice."""
    fields = tuned(kernel, key)
    return None if fields is None else as_launch(launch_type, fields)


def tuned_launches(kernel: str, launch_type: Callable[..., Launch]) -> list[tuple[Key, Launch]]:
    """Every entry of a kernel: what `compilations` adds to those of the closed form."""
    return [(key, as_launch(launch_type, fields)) for key, fields in TABLE.get(kernel, {}).items()]


# --- measured: written by `python -m benchmarks tune` -----------------------------------

# nothing has been measured on a GPU
TABLE: dict[str, dict[Key, Fields]] = {}
