"""Jit helpers of the grouped kernels: which rows of which expert, and which columns, a program works on."""

import triton
import triton.language as tl


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
