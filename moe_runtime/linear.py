"""`torch.nn.Linear`, and on some CPUs a faster product: of bfloat16, and of float32 for those who ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from moe_runtime_kernels._cpu import is_widened, onednn_is_asked_for, product, weight_grad, widening_suits
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """x [..., I] -> x @ weight.T + bias [..., O].

    On a CPU without instructions for bfloat16, its products of several rows are multiplied in float32 and
    rounded once; under autocast float32 weights are not rounded before, nor their gradients after. Float32
    products on the CPU may go through oneDNN after `torch.set_float32_matmul_precision("high")`. In both
    cases a gradient has no gradient of its own, and weights may not change between forward and backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            return self._under_autocast(x)
        dtypes = {t.dtype for t in (x, self.weight, self.bias) if t is not None}
        several = len(dtypes) == 1 and x.shape[:-1].numel() > 1
        if (several and self._is_widened(x)) or onednn_is_asked_for(x, self.weight):
            return self._product(x)
        return super().forward(x)

    def _under_autocast(self, x: Tensor) -> Tensor:
        if torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.bfloat16, torch.float32):
            with torch.autocast("cpu", enabled=False):
                rounded = x.bfloat16()
                if self._is_widened(rounded):
                    return self._product(rounded)
        return super().forward(x)

    def _is_widened(self, x: Tensor) -> bool:
        return min(x.numel(), self.weight.numel()) > 0 and widening_suits(x, self.weight, self.bias)

    def _product(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return _Product.apply(x, self.weight, self.bias)
        # outside of the function: what it returned as a view could not be changed in place
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return _Product.apply(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """`product`, whose products have no gradient of their own, for the gradients too."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_MI if needs_weight else None, weight_OI if needs_x else None)
        ctx.dtypes = weight_OI.dtype, None if bias_O is None else bias_O.dtype
        return product(x_MI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, weight_OI = ctx.saved_tensors
        needs_bias, (weight_dtype, bias_dtype) = ctx.needs_input_grad[2], ctx.dtypes
        grad_MO = grad_MO.contiguous().resolve_neg()
        with torch.autocast("cpu", enabled=False):
            return (
                None if weight_OI is None else _input_grad(grad_MO, weight_OI),
                None if x_MI is None else weight_grad(grad_MO, x_MI, weight_dtype),
                grad_MO.sum(0, dtype=bias_dtype) if needs_bias else None,
            )


def _input_grad(grad_MO: Tensor, weight_OI: Tensor) -> Tensor:
    """The weight is rounded where the gradient is not plain, as under a counter of FLOPs, and forward was."""
    weight_IO = weight_OI.t()
    is_mixed = weight_IO.dtype != grad_MO.dtype and not is_widened(grad_MO, weight_IO)
    return product(grad_MO, weight_IO.to(grad_MO.dtype) if is_mixed else weight_IO)


@contextmanager
def precise_products() -> Iterator[None]:
    """Inside, float32 products on the CPU are as precise as PyTorch has them, whatever was asked for."""
    onednn: Any = torch.backends.mkldnn
    before = onednn.matmul.fp32_precision
    onednn.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        onednn.matmul.fp32_precision = before
