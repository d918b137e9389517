"""Triton kernels for gather_rows and scatter_rows. Contract and reference: ../permute.py."""

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Compilation, Options, allow_next_kernel, wait_for_inputs

# --- kernels: pointers end in _ptr; every block load is followed by its shape -----------


@triton.jit
def row_block(num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a program in a grid (cdiv(rows, ROWS) * cdiv(columns, COLUMNS),).

    Programs next to each other share their rows. Row indices are 64-bit before any product: 64k tokens * K 8
    * D 4096 is exactly 2**31 elements.
    """
    column_blocks = tl.cdiv(num_columns, COLUMNS)
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    return rows, columns


@triton.jit
def _gather_rows_kernel(
    x_ptr, token_ptr, out_ptr, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):
    """Grid (cdiv(N, ROWS) * cdiv(D, COLUMNS),): one block of the output."""
    n, d = row_block(D, ROWS, COLUMNS)
    wait_for_inputs(PDL)
    token = tl.load(token_ptr + n, mask=n < N, other=-1).to(tl.int64)  # [ROWS]
    inside = (token >= 0)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + (token[:, None] * D + d[None, :]), mask=inside, other=0.0)  # [ROWS, COLUMNS]
    allow_next_kernel(PDL)
    tl.store(out_ptr + (n[:, None] * D + d[None, :]), x, mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _scatter_rows_kernel(
    y_ptr,
    row_ptr,
    out_ptr,
    T,
    D,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(T, ROWS) * cdiv(D, COLUMNS),): one block of the output, k ascending."""
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    t, d = row_block(D, ROWS, COLUMNS)
    wait_for_inputs(PDL)
    out = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + (t * K + k), mask=t < T, other=-1).to(tl.int64)  # [ROWS]
        inside = (row >= 0)[:, None] & (d < D)[None, :]
        out += tl.load(y_ptr + (row[:, None] * D + d[None, :]), mask=inside, other=0.0).to(ACC)
    allow_next_kernel(PDL)
    offset = t[:, None] * D + d[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])


# --- launch choice: a pure function of sizes, so that it can be tested without a GPU ----


@dataclass(frozen=True, kw_only=True)
class RowLaunch:
    rows: int
    columns: int
    options: Options


def choose_launch(D: int, itemsize: int, sources: int) -> RowLaunch:
    """Blocks of whole 16-byte loads; `sources` is the number of rows that are summed into one.

    4 warps load 2 KB of each source at a time, and 8 KB of a single one, so that enough bytes are under way
    to hide the latency. Not measured on a GPU yet.
    """
    columns = min(max(triton.next_power_of_2(D), 512 // itemsize), 2048 // itemsize)
    block_bytes = max(8192 // triton.next_power_of_2(sources), 2048)
    return RowLaunch(rows=block_bytes // itemsize // columns, columns=columns, options=Options(num_warps=4))


# --- launchers --------------------------------------------------------------------------


def launch_gather_rows(x: Tensor, token: Tensor) -> Tensor:
    N, D = token.shape[0], x.shape[1]
    out = x.new_empty(N, D)
    if out.numel() == 0:
        return out
    launch = choose_launch(D, x.itemsize, 1)
    grid = (triton.cdiv(N, launch.rows) * triton.cdiv(D, launch.columns),)
    _gather_rows_kernel[grid](
        x, token, out, N, D, ROWS=launch.rows, COLUMNS=launch.columns, **launch.options.keywords()
    )
    return out


def launch_scatter_rows(y: Tensor, row: Tensor) -> Tensor:
    (T, K), D = row.shape, y.shape[1]
    out = y.new_empty(T, D)
    if out.numel() == 0:
        return out
    launch = choose_launch(D, y.itemsize, K)
    grid = (triton.cdiv(T, launch.rows) * triton.cdiv(D, launch.columns),)
    _scatter_rows_kernel[grid](
        y, row, out, T, D, K=K, ROWS=launch.rows, COLUMNS=launch.columns, **launch.options.keywords()
    )
    return out


# --- for compiling ahead of time --------------------------------------------------------

ITEMSIZES = {"bf16": 2, "fp32": 4}
MODELS_K = (1, 2, 4, 8, 10)


def launches(itemsize: int, sources: int) -> list[RowLaunch]:
    """Every launch that `choose_launch` gives for some D."""
    found = {choose_launch(2**power, itemsize, sources) for power in range(16)}
    return sorted(found, key=lambda launch: launch.columns)


def with_and_without_pdl(
    kernel: Any, dtype: str, signature: dict[str, str], constexprs: dict[str, Any], options: Options
) -> list[Compilation]:
    sizes = " ".join(f"{name}={value}" for name, value in constexprs.items())
    return [
        Compilation(
            kernel=kernel,
            label=f"{dtype} {sizes}{' pdl' if pdl else ''}",
            signature=signature,
            constexprs=constexprs,
            options=replace(options, pdl=pdl),
        )
        for pdl in (False, True)
    ]


def compilations() -> list[Compilation]:
    """Every configuration that `choose_launch` gives; K is any number, here those of known models."""
    found: list[Compilation] = []
    for dtype, itemsize in ITEMSIZES.items():
        gathered = {"x_ptr": f"*{dtype}", "token_ptr": "*i32", "out_ptr": f"*{dtype}", "N": "i32", "D": "i32"}
        scattered = {"y_ptr": f"*{dtype}", "row_ptr": "*i32", "out_ptr": f"*{dtype}", "T": "i32", "D": "i32"}
        for launch in launches(itemsize, 1):
            block = {"ROWS": launch.rows, "COLUMNS": launch.columns}
            found += with_and_without_pdl(_gather_rows_kernel, dtype, gathered, block, launch.options)
        for K in MODELS_K:
            for launch in launches(itemsize, K):
                block = {"K": K, "ROWS": launch.rows, "COLUMNS": launch.columns}
                found += with_and_without_pdl(_scatter_rows_kernel, dtype, scattered, block, launch.options)
    return found
