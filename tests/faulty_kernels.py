"""Kernels with one fault each, and one without, for the tests of `benchmarks/aot.py`."""

import triton
import triton.language as tl
from moe_runtime_kernels._triton.launch import (
    FAMILIES,
    Compilation,
    Options,
    allow_next_kernel,
    wait_for_inputs,
)


@triton.jit
def _faultless_kernel(x_ptr, row_ptr, out_ptr, D, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Every way of making an address that is allowed: also in a loop, and with indices that were loaded."""
    t = tl.program_id(0)
    wait_for_inputs(PDL)
    row = tl.load(row_ptr + t).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    start = 0
    while start < D:
        d = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        start += BLOCK
    column_block = t % (tl.cdiv(D, BLOCK) * D) % tl.cdiv(D, BLOCK)
    allow_next_kernel(PDL)
    tl.store(out_ptr + t.to(tl.int64) * BLOCK + column_block * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + d)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(x_ptr + d, x / tl.sum(x, 0))


@triton.jit
def _atomic_kernel(x_ptr, row_ptr, out_ptr, PDL: tl.constexpr):
    tl.atomic_add(out_ptr + tl.load(row_ptr), tl.load(x_ptr))


@triton.jit
def _row_times_size_kernel(x_ptr, D, BLOCK: tl.constexpr, PDL: tl.constexpr):
    offset = tl.program_id(0) * D + tl.arange(0, BLOCK)
    tl.store(x_ptr + offset.to(tl.int64), 0.0)


@triton.jit
def _flat_index_kernel(x_ptr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 0.0)


@triton.jit
def _loaded_times_constant_kernel(x_ptr, row_ptr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    tl.store(x_ptr + tl.load(row_ptr + tl.program_id(0)) * WIDTH, 0.0)


@triton.jit
def _carried_product_kernel(x_ptr, D, steps, PDL: tl.constexpr):
    """The product is carried round the loop before it is an offset."""
    offset, i = 0, 0
    while i < steps:
        tl.store(x_ptr + offset, 0.0)
        offset = tl.program_id(0) * D
        i += 1


@triton.jit
def _never_waiting_kernel(x_ptr, PDL: tl.constexpr):
    tl.store(x_ptr, 0.0)


@triton.jit
def _uncompilable_kernel(x_ptr, PDL: tl.constexpr):
    tl.static_assert(PDL, "only with PDL")


@triton.jit
def _forgotten_kernel(x_ptr, PDL: tl.constexpr):
    tl.store(x_ptr, 0.0)


def compilations() -> list[Compilation]:
    x, row, out, size = {"x_ptr": "*fp32"}, {"row_ptr": "*i32"}, {"out_ptr": "*fp32"}, {"D": "i32"}
    found = [
        (_faultless_kernel, {**x, **row, **out, **size}, {"BLOCK": 128}, Options()),
        (_faultless_kernel, {**x, **row, **out, **size}, {"BLOCK": 128}, Options(pdl=True)),
        (_spilling_kernel, x, {"BLOCK": 8192}, Options(num_warps=1)),
        (_atomic_kernel, {**x, **row, **out}, {}, Options()),
        (_row_times_size_kernel, {**x, **size}, {"BLOCK": 128}, Options()),
        (_flat_index_kernel, x, {"BLOCK": 128}, Options()),
        (_loaded_times_constant_kernel, {**x, **row}, {"WIDTH": 4096}, Options()),
        (_carried_product_kernel, {**x, **size, "steps": "i32"}, {}, Options()),
        (_never_waiting_kernel, x, {}, Options(pdl=True)),
        (_uncompilable_kernel, x, {}, Options()),
    ]
    return [
        Compilation(
            kernel=kernel,
            label="pdl" if options.pdl else "plain",
            signature=signature,
            constexprs=constexprs,
            options=options,
            # a kernel that spills on AMD's 512 registers takes the compiler minutes
            families=("cuda90",) if kernel is _spilling_kernel else FAMILIES,
        )
        for kernel, signature, constexprs, options in found
    ]
