"""Measured launches, which the launch choices look up before they choose by sizes.

The table at the end is written by `python -m benchmarks tune` on a GPU, never by hand. A launch was measured
for one product of one size. It is taken for every product of the same widths and the same number of groups
with as many rows, rounded up to a power of two. Widths and groups are exact: they are a model's, so there are
few, and how many tiles do not divide evenly depends on them. Rows are counted over all groups: with 128
experts and eight choices of each token, one token and sixteen both give an expert one row on average, rounded
up, but eight experts have rows or about eighty. What is not in the table is chosen by the closed form beside
the lookup; there is no search in a call and no environment variable.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields as fields_of
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from .launch import Compilation, Options

Launch = TypeVar("Launch")
Fields = dict[str, int | bool]


class Case(NamedTuple):
    """A product that a kernel is launched for: `groups` products of these widths, with `rows` rows in all."""

    kernel: str
    inner: int
    outer: int
    groups: int
    rows: int


class Key(NamedTuple):
    """What a launch was measured for; `rows` is a power of two, rounded up, the rest is exact."""

    family: str  # of `launch.FAMILIES`
    itemsize: int
    inner: int
    outer: int
    groups: int
    rows: int


def round_up(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()


def make_key(family: str, itemsize: int, case: Case) -> Key:
    return Key(family, itemsize, case.inner, case.outer, case.groups, round_up(case.rows))


def tuned(kernel: str, key: Key) -> Fields | None:
    """Fields of the measured launch, those of its options among them; None where nothing was measured."""
    return TABLE.get(kernel, {}).get(key)


def as_launch(launch_type: Callable[..., Launch], fields: Fields) -> Launch:
    """A launch choice's dataclass from the table's fields."""
    names = {field.name for field in fields_of(Options)}
    options: dict[str, Any] = {name: value for name, value in fields.items() if name in names}
    sizes = {name: value for name, value in fields.items() if name not in names}
    return launch_type(**sizes, options=Options(**options))


def measured_first(choose: Callable[..., Any]) -> Callable[..., Any]:
    """A launch choice that looks into the table first, for the product that its keyword `case` names.

    The table is of 16-bit operands whose rows are aligned. A launch with descriptors is taken only where the
    closed form has them too, which knows whether there can be any.
    """

    @wraps(choose)
    def choose_measured(
        itemsize: int, *sizes: int, aligned: bool, family: str, case: Case | None = None, **more: Any
    ) -> Any:
        closed_form = choose(itemsize, *sizes, aligned=aligned, family=family, **more)
        if case is None or itemsize != 2 or not aligned:
            return closed_form
        fields = tuned(case.kernel, make_key(family, itemsize, case))
        if fields is None or (fields.get("tma", False) and not closed_form.tma):
            return closed_form
        return as_launch(type(closed_form), fields)

    return choose_measured


def tuned_compilations(
    kernel: str,
    launch_type: Callable[..., Launch],
    compilations_of: Callable[[Launch], Iterable[Compilation]],
) -> list[Compilation]:
    """What the table adds to a kernel's compilations: each entry's, for the devices it was measured on."""
    return [
        replace(made, families=(key.family,))
        for key, fields in TABLE.get(kernel, {}).items()
        for made in compilations_of(as_launch(launch_type, fields))
    ]


# --- measured: written by `python -m benchmarks tune` -----------------------------------

# nothing has been measured on a GPU
TABLE: dict[str, dict[Key, Fields]] = {}
