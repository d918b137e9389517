"""`torch.nn.Linear`, on CPUs where PyTorch's own float32 product is the slower of two."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from moe_runtime_kernels._cpu import onednn_product, onednn_takes
from torch import Tensor, nn


class Linear(nn.Linear):
    """x [..., I] -> x @ weight.T + bias [..., O]; a float32 inference on the CPU may go through oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        trains_bias = torch.is_grad_enabled() and self.bias is not None and self.bias.requires_grad
        if trains_bias or torch.is_autocast_enabled("cpu") or not onednn_takes(x, self.weight):
            return super().forward(x)
        return onednn_product(x, self.weight, self.bias)


@contextmanager
def pytorch_products() -> Iterator[None]:
    """Inside, every float32 product is PyTorch's own, as in the model that a mixture is compared with."""
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = before
