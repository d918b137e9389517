"""How a reference becomes the implementation of an operation, and what autocast does to one.

A reference serves every device that has no kernel of its own: a backend registered for one device wins there.
"""

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _len_torch_dispatch_stack


def register_reference(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a plain PyTorch function for all devices, deaf to autograd and autocast.

    The first argument of an operation is always a tensor. Autocast would change the dtypes of the products
    inside, and so of the results that the fake implementation has promised.
    """

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(reference)
        def implementation(first: Tensor, *rest: Any) -> Any:
            device = first.device.type
            # entering the contexts takes as long as a few operations on one token
            if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device):
                return reference(first, *rest)
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return reference(first, *rest)

        torch.library.impl(name, "CompositeExplicitAutograd", implementation)
        return reference

    return register


def is_plain(x_TD: Tensor) -> bool:
    """Whether these are tokens on a CPU, neither traced, transformed nor under autocast: then a reference
    without gradients can be called as it is, and may read them. For one token PyTorch's dispatcher costs
    about as much as what it calls.
    """
    return (
        x_TD.is_cpu
        and type(x_TD) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and _len_torch_dispatch_stack() == 0  # make_fx, fake tensors, counters of FLOPs
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap, jvp
        and forward_ad._current_level < 0
    )


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


# operation -> (module under _triton, its launcher)
KERNELS: dict[str, tuple[str, str]] = {}


def register_kernel(name: str, module: str, launcher: str) -> None:
    """Make `_triton/<module>.py`'s `launcher` the implementation on CUDA and ROCm devices.

    Triton is imported by the first launch. Without Triton that launch raises: a device that has kernels never
    falls back to the reference, which reads the plan on the host.
    """
    KERNELS[name] = (module, launcher)

    def implementation(*arguments: Any) -> Any:
        return load_launcher(name)(*arguments)

    torch.library.impl(name, "CUDA", implementation)


@cache
def load_launcher(name: str) -> Callable[..., Any]:
    """The launcher of an operation's kernels.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    module, launcher = KERNELS[name]
    try:
        return getattr(import_module(f"moe_runtime_kernels._triton.{module}"), launcher)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            f"{name} on a GPU needs Triton 3.6 or newer, which is not installed; run: "
            "pip install 'moe-runtime[gpu]'",
            name="triton",
        ) from None
