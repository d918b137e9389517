"""Float32 matrix products on the CPU, by the faster of the two libraries that PyTorch carries.

PyTorch gives float32 products to MKL, which runs AVX2 code on processors that are not Intel's; oneDNN, its
library for bfloat16, uses their AVX-512. docs/performance.md has the measured ratio. But oneDNN sums each
entry in one chain where MKL sums blocks of it, and rounds more. So it serves only those who asked for faster
and less precise float32 products by PyTorch's own switches: `torch.set_float32_matmul_precision("high")`, or
`torch.backends.mkldnn.matmul.fp32_precision = "tf32"`.

oneDNN compiles a kernel for every number of rows that a product has, and keeps the last 1024 of them. A
router sends an expert other numbers of rows in every batch, so where oneDNN multiplies, experts' rows are
padded to one of few heights.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor


def _onednn_is_faster() -> bool:
    """Whether this processor is one of AMD's with AVX-512, the only kind that was measured."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text(encoding="utf-8", errors="replace")


ONEDNN_IS_FASTER = _onednn_is_faster()


def onednn_has_bf16() -> bool:
    """Whether PyTorch's products of bfloat16 are oneDNN's on this machine."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_takes(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether `onednn_product` is right and faster for these operands; it has no gradient."""
    trains = torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad)
    return not trains and onednn_is_asked_for(x, weight_OI)


def onednn_is_asked_for(x: Tensor, weight_OI: Tensor) -> bool:
    """The same, whether or not there is a gradient to be computed.

    Rows further apart than their width would take oneDNN's slow general path.
    """
    onednn: Any = torch.backends.mkldnn
    return bool(
        x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and ONEDNN_IS_FASTER
        and onednn.enabled
        # not torch.get_float32_matmul_precision, which raises where the newer switches were used
        and onednn.matmul.fp32_precision in ("tf32", "bf16")
        and x.is_contiguous()
        and (weight_OI.is_contiguous() or weight_OI.t().is_contiguous())
        and x.numel() > 0
        and weight_OI.numel() > 0
    )


def onednn_multiplies(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether `product` of these operands is oneDNN's; the weight may be wider than bfloat16."""
    if x.dtype == torch.bfloat16:
        return x.device.type == "cpu" and onednn_has_bf16()
    return onednn_takes(x, weight_OI)


def padded_height(rows: int) -> int:
    """The next of a few heights: up to 8 all, then multiples of 4, from 64 on sixteen per power of two."""
    if rows <= 8:
        return rows
    step = max(4, (1 << rows.bit_length()) >> 5)
    return -(-rows // step) * step


def onednn_product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I] @ weight.T + bias, without autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


def product(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias on any device, in x's dtype."""
    trains_bias = torch.is_grad_enabled() and bias_O is not None and bias_O.requires_grad
    if onednn_takes(x_MI, weight_OI) and not trains_bias:
        return onednn_product(x_MI, weight_OI, bias_O)
    return functional.linear(x_MI, weight_OI, bias_O)


def rows_product(x_NI: Tensor, rows: slice, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`product` of some of the rows, through oneDNN with as many more as make their number one of few."""
    count = rows.stop - rows.start
    if not onednn_multiplies(x_NI, weight_OI):
        return product(x_NI[rows], weight_OI, bias_O)
    height = padded_height(count)
    x_MI = x_NI[rows.start : rows.start + height]  # the others' rows are not used
    x_MI = functional.pad(x_MI, (0, 0, 0, height - x_MI.shape[0]))
    return product(x_MI, weight_OI, bias_O)[:count]


def few_heights(x_NI: Tensor, rows: slice) -> Tensor:
    """The rows, and where oneDNN multiplies bfloat16 as many of zeros as make their number one of few."""
    x_MI = x_NI[rows]
    if x_NI.dtype != torch.bfloat16 or not onednn_multiplies(x_NI, x_NI):
        return x_MI
    return functional.pad(x_MI, (0, 0, 0, padded_height(x_MI.shape[0]) - x_MI.shape[0]))


def weight_grad(grad_MO: Tensor, x_MI: Tensor) -> Tensor:
    """grad.T @ x [O, I], the gradient of the weight of `product`, without autograd."""
    x_IM = x_MI.t()
    if onednn_takes(grad_MO, x_IM):
        return onednn_product(grad_MO.t(), x_IM)  # columns that lie apart it packs itself
    return grad_MO.t() @ x_MI
