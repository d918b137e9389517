"""`torch.nn.Linear`, and on some CPUs a faster product: bfloat16 in inference, float32 for those who ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from moe_runtime_kernels._cpu import (
    is_widened,
    onednn_is_asked_for,
    onednn_product,
    product,
    weight_grad,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """x [..., I] -> x @ weight.T + bias [..., O].

    On a CPU without instructions for bfloat16, its products without a gradient are multiplied in float32 and
    rounded once. Float32 products on the CPU, those of gradients too, may go through oneDNN after
    `torch.set_float32_matmul_precision("high")`. A gradient then has no gradient of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        rows = x.shape[:-1].numel()
        if rows > 1 and not torch.is_grad_enabled() and is_widened(x, self.weight):
            return product(x.reshape(rows, -1), self.weight, self.bias).view(*x.shape[:-1], -1)
        if torch.is_autocast_enabled("cpu") or not onednn_is_asked_for(x, self.weight):
            return super().forward(x)
        return _OneDNNLinear.apply(x, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    """All three products by oneDNN, which has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return onednn_product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_MO, x_MI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            product(grad, weight_OI.t()) if needs_x else None,
            weight_grad(grad_MO, x_MI) if needs_weight else None,
            grad_MO.sum(0) if needs_bias else None,
        )


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
