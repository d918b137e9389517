"""Matrix products on the CPU, by the fastest that there is for their dtype and rows.

**bfloat16.** A few rows are multiplied by code of this project's (`_native`), which reads the matrix once, at
the speed of the memory. More are PyTorch's, which has them from oneDNN. On a processor without instructions
for bfloat16, oneDNN's are several times slower than float32 ones: there a part of the matrix at a time is
widened, and MKL multiplies it; a float32 matrix, as under autocast, is multiplied as it is.

**float32**, by the faster of the two libraries that PyTorch carries.

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
from torch import Tensor, nn

from ._dispatch import is_plain
from ._native import grouped_rows, processor_flags, rows_function


def _onednn_is_faster() -> bool:
    """Whether this processor is one of AMD's with AVX-512, the only kind that was measured."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text(encoding="utf-8", errors="replace")


ONEDNN_IS_FASTER = _onednn_is_faster()
# an x86 processor whose bfloat16 products are float32 ones after a conversion
BF16_IS_WIDENED = "avx2" in processor_flags() and not processor_flags() & {"avx512_bf16", "amx_bf16"}
# rows of a matrix: with more, the libraries' products are faster
MOST_NATIVE_ROWS = {torch.bfloat16: 256 if BF16_IS_WIDENED else 8, torch.float32: 32}
WIDENED = 2**18  # values of a matrix that are widened at a time: 1 MiB, which stays in the cache
FEWEST_OUTPUTS = 64  # of a product; of fewer it takes longer than a cache saves


def onednn_has_bf16() -> bool:
    """Whether PyTorch's products of bfloat16 are oneDNN's on this machine."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_takes(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether `onednn_product` is right and faster for these operands; it has no gradient."""
    return not _trains(x, weight_OI) and onednn_is_asked_for(x, weight_OI)


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
        return x.device.type == "cpu" and onednn_has_bf16() and not BF16_IS_WIDENED
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


def native_takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `grouped_rows` multiplies such rows and matrices, if they are few.

    It reads memory: operands are plain tensors that fit each other, and there is no gradient.
    """
    return (
        x.dtype in MOST_NATIVE_ROWS
        and _are_plain(x, weight, bias)
        and x.stride(-1) == weight.stride(-1) == 1
        and x.numel() > 0
        and weight.numel() > 0
        and (bias is None or (bias.shape[-1] == weight.shape[-2] and bias.stride(-1) == 1))
        and not _trains(x, weight, bias)
        and rows_function(x.dtype) is not None
    )


def is_few(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> bool:
    """Whether these rows are so few that `native_product` is the fastest; it has no gradient."""
    # the number of rows is looked at last: where it is traced, nothing may depend on it
    return native_takes(x_MI, weight_OI, bias_O) and x_MI.shape[0] <= MOST_NATIVE_ROWS[x_MI.dtype]


def is_widened(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `widened_product` is right and faster for these operands; it has no gradient and no trace."""
    return widening_suits(x, weight, bias) and not _trains(x, weight, bias)


def widening_suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """The same, whether or not there is a gradient to be computed."""
    return (
        BF16_IS_WIDENED
        and x.dtype == torch.bfloat16
        and _are_plain(x, weight, bias, dtypes=(torch.bfloat16, torch.float32))
    )


def _are_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtypes: tuple[torch.dtype, ...] | None = None
) -> bool:
    """Whether these are tensors in the CPU's memory, of x's dtype or `dtypes`, whose last axes fit."""
    given = (x, weight) if bias is None else (x, weight, bias)
    dtypes = dtypes or (x.dtype,)
    return (
        is_plain(x)
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # of is_grads_batched
        and all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype in dtypes for t in given)
        and all(t.layout == torch.strided and not t.is_neg() for t in given)
        and x.shape[-1] == weight.shape[-1]
    )


def _trains(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in operands)


def native_product(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias of a few rows, without autograd."""
    out_MO = x_MI.new_empty(x_MI.shape[0], weight_OI.shape[0])
    bias_1O = None if bias_O is None else bias_O[None]
    grouped_rows(x_MI, weight_OI[None], bias_1O, [(0, 0, x_MI.shape[0])], out_MO)
    return out_MO


def widened_product(
    x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, out_MO: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias in float32, without autograd, rounded once to x's dtype or that of `out`.

    A matrix of bfloat16 is widened a part at a time; one of float32, as under autocast, is multiplied as it
    is: rounding its values first would take time and lose some of them.
    """
    (O, I), wide_MI = weight_OI.shape, x_MI.float()
    if out_MO is None:
        out_MO = x_MI.new_empty(x_MI.shape[0], O)
    if weight_OI.dtype == torch.float32:
        return out_MO.copy_(product(wide_MI, weight_OI, None if bias_O is None else bias_O.float()))
    outputs = max(WIDENED // max(I, 1), FEWEST_OUTPUTS)
    for first in range(0, O, outputs):
        part = slice(first, first + outputs)
        wide_NI = weight_OI[part].float()
        if out_MO.dtype == torch.float32 and bias_O is None:
            torch.mm(wide_MI, wide_NI.t(), out=out_MO[:, part])
        else:
            bias = None if bias_O is None else bias_O[part].float()
            out_MO[:, part] = functional.linear(wide_MI, wide_NI, bias)
    return out_MO


def product(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias on any device, in x's dtype."""
    if x_MI.is_cpu and not _trains(bias_O):
        if x_MI.dim() == 2 and is_few(x_MI, weight_OI, bias_O):
            return native_product(x_MI, weight_OI, bias_O)
        if x_MI.dim() == 2 and is_widened(x_MI, weight_OI, bias_O):
            return widened_product(x_MI, weight_OI, bias_O)
        if onednn_takes(x_MI, weight_OI):
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


def weight_grad(grad_MO: Tensor, x_MI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """grad.T @ x [O, I], the gradient of the weight of `product`, without autograd, in x's dtype or this."""
    x_IM = x_MI.t()
    if is_widened(grad_MO.t(), x_IM):
        dweight_OI = x_MI.new_empty(grad_MO.shape[1], x_MI.shape[1], dtype=dtype)
        return widened_product(grad_MO.t(), x_IM, out_MO=dweight_OI)
    if onednn_takes(grad_MO, x_IM):  # columns that lie apart it packs itself
        return onednn_product(grad_MO.t(), x_IM).to(dtype or x_MI.dtype)
    return (grad_MO.t() @ x_MI).to(dtype or x_MI.dtype)


def write_weight_grad(grad_MO: Tensor, x_MI: Tensor, dweight_OI: Tensor) -> None:
    """The same into memory; for float32 that is faster than oneDNN and a copy of its result."""
    if is_widened(grad_MO.t(), x_MI.t()):
        widened_product(grad_MO.t(), x_MI.t(), out_MO=dweight_OI)
    else:
        torch.mm(grad_MO.t(), x_MI, out=dweight_OI)
