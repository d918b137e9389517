"""Packages that this one uses where they are installed, and does without elsewhere."""

from importlib.machinery import ModuleSpec
from importlib.util import find_spec


def installed(module: str) -> ModuleSpec | None:
    """Where the top-level module would be imported from; None if it is not installed. Nothing is imported.

    A stub that another program put among the imported modules, which has no spec, is not installed.
    """
    try:
        return find_spec(module)
    except ValueError:
        return None
