"""Triton kernels for grouped_gemm's gradients in weight and bias. Contract and reference: ../grouped_gemm.py.

A program owns a block of one expert's gradient and goes through the expert's rows in order, so that nothing
is added by two programs; an expert without rows gets its zeros from the same kernel. A gradient in weight can
instead be added to a float32 main gradient: the program that owns a block loads it, adds and stores it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import triton
import triton.language as tl
from torch import Tensor

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
from .tiles import expert_rows, swizzle
from .tuned import Case, measured_first, tuned_compilations

# --- kernels: pointers end in _ptr; every block load is followed by its shape -----------


@triton.jit
def _weight_grad_kernel(
    grad_ptr,
    grad_token_ptr,
    x_ptr,
    x_token_ptr,
    dweight_ptr,
    offset_ptr,
    O,
    I,
    GATHER_GRAD: tl.constexpr,
    GATHER_X: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (E * cdiv(O, BLOCK_O) * cdiv(I, BLOCK_I),): a block of dweight[e] = sum of grad[n]^T x[n].

    ADD: dweight[e] += that sum, and the block of an expert without rows is neither read nor written.
    """
    blocks_o, blocks_i = tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I)
    per_expert = blocks_o * blocks_i
    expert = tl.program_id(0) // per_expert
    block_o, block_i = swizzle(tl.program_id(0) % per_expert, blocks_o, blocks_i, GROUP)
    o = block_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = block_i.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    wait_for_inputs(PDL)
    first, end = expert_rows(expert, offset_ptr)
    num_rows = (end - first).to(tl.int32)
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        local = start + tl.arange(0, BLOCK_R)
        n = first + local
        valid = local < num_rows
        grad_row, x_row = n, n
        if GATHER_GRAD:
            grad_row = tl.load(grad_token_ptr + n, mask=valid, other=0).to(tl.int64)  # [BLOCK_R]
        if GATHER_X:
            x_row = tl.load(x_token_ptr + n, mask=valid, other=0).to(tl.int64)  # [BLOCK_R]
        grad_at = grad_ptr + (grad_row[None, :] * O + o[:, None])
        grad = tl.load(grad_at, mask=valid[None, :] & (o < O)[:, None], other=0.0)  # [BLOCK_O, BLOCK_R]
        x_at = x_ptr + (x_row[:, None] * I + i[None, :])
        x = tl.load(x_at, mask=valid[:, None] & (i < I)[None, :], other=0.0)  # [BLOCK_R, BLOCK_I]
        acc = tl.dot(grad, x, acc, input_precision="ieee")
    allow_next_kernel(PDL)
    at = expert.to(tl.int64) * O * I + (o[:, None] * I + i[None, :])
    inside = (o < O)[:, None] & (i < I)[None, :]
    if ADD:
        inside &= num_rows > 0
        acc += tl.load(dweight_ptr + at, mask=inside, other=0.0)  # [BLOCK_O, BLOCK_I]
    tl.store(dweight_ptr + at, acc.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_grad_kernel(
    grad_ptr,
    token_ptr,
    slot_ptr,
    scale_ptr,
    dbias_ptr,
    offset_ptr,
    O,
    GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (E, cdiv(O, BLOCK_O)): a block of dbias[e] = sum of scale[slot[n]] * grad[n] over its rows n."""
    expert = tl.program_id(0)
    o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    wait_for_inputs(PDL)
    first, end = expert_rows(expert, offset_ptr)
    num_rows = (end - first).to(tl.int32)
    acc = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        local = start + tl.arange(0, BLOCK_R)
        n = first + local
        valid = local < num_rows
        row = n
        if GATHER:
            row = tl.load(token_ptr + n, mask=valid, other=0).to(tl.int64)  # [BLOCK_R]
        mask = valid[:, None] & (o < O)[None, :]
        grad = tl.load(grad_ptr + (row[:, None] * O + o[None, :]), mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            slot = tl.load(slot_ptr + n, mask=valid, other=0).to(tl.int64)  # [BLOCK_R]
            grad *= tl.load(scale_ptr + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
        acc += grad
    allow_next_kernel(PDL)
    dbias = tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty)
    tl.store(dbias_ptr + (expert.to(tl.int64) * O + o), dbias, mask=o < O)


# --- launch choice: a pure function of sizes, so that it can be tested without a GPU ----


@dataclass(frozen=True, kw_only=True)
class WeightGradLaunch:
    """Blocks of `block_o` by `block_i` entries of a gradient, `block_r` rows at a time."""

    block_o: int
    block_i: int
    block_r: int
    group: int
    options: Options


@measured_first
def choose_launch(itemsize: int, *, aligned: bool, family: str, add: bool = False) -> WeightGradLaunch:
    """From compile checks; not yet measured on a GPU.

    Args:
        itemsize: bytes of an element, 2 or 4.
        aligned: rows start where 16 bytes can be loaded at once; others are loaded element by element.
        family: of `device_family`.
        add: to a main gradient, whose block is in registers beside the sum: 256 columns would be spilled.
    """
    if itemsize == 4 or not aligned:
        return WeightGradLaunch(
            block_o=64,
            block_i=64,
            block_r=32 if aligned else 16,
            group=4,
            options=Options(num_warps=4, num_stages=2 if aligned else 1),
        )
    wide = family in SINCE_HOPPER
    return WeightGradLaunch(
        block_o=128,
        block_i=256 if wide and not add else 128,
        block_r=64 if wide else 32,
        group=4,
        options=Options(num_warps=8, num_stages=2 if family == "hip" else 3),
    )


MEASURED = "grouped_wgrad gathered x"  # what the table has: the gradient of an up-projection
BIAS_BLOCK_O, BIAS_BLOCK_R = 128, 16
BIAS_OPTIONS = Options(num_warps=4)

# --- launchers --------------------------------------------------------------------------


def grouped_weight_grad(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    *,
    grad_token: Tensor | None = None,
    x_token: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """sum of grad[n]^T x[n] over the rows n of each expert, [E, O, I]; a token index gathers that operand.

    With a float32 `main_grad` the sum is added to it, and what is returned has 0 elements.
    """
    check_16_or_32_bits("grouped_gemm", x)
    E, O, I = offset.shape[0], grad.shape[1], x.shape[1]
    dweight = x.new_empty((E, O, I) if main_grad is None else 0)
    out = dweight if main_grad is None else main_grad
    if out.numel() == 0:
        return dweight
    aligned = aligned_to_16((I, O), grad, x, out)
    add, family = main_grad is not None, device_family(x.device)
    case = Case(MEASURED, I, O, E, grad.shape[0]) if x_token is not None and not add else None
    launch = choose_launch(x.itemsize, aligned=aligned, family=family, add=add, case=case)
    blocks = triton.cdiv(O, launch.block_o) * triton.cdiv(I, launch.block_i)
    _weight_grad_kernel[(E * blocks,)](
        grad,
        grad_token,
        x,
        x_token,
        out,
        offset,
        O,
        I,
        GATHER_GRAD=grad_token is not None,
        GATHER_X=x_token is not None,
        ADD=add,
        BLOCK_O=launch.block_o,
        BLOCK_I=launch.block_i,
        BLOCK_R=launch.block_r,
        GROUP=launch.group,
        **launch.options.keywords(),
    )
    return dweight


def grouped_bias_grad(
    grad: Tensor,
    offset: Tensor,
    *,
    token: Tensor | None = None,
    slot: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """sum of grad[n] over the rows n of each expert, [E, O]; with `scale`, each row times scale[slot[n]]."""
    check_16_or_32_bits("grouped_gemm", grad)
    E, O = offset.shape[0], grad.shape[1]
    dbias = grad.new_empty(E, O)
    if dbias.numel() == 0:
        return dbias
    _bias_grad_kernel[(E, triton.cdiv(O, BIAS_BLOCK_O))](
        grad,
        token,
        slot,
        scale,
        dbias,
        offset,
        O,
        GATHER=token is not None,
        SCALE=scale is not None,
        BLOCK_O=BIAS_BLOCK_O,
        BLOCK_R=BIAS_BLOCK_R,
        **BIAS_OPTIONS.keywords(),
    )
    return dbias


def launch_weight_grad(grad: Tensor, x: Tensor, offset: Tensor) -> Tensor:
    return grouped_weight_grad(grad, x, offset)


def launch_gathered_weight_grad(grad: Tensor, x: Tensor, token: Tensor, offset: Tensor) -> Tensor:
    return grouped_weight_grad(grad, x, offset, x_token=token)


def launch_add_weight_grad(grad: Tensor, x: Tensor, main_grad: Tensor, offset: Tensor) -> None:
    grouped_weight_grad(grad, x, offset, main_grad=main_grad)


def launch_gathered_add_weight_grad(
    grad: Tensor, x: Tensor, token: Tensor, main_grad: Tensor, offset: Tensor
) -> None:
    grouped_weight_grad(grad, x, offset, x_token=token, main_grad=main_grad)


def launch_bias_grad(grad: Tensor, offset: Tensor) -> Tensor:
    return grouped_bias_grad(grad, offset)


def compilations() -> list[Compilation]:
    """Every configuration that `choose_launch` gives, with neither or one operand gathered."""
    return for_families(_compilations) + tuned_compilations(MEASURED, WeightGradLaunch, _measured)


def _measured(launch: WeightGradLaunch) -> Iterator[Compilation]:
    for dtype in ("bf16", "fp16"):
        yield _weight_compilation(dtype, launch, "x", True, add=False, pdl=False)


def _compilations(family: str) -> Iterator[Compilation]:
    for (dtype, itemsize), aligned, add in product(ITEMSIZES.items(), (True, False), (False, True)):
        launch = choose_launch(itemsize, aligned=aligned, family=family, add=add)
        for gathered, pdl in product((None, "grad", "x"), (False, True)):
            yield _weight_compilation(dtype, launch, gathered, aligned, add=add, pdl=pdl)
    for dtype, scaled, pdl in product(ITEMSIZES, (False, True), (False, True)):
        yield _bias_compilation(dtype, scaled, pdl=pdl)


def _weight_compilation(
    dtype: str, launch: WeightGradLaunch, gathered: str | None, aligned: bool, *, add: bool, pdl: bool
) -> Compilation:
    pointer = f"*{dtype}"
    signature = {
        "grad_ptr": pointer,
        "grad_token_ptr": "*i32" if gathered == "grad" else "constexpr",
        "x_ptr": pointer,
        "x_token_ptr": "*i32" if gathered == "x" else "constexpr",
        "dweight_ptr": "*fp32" if add else pointer,
        "offset_ptr": "*i32",
        **dict.fromkeys(("O", "I"), "i32"),
    }
    size = f"{launch.block_o}x{launch.block_i}x{launch.block_r}"
    what = f"{f'gathered {gathered}' if gathered else 'plain'}{' added' if add else ''}"
    return Compilation(
        kernel=_weight_grad_kernel,
        label=f"{dtype} {size} {what}{'' if aligned else ' odd'}{' pdl' if pdl else ''}",
        signature=signature,
        constexprs={
            **{name: None for name, type_ in signature.items() if type_ == "constexpr"},
            "GATHER_GRAD": gathered == "grad",
            "GATHER_X": gathered == "x",
            "ADD": add,
            "BLOCK_O": launch.block_o,
            "BLOCK_I": launch.block_i,
            "BLOCK_R": launch.block_r,
            "GROUP": launch.group,
        },
        options=replace(launch.options, pdl=pdl),
        divisible=("O", "I", "grad_ptr", "x_ptr", "dweight_ptr") if aligned else (),
    )


def _bias_compilation(dtype: str, scaled: bool, *, pdl: bool) -> Compilation:
    """`scaled` is the gradient of a down-projection's bias: rows gathered and times their gate."""
    signature = {
        "grad_ptr": f"*{dtype}",
        "token_ptr": "*i32" if scaled else "constexpr",
        "slot_ptr": "*i32" if scaled else "constexpr",
        "scale_ptr": "*fp32" if scaled else "constexpr",
        "dbias_ptr": f"*{dtype}",
        "offset_ptr": "*i32",
        "O": "i32",
    }
    return Compilation(
        kernel=_bias_grad_kernel,
        label=f"{dtype}{' scaled' if scaled else ''}{' pdl' if pdl else ''}",
        signature=signature,
        constexprs={
            **{name: None for name, type_ in signature.items() if type_ == "constexpr"},
            "GATHER": scaled,
            "SCALE": scaled,
            "BLOCK_O": BIAS_BLOCK_O,
            "BLOCK_R": BIAS_BLOCK_R,
        },
        options=replace(BIAS_OPTIONS, pdl=pdl),
    )
