"""Triton kernels for expert_ffn. Contract and reference: ../expert_ffn.py.

Forward: the up-projection with gather and activation, the down-projection, the weighted sum of each token's
rows. Backward: one kernel multiplies the gathered gradient with the down-projection and makes from the
product dh, the weighted a that the down-projection's gradient needs, and the parts of dweight; the products
left are grouped ones. No rows are copied just to be in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import TILE_HEIGHTS, tile_bound
from .combine import launch_combine
from .grouped_gemm import grouped_product
from .grouped_wgrad import grouped_bias_grad, grouped_weight_grad
from .launch import (
    SINCE_HOPPER,
    Compilation,
    Options,
    aligned_to_16,
    allow_next_kernel,
    check_16_or_32_bits,
    device_family,
    for_families,
    wait_for_inputs,
)
from .permute import launch_scatter_rows
from .tiles import describable, descriptor_type, matrix_descriptor, matrix_tile, row_tile, swizzle
from .tuned import Case, measured_first, tuned_compilations

# --- kernels: pointers end in _ptr; every block load is followed by its shape -----------


@triton.jit
def _activation(h, NAME: tl.constexpr):
    """Value and slope of an activation at float32 h; a NaN stays one."""
    if NAME == "silu":
        s = tl.sigmoid(h)
        value = h * s
        slope = s + value * (1.0 - s)
    elif NAME == "gelu":
        below = 0.5 + 0.5 * tl.math.erf(h * 0.7071067811865476)
        value = h * below
        slope = below + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif NAME == "gelu_tanh":
        # h / 2 * (1 + tanh(u)) is h * sigmoid(2u)
        s = tl.sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))
        value = h * s
        slope = s + value * (1.0 - s) * (1.5957691216057308 + 0.2140644488267379 * h * h)
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        value = tl.where(h < 0.0, 0.0, h)
        slope = tl.where(h > 0.0, 1.0, 0.0)
        if NAME == "relu2":
            slope = 2.0 * value
            value = value * value
    return value, slope


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a block's columns."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _slices(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NUM: tl.constexpr):
    """A block's columns in NUM parts, 1, 2 or 4, from left to right."""
    tl.static_assert(NUM == 1 or NUM == 2 or NUM == 4)
    if NUM == 1:
        return (x,)
    else:
        left, right = _halves(x, ROWS, COLUMNS)
        if NUM == 2:
            return (left, right)
        else:
            first, second = _halves(left, ROWS, COLUMNS // 2)
            third, last = _halves(right, ROWS, COLUMNS // 2)
            return (first, second, third, last)


@triton.jit
def _with_bias(acc, bias_ptr, at, there):
    """acc plus its columns' bias, which is added if it is not None and is `there`."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + at, mask=there, other=0.0)  # [columns]
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def _up_kernel(
    x_ptr,
    token_ptr,
    gate_up_ptr,
    gate_up_desc,
    bias_ptr,
    h_ptr,
    a_ptr,
    offset_ptr,
    tile_end_ptr,
    num_tiles,
    N,
    D,
    F,
    E,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (num_tiles * cdiv(F, BLOCK_F),): a and h of BLOCK_M rows of one expert, or of the rows left over.

    GATED: a column of a needs a gate's and an up column of h; the tile of the matrix holds BLOCK_F rows of
    the gate and then those of up, so that there is one product. `gate_up_desc` describes gate_up as
    [E, G / F, F, D], or is None: pointer loads. Bias and h may be None, and so may a where only h is wanted.

    PAIR: gate and up are two tiles and two products. A left operand that one load brings in two parts goes
    through registers on Hopper, whose instruction takes 64 rows at a time, so that two products are no more.
    """
    PAIR: tl.constexpr = GATED and SWAPPED and gate_up_desc is not None
    WIDTH: tl.constexpr = 2 * BLOCK_F if GATED else BLOCK_F
    G = 2 * F if GATED else F
    tile, block = swizzle(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_F), GROUP)
    wait_for_inputs(PDL)
    expert, first, end = row_tile(tile, offset_ptr, tile_end_ptr, N, E, BLOCK_M, EXPERTS)
    if first < end:
        n = first + tl.arange(0, BLOCK_M)
        # rows past the end repeat the first one, columns past F the last one: the loop needs no mask for them
        token = tl.load(token_ptr + tl.where(n < end, n, first)).to(tl.int64)  # [BLOCK_M]
        c = tl.arange(0, WIDTH)
        g = tl.minimum(block.to(tl.int64) * BLOCK_F + c % BLOCK_F, F - 1) + (c // BLOCK_F).to(tl.int64) * F
        matrix_ptr = gate_up_ptr + expert.to(tl.int64) * G * D
        if PAIR:
            acc = tl.zeros([BLOCK_F, BLOCK_M], tl.float32)
            up_acc = tl.zeros([BLOCK_F, BLOCK_M], tl.float32)
        else:
            acc = tl.zeros([WIDTH, BLOCK_M] if SWAPPED else [BLOCK_M, WIDTH], tl.float32)
        # the rows left over have no expert: no step, and zeros
        for start in range(0, tl.where(expert < E, D, 0), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K).to(tl.int64)
            if SWAPPED:
                x_at, x_mask = token[None, :] * D + k[:, None], (k < D)[:, None]
                u_at, u_mask = g[:, None] * D + k[None, :], (k < D)[None, :]
            else:
                x_at, x_mask = token[:, None] * D + k[None, :], (k < D)[None, :]
                u_at, u_mask = g[None, :] * D + k[:, None], (k < D)[:, None]
            x = tl.load(x_ptr + x_at, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K], SWAPPED its transpose
            # u: [BLOCK_K, WIDTH], SWAPPED its transpose, PAIR only the gate's half
            if gate_up_desc is None:
                u = tl.load(matrix_ptr + u_at, mask=u_mask, other=0.0)
            else:
                u = gate_up_desc.load([expert, 0, block * BLOCK_F, start])
                u = u.reshape(BLOCK_F if PAIR else WIDTH, BLOCK_K)
                u = u if SWAPPED else u.trans()
            if SWAPPED:
                acc = tl.dot(u, x, acc, input_precision="ieee")
            else:
                acc = tl.dot(x, u, acc, input_precision="ieee")
            if PAIR:
                up = gate_up_desc.load([expert, 1, block * BLOCK_F, start]).reshape(BLOCK_F, BLOCK_K)
                up_acc = tl.dot(up, x, up_acc, input_precision="ieee")
        allow_next_kernel(PDL)
        if SWAPPED:
            acc = tl.trans(acc)
        end_of_bias = tl.where(expert < E, G, 0)
        bias_at = expert.to(tl.int64) * G
        if not PAIR:
            h = _with_bias(acc, bias_ptr, bias_at + g, g < end_of_bias).to(x_ptr.dtype.element_ty)
        if GATED:
            # in two slices: all at once, the index arithmetic of the stores is too many registers
            if PAIR:
                f = tl.minimum(block.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F), F - 1)
                gate = _with_bias(acc, bias_ptr, bias_at + f, f < end_of_bias).to(x_ptr.dtype.element_ty)
                up = _with_bias(tl.trans(up_acc), bias_ptr, bias_at + F + f, f < end_of_bias)
                up = up.to(x_ptr.dtype.element_ty)
            else:
                gate, up = _halves(h, BLOCK_M, WIDTH)
            gates, ups = _halves(gate, BLOCK_M, BLOCK_F), _halves(up, BLOCK_M, BLOCK_F)
            for i in tl.static_range(2):
                f = block.to(tl.int64) * BLOCK_F + i * (BLOCK_F // 2) + tl.arange(0, BLOCK_F // 2)
                inside = (n < end)[:, None] & (f < F)[None, :]
                if h_ptr is not None:
                    h_at = n[:, None] * G + f[None, :]
                    tl.store(h_ptr + h_at, gates[i], mask=inside)
                    tl.store(h_ptr + (h_at + F), ups[i], mask=inside)
                if a_ptr is not None:
                    value, _ = _activation(gates[i].to(tl.float32), ACTIVATION)
                    a = (value * ups[i].to(tl.float32)).to(a_ptr.dtype.element_ty)
                    tl.store(a_ptr + (n[:, None] * F + f[None, :]), a, mask=inside)
        else:
            f = block.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
            inside = (n < end)[:, None] & (f < F)[None, :]
            a_at = n[:, None] * F + f[None, :]
            if h_ptr is not None:
                tl.store(h_ptr + a_at, h, mask=inside)
            if a_ptr is not None:
                a, _ = _activation(h.to(tl.float32), ACTIVATION)
                tl.store(a_ptr + a_at, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish_columns(
    da, weight, h_ptr, dh_ptr, a_ptr, n, f, end, F, ACTIVATION: tl.constexpr, GATED: tl.constexpr
):
    """Store dh and w * a, where they are wanted, for the columns f of da; returns <da, a> over them."""
    G = 2 * F if GATED else F
    inside = (n < end)[:, None] & (f < F)[None, :]
    h_at = n[:, None] * G + f[None, :]
    h = tl.load(h_ptr + h_at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, columns]
    value, slope = _activation(h, ACTIVATION)
    weighted = da * weight[:, None]
    if GATED:
        up = tl.load(h_ptr + (h_at + F), mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, columns]
        a = value * up
        if dh_ptr is not None:
            element = dh_ptr.dtype.element_ty
            tl.store(dh_ptr + h_at, (weighted * up * slope).to(element), mask=inside)
            tl.store(dh_ptr + (h_at + F), (weighted * value).to(element), mask=inside)
    else:
        a = value
        if dh_ptr is not None:
            tl.store(dh_ptr + h_at, (weighted * slope).to(dh_ptr.dtype.element_ty), mask=inside)
    if a_ptr is not None:
        a_at = n[:, None] * F + f[None, :]
        tl.store(a_ptr + a_at, (a * weight[:, None]).to(a_ptr.dtype.element_ty), mask=inside)
    return tl.sum(da * a, 1)


@triton.jit
def _dh_kernel(
    grad_ptr,
    token_ptr,
    slot_ptr,
    weight_ptr,
    down_ptr,
    down_desc,
    h_ptr,
    dh_ptr,
    a_ptr,
    part_ptr,
    offset_ptr,
    tile_end_ptr,
    num_tiles,
    N,
    D,
    F,
    E,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SWAPPED: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (num_tiles * cdiv(F, BLOCK_F),): dh, w * a and <da', a> of BLOCK_M rows by BLOCK_F columns.

    Each of the three may be None; <da', a> is one float32 per row and block of columns. da' is finished in
    SLICES of its columns: all at once, the accumulator, h and what is made of them are too many registers.
    `down_desc` describes down for tiles [BLOCK_K, BLOCK_F], or is None: pointer loads.
    """
    PRODUCT: tl.constexpr = dh_ptr is not None or part_ptr is not None
    WIDTH: tl.constexpr = BLOCK_F // SLICES
    tile, block = swizzle(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_F), GROUP)
    wait_for_inputs(PDL)
    expert, first, end = row_tile(tile, offset_ptr, tile_end_ptr, N, E, BLOCK_M, EXPERTS)
    if first < end:
        n = first + tl.arange(0, BLOCK_M)
        f = block.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
        acc = tl.zeros([BLOCK_F, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_F], tl.float32)
        if PRODUCT:
            # rows past the end repeat the first one: the loop needs no mask for them
            token = tl.load(token_ptr + tl.where(n < end, n, first)).to(tl.int64)  # [BLOCK_M]
            matrix_ptr = down_ptr + expert.to(tl.int64) * D * F
            # the rows left over have no expert: no step, and zeros
            for start in range(0, tl.where(expert < E, D, 0), BLOCK_K):
                k = start + tl.arange(0, BLOCK_K).to(tl.int64)
                if SWAPPED:
                    g_at, g_mask = token[None, :] * D + k[:, None], (k < D)[:, None]
                    d_at, d_mask = k[None, :] * F + f[:, None], (k < D)[None, :] & (f < F)[:, None]
                else:
                    g_at, g_mask = token[:, None] * D + k[None, :], (k < D)[None, :]
                    d_at, d_mask = k[:, None] * F + f[None, :], (k < D)[:, None] & (f < F)[None, :]
                g = tl.load(
                    grad_ptr + g_at, mask=g_mask, other=0.0
                )  # [BLOCK_M, BLOCK_K], SWAPPED its transpose
                # [BLOCK_K, BLOCK_F], SWAPPED its transpose
                if down_desc is None:
                    d = tl.load(matrix_ptr + d_at, mask=d_mask, other=0.0)
                else:
                    d = matrix_tile(down_desc, expert, start, block * BLOCK_F, BLOCK_K, BLOCK_F, SWAPPED)
                if SWAPPED:
                    acc = tl.dot(d, g, acc, input_precision="ieee")
                else:
                    acc = tl.dot(g, d, acc, input_precision="ieee")
        allow_next_kernel(PDL)
        if SWAPPED:
            acc = tl.trans(acc)
        slot = tl.load(slot_ptr + n, mask=n < end, other=-1).to(tl.int64)  # [BLOCK_M]
        weight = tl.load(weight_ptr + slot, mask=slot >= 0, other=0.0).to(tl.float32)  # [BLOCK_M]
        part = tl.zeros([BLOCK_M], tl.float32)
        da = _slices(acc, BLOCK_M, BLOCK_F, SLICES)
        for i in tl.static_range(SLICES):
            f = block.to(tl.int64) * BLOCK_F + i * WIDTH + tl.arange(0, WIDTH)
            part += _finish_columns(da[i], weight, h_ptr, dh_ptr, a_ptr, n, f, end, F, ACTIVATION, GATED)
        if part_ptr is not None:
            tl.store(part_ptr + (block.to(tl.int64) * N + n), part, mask=n < end)


@triton.jit
def _dweight_kernel(
    part_ptr,
    grad_ptr,
    bias_ptr,
    row_ptr,
    token_ptr,
    slot_ptr,
    dweight_ptr,
    offset_ptr,
    tile_end_ptr,
    num_parts,
    N,
    D,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of BLOCK_M rows,): dweight of a tile's rows, in the order of the choices, parts ascending.

    Program p also writes the zeros of the dropped ones among choices p * BLOCK_M ... The bias may be None.
    """
    wait_for_inputs(PDL)
    choice = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dropped = tl.load(row_ptr + choice, mask=choice < N, other=0) < 0  # [BLOCK_M]
    tl.store(dweight_ptr + choice, tl.zeros([BLOCK_M], dweight_ptr.dtype.element_ty), mask=dropped)

    expert, first, end = row_tile(tl.program_id(0), offset_ptr, tile_end_ptr, N, E, BLOCK_M, EXPERTS)
    if (first < end) & (expert < E):
        n = first + tl.arange(0, BLOCK_M)
        dweight = tl.zeros([BLOCK_M], tl.float32)
        for part in range(num_parts):
            at = tl.cast(part, tl.int64) * N + n
            dweight += tl.load(part_ptr + at, mask=n < end, other=0.0)  # [BLOCK_M]
        if bias_ptr is not None:
            token = tl.load(token_ptr + tl.where(n < end, n, first)).to(tl.int64)  # [BLOCK_M]
            dot = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D).to(tl.int64)
                at = token[:, None] * D + d[None, :]
                g = tl.load(grad_ptr + at, mask=(d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
                bias = tl.load(bias_ptr + (expert.to(tl.int64) * D + d), mask=d < D, other=0.0)  # [BLOCK_D]
                dot += g.to(tl.float32) * bias.to(tl.float32)[None, :]
            dweight += tl.sum(dot, 1)
        slot = tl.load(slot_ptr + n, mask=n < end, other=-1).to(tl.int64)  # [BLOCK_M]
        tl.store(dweight_ptr + slot, dweight.to(dweight_ptr.dtype.element_ty), mask=slot >= 0)
    allow_next_kernel(PDL)


# --- launch choice: a pure function of sizes, so that it can be tested without a GPU ----


@dataclass(frozen=True, kw_only=True)
class FFNLaunch:
    """Tiles of `block_m` rows by `block_f` hidden columns, `block_k` of the model width at a time.

    A gated up-projection multiplies with 2 * block_f columns. `slices` are those of the backward kernel.
    `tma`: the matrix is loaded through a TMA descriptor.
    """

    block_m: int
    block_f: int
    block_k: int
    swapped: bool
    tma: bool = False
    slices: int = 1
    group: int = 8
    options: Options

    def tile(self) -> dict[str, Any]:
        """Compile-time arguments that the up-projection's and the backward kernel have both."""
        return {
            "SWAPPED": self.swapped,
            "BLOCK_M": self.block_m,
            "BLOCK_F": self.block_f,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
        }

    def gate_up_block(self, gated: bool) -> tuple[int, int, int, int]:
        """What one load brings of gate_up, [E, G / F, F, D]: gate and up together where they are columns."""
        return (1, 2 if gated and not self.swapped else 1, self.block_f, self.block_k)


def _tile_height(N: int, E: int) -> int:
    """About as many rows as an expert has, so that its matrix is read once and little of a tile is idle."""
    wanted = triton.next_power_of_2(max(1, triton.cdiv(N, E)))
    return min(max(wanted, TILE_HEIGHTS[0]), TILE_HEIGHTS[-1])


def _small_launch(itemsize: int, block_m: int, gated: bool) -> FFNLaunch:
    """For exact float32 products, which no tensor core makes, and for loads element by element.

    Hardware copies nothing shorter than 4 bytes asynchronously: with 2, there is nothing to be staged.
    """
    swapped = itemsize == 2 and block_m == 16
    width = 64 if itemsize == 2 and (gated or swapped) else 32
    return FFNLaunch(
        block_m=16 if block_m == 16 else 64,
        block_f=width // 2 if gated else width,
        block_k=32 if itemsize == 4 and block_m > 16 else 16,
        swapped=swapped,
        options=Options(num_warps=4 if block_m == 16 else 8, num_stages=2 if itemsize == 4 else 1),
    )


@measured_first
def choose_up_launch(itemsize: int, N: int, E: int, *, gated: bool, aligned: bool, family: str) -> FFNLaunch:
    """From compile checks; not yet measured on a GPU.

    Args:
        itemsize: bytes of an element, 2 or 4.
        N: routed rows.
        E: experts.
        gated: whether a hidden column takes two columns of the product.
        aligned: of `aligned_to_16`, and `describable` for the matrices.
        family: of `device_family`.
    """
    block_m = _tile_height(N, E)
    if itemsize == 4 or not aligned:
        return _small_launch(itemsize, block_m, gated)
    large = family in SINCE_HOPPER
    width = 256 if large and gated and block_m >= 64 else 128
    stages = 2 if family == "hip" else 4 if large and block_m < 128 else 3
    return FFNLaunch(
        block_m=block_m,
        block_f=width // 2 if gated else width,
        block_k=64,
        swapped=block_m <= 32,
        tma=large,
        options=Options(num_warps=8 if block_m >= 64 else 4, num_stages=stages),
    )


@measured_first
def choose_dh_launch(itemsize: int, N: int, E: int, *, aligned: bool, family: str) -> FFNLaunch:
    """As `choose_up_launch`; gated or not, a column takes one column of the product."""
    block_m = _tile_height(N, E)
    if itemsize == 4 or not aligned:
        return _small_launch(itemsize, block_m, False)
    return FFNLaunch(
        block_m=block_m,
        block_f=128,
        block_k=64,
        swapped=block_m <= 32,
        tma=family in SINCE_HOPPER,
        slices=1 if block_m <= 32 else 4,
        options=Options(num_warps=8 if block_m == 128 else 4, num_stages=2 if family == "hip" else 3),
    )


# 32 rows: few enough that small experts waste little
DWEIGHT_ROWS, DWEIGHT_COLUMNS, DWEIGHT_OPTIONS = 32, 128, Options(num_warps=4, num_stages=2)


# --- launchers --------------------------------------------------------------------------


def launch_expert_ffn(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    row: Tensor,
    token: Tensor,
    slot: Tensor,
    offset: Tensor,
    tile_end: Tensor,
    activation: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    check_16_or_32_bits("expert_ffn", x)
    F, G, N = down.shape[2], gate_up.shape[1], token.shape[0]
    h, a = x.new_empty(N if keep_h else 0, G), x.new_empty(N, F)
    _launch_up(x, gate_up, gate_up_bias, token, offset, tile_end, F, activation, h if keep_h else None, a)
    y_ND = grouped_product(a, down, offset, tile_end, bias=down_bias)
    del a  # before the result is allocated
    return launch_combine(y_ND, weight, row, residual, None), h


def _launch_up(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    token: Tensor,
    offset: Tensor,
    tile_end: Tensor,
    F: int,
    activation: str,
    h: Tensor | None,
    a: Tensor | None,
) -> None:
    """Fill h and a, each of which may be None. Whichever is there, h has the same bits."""
    (E, G, D), N = gate_up.shape, token.shape[0]
    if N * F == 0:
        return
    family, aligned = device_family(x.device), aligned_to_16((D, F), x, gate_up) and describable(gate_up)
    gated = G == 2 * F
    case = Case("expert_ffn up gated" if gated else "expert_ffn up", D, F, E, N)
    launch = choose_up_launch(x.itemsize, N, E, gated=gated, aligned=aligned, family=family, case=case)
    gate_up_desc = None
    if launch.tma:
        gate_up_desc = matrix_descriptor(gate_up, (E, G // F, F, D), launch.gate_up_block(gated))
    _launch_tiles(
        _up_kernel,
        launch,
        (x, token, gate_up, gate_up_desc, bias, h, a),
        (offset, tile_end),
        (N, D, F, E),
        ACTIVATION=activation,
        GATED=gated,
    )


def _launch_tiles(
    kernel: Any,
    launch: FFNLaunch,
    operands: tuple[Any, ...],
    plan: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    **constexprs: Any,
) -> None:
    """The up-projection's or the backward kernel, for a plan's offset and tile_end and sizes N, D, F, E."""
    (offset, tile_end), (N, D, F, E) = plan, sizes
    num_tiles = tile_bound(N, E + 1, launch.block_m)
    kernel[(num_tiles * triton.cdiv(F, launch.block_f),)](
        *operands,
        offset,
        tile_end[TILE_HEIGHTS.index(launch.block_m)],
        num_tiles,
        N,
        D,
        F,
        E,
        **constexprs,
        **launch.tile(),
        EXPERTS=triton.next_power_of_2(E),
        **launch.options.keywords(),
    )


def launch_expert_ffn_backward(
    grad_out: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    weight: Tensor,
    row: Tensor,
    token: Tensor,
    slot: Tensor,
    offset: Tensor,
    tile_end: Tensor,
    h: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    gate_up_main_grad: Tensor | None = None,
    down_main_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    check_16_or_32_bits("expert_ffn", x)
    needs_x, needs_gate_up, needs_down, needs_gate_up_bias, needs_down_bias, needs_weight = needs
    (E, D, F), G, N = down.shape, gate_up.shape[1], token.shape[0]
    dx, dgate_up, ddown, dgate_up_bias, ddown_bias = (x.new_empty(0) for _ in range(5))
    dweight = weight.new_empty(weight.shape if needs_weight else 0)
    grad = grad_out.to(x.dtype)
    if h is None:
        needs_h = needs_x or needs_gate_up or needs_down or needs_gate_up_bias or needs_weight
        h = x.new_empty(N if needs_h else 0, G)
        if needs_h:
            _launch_up(x, gate_up, gate_up_bias, token, offset, tile_end, F, activation, h, None)

    family, aligned = device_family(x.device), aligned_to_16((D, F), grad, down, h) and describable(down)
    case = Case("expert_ffn dh", D, F, E, N)
    launch = choose_dh_launch(x.itemsize, N, E, aligned=aligned, family=family, case=case)
    num_blocks = triton.cdiv(F, launch.block_f)
    dh = x.new_empty(N, G) if needs_x or needs_gate_up or needs_gate_up_bias else None
    weighted_a = x.new_empty(N, F) if needs_down else None
    part = weight.new_empty(num_blocks, N, dtype=torch.float32) if needs_weight else None
    if N > 0 and any(wanted is not None for wanted in (dh, weighted_a, part)):
        down_desc = None
        if launch.tma:
            down_desc = matrix_descriptor(down, down.shape, (1, launch.block_k, launch.block_f))
        _launch_tiles(
            _dh_kernel,
            launch,
            (grad, token, slot, weight, down, down_desc, h, dh, weighted_a, part),
            (offset, tile_end),
            (N, D, F, E),
            ACTIVATION=activation,
            GATED=G == 2 * F,
            SLICES=launch.slices,
        )
    if part is not None and N > 0:
        _dweight_kernel[(tile_bound(N, E + 1, DWEIGHT_ROWS),)](
            part,
            grad,
            down_bias,
            row,
            token,
            slot,
            dweight,
            offset,
            tile_end[TILE_HEIGHTS.index(DWEIGHT_ROWS)],
            num_blocks,
            N,
            D,
            E,
            BLOCK_M=DWEIGHT_ROWS,
            BLOCK_D=DWEIGHT_COLUMNS,
            EXPERTS=triton.next_power_of_2(E),
            **DWEIGHT_OPTIONS.keywords(),
        )
    # what is done with is given back; dx, which needs N * D numbers for a while, comes before dgate_up
    del h, part
    if weighted_a is not None:
        ddown = grouped_weight_grad(grad, weighted_a, offset, grad_token=token, main_grad=down_main_grad)
        del weighted_a
    if dh is not None and needs_x:
        dx = launch_scatter_rows(grouped_product(dh, gate_up, offset, tile_end, transposed=True), row)
    if needs_down_bias:
        ddown_bias = grouped_bias_grad(grad, offset, token=token, scale=weight, slot=slot)
    if dh is not None and needs_gate_up:
        dgate_up = grouped_weight_grad(dh, x, offset, x_token=token, main_grad=gate_up_main_grad)
    if dh is not None and needs_gate_up_bias:
        dgate_up_bias = grouped_bias_grad(dh, offset)
    return dx, dgate_up, ddown, dgate_up_bias, ddown_bias, dweight


# --- for compiling ahead of time --------------------------------------------------------

# activation, gated, and whether everything optional is there; the first is what most models have
_VARIANTS = (("silu", True, False), ("silu", True, True), ("gelu", True, True), ("relu2", False, True))
_MATRICES = {
    "up": ("x_ptr", "gate_up_ptr", "h_ptr", "a_ptr"),
    "h": ("x_ptr", "gate_up_ptr", "h_ptr"),
    "dh": ("grad_ptr", "down_ptr", "h_ptr", "dh_ptr", "a_ptr"),
}
_SIZES = dict.fromkeys(("num_tiles", "N", "D", "F", "E"), "i32")
_SCHEDULE = {"offset_ptr": "*i32", "tile_end_ptr": "*i32"}


def compilations() -> list[Compilation]:
    """Every tile that the launch choices give, for the activations with most and least registers.

    float16 is bfloat16's code with other instructions, and odd widths have one tile of few registers: both
    are there with one activation. float32 has the same tiles for all widths. What the table has is there for
    bfloat16 only, for the same reason.
    """
    found = for_families(_compilations)
    for kernel in ("up gated", "up", "dh"):
        found += tuned_compilations(f"expert_ffn {kernel}", FFNLaunch, partial(_measured, kernel=kernel))
    return found


def _measured(launch: FFNLaunch, kernel: str) -> Iterator[Compilation]:
    for variant in _VARIANTS:
        if kernel == "dh":
            yield _compilation("dh", "bf16", launch, variant, aligned=True, pdl=False)
        elif variant[1] == (kernel == "up gated"):
            yield _compilation("up", "bf16", launch, variant, aligned=True, pdl=False)
            yield _compilation("h", "bf16", launch, ("silu", *variant[1:]), aligned=True, pdl=False)


def _compilations(family: str) -> Iterator[Compilation]:
    kinds = (
        ("bf16", 2, True, _VARIANTS),
        ("bf16", 2, False, _VARIANTS[2:]),
        ("fp16", 2, True, _VARIANTS[2:3]),
        ("fp32", 4, False, _VARIANTS[::2]),
    )
    for N, (dtype, itemsize, aligned, variants) in product(TILE_HEIGHTS, kinds):
        for variant, pdl in product(variants, (False, True)):
            if pdl and variant != _VARIANTS[0]:
                continue
            up = choose_up_launch(itemsize, N, 1, gated=variant[1], aligned=aligned, family=family)
            dh = choose_dh_launch(itemsize, N, 1, aligned=aligned, family=family)
            yield _compilation("up", dtype, up, variant, aligned=aligned, pdl=pdl)
            # without a there is no activation
            yield _compilation("h", dtype, up, ("silu", *variant[1:]), aligned=aligned, pdl=pdl)
            yield _compilation("dh", dtype, dh, variant, aligned=aligned, pdl=pdl)
            yield _dweight_compilation(dtype, bias=variant[2], pdl=pdl)


def _compilation(
    what: str, dtype: str, launch: FFNLaunch, variant: tuple[str, bool, bool], *, aligned: bool, pdl: bool
) -> Compilation:
    """Of "up", "h", which is up without a, or "dh"; dh without everything optional is what frozen experts
    need for dx alone.
    """
    activation, gated, everything = variant
    pointer = f"*{dtype}"
    optional: dict[str, str]
    block: tuple[int, ...]
    if what != "dh":
        optional = {"bias_ptr": pointer, **({"h_ptr": pointer} if what == "up" else {})}
        described, block = "gate_up_desc", launch.gate_up_block(gated)
        operands = {"x_ptr": pointer, "token_ptr": "*i32", "gate_up_ptr": pointer}
        results = {"a_ptr" if what == "up" else "h_ptr": pointer}
    else:
        optional = {"a_ptr": pointer, "part_ptr": "*fp32"}
        described, block = "down_desc", (1, launch.block_k, launch.block_f)
        indices = {"token_ptr": "*i32", "slot_ptr": "*i32", "weight_ptr": "*fp32"}
        operands = {"grad_ptr": pointer, **indices, "down_ptr": pointer, "h_ptr": pointer, "dh_ptr": pointer}
        results = {}
    descriptor = {described: descriptor_type(dtype, block)} if launch.tma else {}
    size = f"{launch.block_m}x{launch.block_f}x{launch.block_k} w{launch.options.num_warps}"
    stages = f"s{launch.options.num_stages}{' tma' if launch.tma else ''}"
    kind = f"{activation}{' gated' if gated else ''}{' all' if everything else ''}"
    return Compilation(
        kernel=_dh_kernel if what == "dh" else _up_kernel,
        label=f"{dtype} {what} {size} {stages} {kind}"
        f"{' odd' if not aligned and dtype != 'fp32' else ''}{' pdl' if pdl else ''}",
        signature={
            **operands,
            **descriptor,
            **(optional if everything else {}),
            **results,
            **_SCHEDULE,
            **_SIZES,
        },
        constexprs={
            **({} if launch.tma else {described: None}),
            **({} if everything else dict.fromkeys(optional)),
            **({"a_ptr": None} if what == "h" else {}),
            "ACTIVATION": activation,
            "GATED": gated,
            **launch.tile(),
            "EXPERTS": 128,
            **({"SLICES": launch.slices} if what == "dh" else {}),
        },
        options=replace(launch.options, pdl=pdl),
        divisible=("D", "F", *_MATRICES[what]) if aligned else (),
    )


def _dweight_compilation(dtype: str, *, bias: bool, pdl: bool) -> Compilation:
    indices = dict.fromkeys(("row_ptr", "token_ptr", "slot_ptr"), "*i32")
    outputs = {"dweight_ptr": "*fp32", **_SCHEDULE, **dict.fromkeys(("num_parts", "N", "D", "E"), "i32")}
    operands = {"part_ptr": "*fp32", "grad_ptr": f"*{dtype}", **({"bias_ptr": f"*{dtype}"} if bias else {})}
    tile = {"BLOCK_M": DWEIGHT_ROWS, "BLOCK_D": DWEIGHT_COLUMNS, "EXPERTS": 128}
    return Compilation(
        kernel=_dweight_kernel,
        label=f"{dtype} dweight{' bias' if bias else ''}{' pdl' if pdl else ''}",
        signature={**operands, **indices, **outputs},
        constexprs={**({} if bias else {"bias_ptr": None}), **tile},
        options=replace(DWEIGHT_OPTIONS, pdl=pdl),
    )
