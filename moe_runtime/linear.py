"""`torch.nn.Linear`, and on some CPUs a faster float32 product for those who ask for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from moe_runtime_kernels._cpu import onednn_product, onednn_takes
from torch import Tensor, nn


class Linear(nn.Linear):
    """x [..., I] -> x @ weight.T + bias [..., O].

    Float32 inference on the CPU may go through oneDNN after `torch.set_float32_matmul_precision("high")`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        trains_bias = torch.is_grad_enabled() and self.bias is not None and self.bias.requires_grad
        if trains_bias or torch.is_autocast_enabled("cpu") or not onednn_takes(x, self.weight):
            return super().forward(x)
        return onednn_product(x, self.weight, self.bias)


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
