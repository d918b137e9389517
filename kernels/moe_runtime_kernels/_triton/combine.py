"""Triton kernels for combine. Contract and reference: ../combine.py."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Compilation, Options, allow_next_kernel, wait_for_inputs
from .permute import ITEMSIZES, MODELS_K, launches, row_block, with_and_without_pdl
from .permute import choose_launch as choose_forward_launch

# --- kernels: pointers end in _ptr; every block load is followed by its shape -----------


@triton.jit
def _combine_kernel(
    y_ptr,
    weight_ptr,
    row_ptr,
    residual_ptr,
    addend_ptr,
    out_ptr,
    T,
    D,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(T, ROWS) * cdiv(D, COLUMNS),): one block of the output. Residual and addend may be None."""
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    t, d = row_block(D, ROWS, COLUMNS)
    offset = t[:, None] * D + d[None, :]
    inside = (t < T)[:, None] & (d < D)[None, :]
    wait_for_inputs(PDL)
    out = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + (t * K + k), mask=t < T, other=-1).to(tl.int64)  # [ROWS]
        weight = tl.load(weight_ptr + (t * K + k), mask=t < T, other=0.0).to(ACC)  # [ROWS]
        kept = (row >= 0)[:, None] & (d < D)[None, :]
        y = tl.load(y_ptr + (row[:, None] * D + d[None, :]), mask=kept, other=0.0)  # [ROWS, COLUMNS]
        out += weight[:, None] * y.to(ACC)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(ACC)  # [ROWS, COLUMNS]
    if addend_ptr is not None:
        out += tl.load(addend_ptr + offset, mask=inside, other=0.0).to(ACC)  # [ROWS, COLUMNS]
    allow_next_kernel(PDL)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine_backward_kernel(
    grad_ptr,
    y_ptr,
    weight_ptr,
    row_ptr,
    token_ptr,
    dy_ptr,
    dweight_ptr,
    D,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T,): dy of a token's rows and its K dweight, reading the token's gradient once.

    The rows left over at the end belong to no token: program t writes those among t * K ... t * K + K - 1.
    """
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, CHOICES)
    slot = t * K + k
    wait_for_inputs(PDL)
    row = tl.load(row_ptr + slot, mask=k < K, other=-1).to(tl.int64)  # [CHOICES]
    weight = tl.load(weight_ptr + slot, mask=k < K, other=0.0).to(ACC)  # [CHOICES]
    left_over = tl.load(token_ptr + slot, mask=k < K, other=0) < 0  # [CHOICES]
    dot = tl.zeros([CHOICES, COLUMNS], dtype=ACC)
    start = 0
    while start < D:
        # what the compiler knows of a loop counter it finds out in `for` loops only
        d = tl.multiple_of(start, COLUMNS) + tl.arange(0, COLUMNS)
        grad = tl.load(grad_ptr + (t * D + d), mask=d < D, other=0.0).to(ACC)  # [COLUMNS]
        offset = row[:, None] * D + d[None, :]
        kept = (row >= 0)[:, None] & (d < D)[None, :]
        dot += grad[None, :] * tl.load(y_ptr + offset, mask=kept, other=0.0).to(ACC)  # [CHOICES, COLUMNS]
        dy = (weight[:, None] * grad[None, :]).to(dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + offset, dy, mask=kept)
        start += COLUMNS
    if tl.sum(left_over.to(tl.int32), 0) > 0:
        start = 0
        while start < D:
            d = tl.multiple_of(start, COLUMNS) + tl.arange(0, COLUMNS)
            zeros = tl.zeros([CHOICES, COLUMNS], dtype=dy_ptr.dtype.element_ty)
            unused = left_over[:, None] & (d < D)[None, :]
            tl.store(dy_ptr + (slot[:, None] * D + d[None, :]), zeros, mask=unused)
            start += COLUMNS
    allow_next_kernel(PDL)
    dweight = tl.where(row >= 0, tl.sum(dot, 1), 0.0)
    tl.store(dweight_ptr + slot, dweight.to(dweight_ptr.dtype.element_ty), mask=k < K)


# --- launch choice: a pure function of sizes, so that it can be tested without a GPU ----


@dataclass(frozen=True, kw_only=True)
class BackwardLaunch:
    """`choices` is K, padded to a power of two."""

    choices: int
    columns: int
    options: Options


def choose_backward_launch(D: int, itemsize: int, K: int) -> BackwardLaunch:
    """8 KB of a token's rows at a time, no more than 2 KB of each. Not measured on a GPU yet.

    4 KB of more than 8 rows: AMD's scalar registers would not hold the masks of more.
    """
    choices = triton.next_power_of_2(K)
    step_bytes = 8192 if choices <= 8 else 4096
    widest = max(min(step_bytes // choices, 2048) // itemsize, 16)
    columns = min(max(triton.next_power_of_2(D), 512 // itemsize), widest)
    return BackwardLaunch(choices=choices, columns=columns, options=Options(num_warps=4))


# --- launchers --------------------------------------------------------------------------


def launch_combine(
    y: Tensor, weight: Tensor, row: Tensor, residual: Tensor | None, addend: Tensor | None
) -> Tensor:
    (T, K), D = row.shape, y.shape[1]
    out = (y if residual is None else residual).new_empty(T, D)
    if out.numel() == 0:
        return out
    launch = choose_forward_launch(D, y.itemsize, K)
    grid = (triton.cdiv(T, launch.rows) * triton.cdiv(D, launch.columns),)
    _combine_kernel[grid](
        y,
        weight,
        row,
        residual,
        addend,
        out,
        T,
        D,
        K=K,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        **launch.options.keywords(),
    )
    return out


def launch_combine_backward(
    grad_out: Tensor, y: Tensor, weight: Tensor, row: Tensor, token: Tensor, slot: Tensor
) -> tuple[Tensor, Tensor]:
    (T, K), D = row.shape, y.shape[1]
    dy, dweight = torch.empty_like(y), torch.empty_like(weight)
    if T == 0:
        return dy, dweight
    launch = choose_backward_launch(D, y.itemsize, K)
    _combine_backward_kernel[(T,)](
        grad_out,
        y,
        weight,
        row,
        token,
        dy,
        dweight,
        D,
        K=K,
        CHOICES=launch.choices,
        COLUMNS=launch.columns,
        **launch.options.keywords(),
    )
    return dy, dweight


# --- for compiling ahead of time --------------------------------------------------------


def compilations() -> list[Compilation]:
    """Every configuration that the launch choices give; K is any number, here those of known models."""
    found: list[Compilation] = []
    for dtype, itemsize in ITEMSIZES.items():
        tensor = f"*{dtype}"
        operands = {"y_ptr": tensor, "weight_ptr": "*fp32", "row_ptr": "*i32"}
        added = {"residual_ptr": tensor, "addend_ptr": tensor}
        outputs = {"out_ptr": tensor, "T": "i32", "D": "i32"}
        forward = {**operands, **added, **outputs}
        gradients = {"dy_ptr": tensor, "dweight_ptr": "*fp32", "D": "i32"}
        backward = {"grad_ptr": tensor, **operands, "token_ptr": "*i32", **gradients}
        for K in MODELS_K:
            for launch in launches(itemsize, K):
                block = {"K": K, "ROWS": launch.rows, "COLUMNS": launch.columns}
                found += with_and_without_pdl(_combine_kernel, dtype, forward, block, launch.options)
            # and without the optional operands, for the widest rows
            alone = {**block, **dict.fromkeys(added)}
            found += with_and_without_pdl(
                _combine_kernel, dtype, {**operands, **outputs}, alone, launch.options
            )
            steps = {choose_backward_launch(2**power, itemsize, K) for power in range(16)}
            for step in sorted(steps, key=lambda step: step.columns):
                block = {"K": K, "CHOICES": step.choices, "COLUMNS": step.columns}
                found += with_and_without_pdl(_combine_backward_kernel, dtype, backward, block, step.options)
    return found
