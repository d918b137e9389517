"""How a reference becomes the implementation of an operation, and what autocast does to one.

A reference serves every device that has no kernel of its own: a backend registered for one device wins there.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def register_reference(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a plain PyTorch function for all devices, deaf to autograd and autocast.

    The first argument of an operation is always a tensor. Autocast would change the dtypes of the products
    inside, and so of the results that the fake implementation has promised.
    """

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(reference)
        def implementation(first: Tensor, *rest: Any) -> Any:
            with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
                return reference(first, *rest)

        torch.library.impl(name, "CompositeExplicitAutograd", implementation)
        return reference

    return register


def cast_for_autocast(first: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """The operands of a matrix product, in autocast's dtype where autocast is on."""
    device = first.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not enabled or first.dtype == torch.float64:
        return (first, *rest)
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if operand is None else operand.to(dtype) for operand in (first, *rest))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of products: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
