"""Helpers of the grouped kernels: which rows of which expert, and which columns, a program works on.

Also the experts' matrices by descriptors for the tensor memory accelerator (TMA).
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def swizzle(program, num_tiles, num_blocks, GROUP: tl.constexpr):
    """(row tile, column block) of a program: GROUP row tiles in turn share a block while that is cached."""
    width = GROUP * num_blocks
    first = (program // width) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    return first + (program % width) % size, (program % width) // size


@triton.jit
def row_tile(tile, offset_ptr, tile_end_ptr, N, E, HEIGHT: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile of HEIGHT rows; first and end are 64-bit.

    `tile_end_ptr` is RoutingPlan.tile_end_ME's line for HEIGHT. Expert E stands for the rows past the last
    expert's; a tile behind those has no rows: its first row is not below the end.
    """
    e = tl.arange(0, EXPERTS)
    tile_end = tl.load(tile_end_ptr + e, mask=e < E, other=2147483647)  # [EXPERTS]
    expert = tl.sum((tile_end <= tile).to(tl.int32), 0)
    has_previous = expert > 0
    first_tile = tl.load(tile_end_ptr + (expert - 1), mask=has_previous, other=0)
    first_row = tl.load(offset_ptr + (expert - 1), mask=has_previous, other=0)
    end_row = tl.load(offset_ptr + expert, mask=expert < E, other=N)
    return expert, first_row.to(tl.int64) + (tile - first_tile).to(tl.int64) * HEIGHT, end_row.to(tl.int64)


@triton.jit
def expert_rows(expert, offset_ptr):
    """(first row, end) of an expert's rows, 64-bit."""
    first = tl.load(offset_ptr + (expert - 1), mask=expert > 0, other=0)
    return first.to(tl.int64), tl.load(offset_ptr + expert).to(tl.int64)


@triton.jit
def matrix_tile(
    desc, expert, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """[ROWS, COLUMNS] of an expert's matrix, or its transpose; 0 outside of the matrix."""
    tile = desc.load([expert, row, column]).reshape(ROWS, COLUMNS)
    return tile.trans() if TRANSPOSED else tile


def describable(weight: Tensor) -> bool:
    """Whether a descriptor can hold contiguous matrices, which must be `aligned_to_16` besides.

    Its sizes and coordinates have 31 bits, its strides, of which the first is the largest, 40 bits of bytes.
    """
    fits = all(0 < size < 2**31 for size in weight.shape)
    return fits and math.prod(weight.shape[1:]) * weight.itemsize < 2**40


def matrix_descriptor(weight: Tensor, shape: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """Of contiguous weight viewed as shape, for loads of blocks.

    The strides are the shape's, because those of a tensor may be anything where its size is 1.
    """
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return TensorDescriptor(weight, list(shape), strides, list(block))


def descriptor_type(dtype: str, block: Sequence[int]) -> str:
    """Triton's type of a descriptor, for compiling ahead of time."""
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}]>"
