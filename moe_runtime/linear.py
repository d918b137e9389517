"""`torch.nn.Linear`, and on some CPUs a faster product: of bfloat16, and of float32 for those who ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from moe_runtime_kernels._cpu import onednn_is_asked_for, product, weight_grad, widening_suits
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """x [..., I] -> x @ weight.T + bias [..., O].

    On a CPU without instructions for bfloat16, its products of several rows are multiplied in float32 and
    rounded once; under autocast float32 weights are not rounded before, nor their gradients after. Float32
    products on the CPU may go through oneDNN after `torch.set_float32_matmul_precision("high")`. In both
    cases a gradient has no gradient of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            return self._under_autocast(x)
        if self._is_widened(x) or onednn_is_asked_for(x, self.weight):
            return _Product.apply(x, self.weight, self.bias)
        return super().forward(x)

    def _under_autocast(self, x: Tensor) -> Tensor:
        if torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.bfloat16, torch.float32):
            with torch.autocast("cpu", enabled=False):
                rounded = x.bfloat16()
                if self._is_widened(rounded):
                    return _Product.apply(rounded, self.weight, self.bias)
        return super().forward(x)

    def _is_widened(self, x: Tensor) -> bool:
        return x.shape[:-1].numel() > 1 and widening_suits(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """`product`, whose products have no gradient of their own, for the gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return product(_rows(x), weight_OI, bias_O).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_MO = _rows(grad.contiguous())
        return (
            product(grad_MO, weight_OI.t()).view(x.shape) if needs_x else None,
            weight_grad(grad_MO, _rows(x), weight_OI.dtype) if needs_weight else None,
            grad_MO.sum(0, dtype=ctx.bias_dtype) if needs_bias else None,
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


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
