"""Triton kernel for grouped_gemm and its input gradient. Contract and reference: ../grouped_gemm.py.

One kernel: a program multiplies a tile of one expert's rows, gathered or not, with a block of columns of its
matrix. The input gradient is the same product with the matrix read the other way round. Tiles of few rows
swap the operands, so that the matrix has the 64 or more rows that Hopper's tensor cores take. Where there is
a tensor memory accelerator (TMA), it loads the matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from ..plan import TILE_HEIGHTS, tile_bound
from .launch import (
    ITEMSIZES,
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
from .tiles import describable, descriptor_type, matrix_descriptor, matrix_tile, row_tile, swizzle
from .tuned import Case, measured_first, tuned_compilations

# --- kernels: pointers end in _ptr; every block load is followed by its shape -----------


@triton.jit
def _grouped_gemm_kernel(
    x_ptr,
    token_ptr,
    weight_ptr,
    weight_desc,
    bias_ptr,
    y_ptr,
    offset_ptr,
    tile_end_ptr,
    num_tiles,
    N,
    I,
    O,
    E,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SWAPPED: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (num_tiles * cdiv(O, BLOCK_N),): BLOCK_M rows of one expert, or of the rows left over, by BLOCK_N
    columns.

    The matrix of an expert is [O, I], or TRANSPOSED [I, O]. WHOLE_STEPS: BLOCK_K divides I. `weight_desc`
    describes weight for tiles [BLOCK_N, BLOCK_K], TRANSPOSED [BLOCK_K, BLOCK_N], or is None: pointer loads.
    """
    tile, block = swizzle(tl.program_id(0), num_tiles, tl.cdiv(O, BLOCK_N), GROUP)
    wait_for_inputs(PDL)
    expert, first, end = row_tile(tile, offset_ptr, tile_end_ptr, N, E, BLOCK_M, EXPERTS)
    n = first + tl.arange(0, BLOCK_M)
    o = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < end)[:, None] & (o < O)[None, :]
    y_offset = n[:, None] * O + o[None, :]
    if (first < end) & (expert == E):
        tl.store(y_ptr + y_offset, tl.zeros([BLOCK_M, BLOCK_N], y_ptr.dtype.element_ty), mask=inside)
    if (first < end) & (expert < E):
        # rows past the end repeat the first one, so that the loop needs no mask for them
        source = tl.where(n < end, n, first)
        if GATHER:
            source = tl.load(token_ptr + source).to(tl.int64)  # [BLOCK_M]
        matrix_ptr = weight_ptr + expert.to(tl.int64) * O * I
        if SWAPPED:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        else:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, I, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K).to(tl.int64)
            if SWAPPED:
                x_at = source[None, :] * I + k[:, None]
                w_at = k[None, :] * O + o[:, None] if TRANSPOSED else o[:, None] * I + k[None, :]
                w_mask = (o < O)[:, None] if WHOLE_STEPS else (o < O)[:, None] & (k < I)[None, :]
            else:
                x_at = source[:, None] * I + k[None, :]
                w_at = k[:, None] * O + o[None, :] if TRANSPOSED else o[None, :] * I + k[:, None]
                w_mask = (o < O)[None, :] if WHOLE_STEPS else (o < O)[None, :] & (k < I)[:, None]
            # [BLOCK_K, BLOCK_N], SWAPPED its transpose
            if weight_desc is None:
                w = tl.load(matrix_ptr + w_at, mask=w_mask, other=0.0)
            elif TRANSPOSED:
                w = matrix_tile(weight_desc, expert, start, block * BLOCK_N, BLOCK_K, BLOCK_N, SWAPPED)
            else:
                w = matrix_tile(weight_desc, expert, block * BLOCK_N, start, BLOCK_N, BLOCK_K, not SWAPPED)
            if WHOLE_STEPS:
                x = tl.load(x_ptr + x_at)  # [BLOCK_M, BLOCK_K], SWAPPED its transpose
            elif SWAPPED:
                x = tl.load(x_ptr + x_at, mask=(k < I)[:, None], other=0.0)
            else:
                x = tl.load(x_ptr + x_at, mask=(k < I)[None, :], other=0.0)
            if SWAPPED:
                acc = tl.dot(w, x, acc, input_precision="ieee")
            else:
                acc = tl.dot(x, w, acc, input_precision="ieee")
        allow_next_kernel(PDL)
        if SWAPPED:
            acc = tl.trans(acc)
        if BIAS:
            bias = tl.load(bias_ptr + (expert.to(tl.int64) * O + o), mask=o < O, other=0.0)  # [BLOCK_N]
            acc += bias.to(tl.float32)[None, :]
        tl.store(y_ptr + y_offset, acc.to(y_ptr.dtype.element_ty), mask=inside)


# --- launch choice: a pure function of sizes, so that it can be tested without a GPU ----


@dataclass(frozen=True, kw_only=True)
class GroupedLaunch:
    """Tiles of `block_m` rows by `block_n` columns, `block_k` of the inner width at a time.

    `tma`: the matrix is loaded through a TMA descriptor.
    """

    block_m: int
    block_n: int
    block_k: int
    swapped: bool
    tma: bool = False
    group: int
    options: Options

    def weight_block(self, transposed: bool) -> tuple[int, int, int]:
        """What of the matrices one step loads."""
        return (1, self.block_k, self.block_n) if transposed else (1, self.block_n, self.block_k)


@measured_first
def choose_launch(itemsize: int, N: int, E: int, *, aligned: bool, family: str) -> GroupedLaunch:
    """Tiles about as high as an expert has rows: its matrix is read once and little of a tile is idle.

    From compile checks; not yet measured on a GPU.

    Args:
        itemsize: bytes of an element, 2 or 4.
        N: rows of E experts together.
        aligned: rows start where 16 bytes can be loaded at once, and the matrices are `describable`; others
            are loaded element by element.
        family: of `device_family`.
    """
    wanted = triton.next_power_of_2(max(1, triton.cdiv(N, E)))
    # float32 products are exact, without tensor cores
    highest = TILE_HEIGHTS[-1] if itemsize == 2 and aligned else 64 if aligned else 32
    block_m = min(max(wanted, TILE_HEIGHTS[0]), highest)
    if itemsize == 4 or not aligned:
        return GroupedLaunch(
            block_m=block_m,
            block_n=64 if aligned or itemsize == 2 else 32,
            block_k=32,
            swapped=itemsize == 2 and block_m < 64,
            group=8,
            options=Options(num_warps=4, num_stages=2 if aligned else 1),
        )
    large = family in SINCE_HOPPER
    stages = 2 if family == "hip" else 3 if block_m >= 64 or family == "cuda100" else 4
    return GroupedLaunch(
        block_m=block_m,
        block_n=256 if large and block_m == TILE_HEIGHTS[-1] else 128,
        block_k=64,
        swapped=block_m < 64,
        tma=large,
        group=8,
        options=Options(num_warps=8 if block_m == TILE_HEIGHTS[-1] else 4, num_stages=stages),
    )


# --- launchers --------------------------------------------------------------------------


def grouped_product(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    tile_end: Tensor,
    *,
    token: Tensor | None = None,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Each expert's rows of x, or of x[token], times its matrix [O, I], or `transposed` [I, O]."""
    check_16_or_32_bits("grouped_gemm", x)
    N, E = (x if token is None else token).shape[0], weight.shape[0]
    O, I = weight.shape[2 if transposed else 1], weight.shape[1 if transposed else 2]
    y = x.new_empty(N, O)
    if y.numel() == 0:
        return y
    aligned = aligned_to_16((I, O), x, weight) and describable(weight)
    kind = "transposed" if transposed else "plain" if token is None else "gathered"
    case = Case(f"grouped_gemm {kind}", I, O, E, N)
    launch = choose_launch(x.itemsize, N, E, aligned=aligned, family=device_family(x.device), case=case)
    # one more group than experts: the rows left over
    num_tiles = tile_bound(N, E + 1, launch.block_m)
    _grouped_gemm_kernel[(num_tiles * triton.cdiv(O, launch.block_n),)](
        x,
        token,
        weight,
        matrix_descriptor(weight, weight.shape, launch.weight_block(transposed)) if launch.tma else None,
        bias,
        y,
        offset,
        tile_end[TILE_HEIGHTS.index(launch.block_m)],
        num_tiles,
        N,
        I,
        O,
        E,
        GATHER=token is not None,
        BIAS=bias is not None,
        TRANSPOSED=transposed,
        SWAPPED=launch.swapped,
        WHOLE_STEPS=I % launch.block_k == 0,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        GROUP=launch.group,
        EXPERTS=triton.next_power_of_2(E),
        **launch.options.keywords(),
    )
    return y


def launch_grouped_gemm(
    x: Tensor, weight: Tensor, offset: Tensor, tile_end: Tensor, bias: Tensor | None
) -> Tensor:
    return grouped_product(x, weight, offset, tile_end, bias=bias)


def launch_gathered_grouped_gemm(
    x: Tensor, weight: Tensor, token: Tensor, offset: Tensor, tile_end: Tensor, bias: Tensor | None
) -> Tensor:
    return grouped_product(x, weight, offset, tile_end, token=token, bias=bias)


def launch_input_grad(grad: Tensor, weight: Tensor, offset: Tensor, tile_end: Tensor) -> Tensor:
    return grouped_product(grad, weight, offset, tile_end, transposed=True)


KINDS = ("plain", "gathered", "transposed")


def compilations() -> list[Compilation]:
    """Every configuration that `choose_launch` gives."""
    found = for_families(_compilations)
    for kind in KINDS:
        found += tuned_compilations(
            f"grouped_gemm {kind}", GroupedLaunch, partial(_tuned_compilations, kind=kind)
        )
    return found


def _tuned_compilations(launch: GroupedLaunch, kind: str) -> Iterator[Compilation]:
    for dtype, widths in product(("bf16", "fp16"), ("whole", "ragged")):
        yield _compilation(dtype, launch, kind, widths, pdl=False)


def _compilations(family: str) -> Iterator[Compilation]:
    for (dtype, itemsize), N, aligned in product(ITEMSIZES.items(), TILE_HEIGHTS, (True, False)):
        launch = choose_launch(itemsize, N, 1, aligned=aligned, family=family)
        for kind, widths, pdl in product(KINDS, ("whole", "ragged") if aligned else ("odd",), (False, True)):
            yield _compilation(dtype, launch, kind, widths, pdl=pdl)


def _compilation(dtype: str, launch: GroupedLaunch, kind: str, widths: str, *, pdl: bool) -> Compilation:
    """A gathered one with a bias is an up-projection, a transposed one an input gradient."""
    pointer, gathered = f"*{dtype}", kind == "gathered"
    transposed, size = kind == "transposed", f"{launch.block_m}x{launch.block_n}x{launch.block_k}"
    signature = {
        "x_ptr": pointer,
        "token_ptr": "*i32" if gathered else "constexpr",
        "weight_ptr": pointer,
        "weight_desc": descriptor_type(dtype, launch.weight_block(transposed)) if launch.tma else "constexpr",
        "bias_ptr": pointer if gathered else "constexpr",
        "y_ptr": pointer,
        "offset_ptr": "*i32",
        "tile_end_ptr": "*i32",
        **dict.fromkeys(("num_tiles", "N", "I", "O", "E"), "i32"),
    }
    return Compilation(
        kernel=_grouped_gemm_kernel,
        label=f"{dtype} {size} {'tma ' if launch.tma else ''}{kind} {widths}{' pdl' if pdl else ''}",
        signature=signature,
        constexprs={
            **{name: None for name, type_ in signature.items() if type_ == "constexpr"},
            "GATHER": gathered,
            "BIAS": gathered,
            "TRANSPOSED": transposed,
            "SWAPPED": launch.swapped,
            "WHOLE_STEPS": widths == "whole",
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "BLOCK_K": launch.block_k,
            "GROUP": launch.group,
            "EXPERTS": 128,
        },
        options=replace(launch.options, pdl=pdl),
        divisible=() if widths == "odd" else ("I", "O", "x_ptr", "weight_ptr", "y_ptr"),
    )
