"""Triton kernels for make_plan. Contract and reference: ../plan.py.

The N choices are cut into tiles. Three launches: count the experts of each tile; add up the counts of the
tiles before each tile; put every choice at the start of its expert + those before its tile + its rank in the
tile. The rank is counted by comparing a choice with all others of its tile, which is stable and needs no
atomics. A single tile is planned by one launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import MAX_EXPERTS, TILE_HEIGHTS
from .launch import Compilation, Options, allow_next_kernel, wait_for_inputs
from .permute import with_and_without_pdl

# --- kernels: pointers end in _ptr; every block load is followed by its shape -----------


@triton.jit
def _token_and_choice(tile, local, K, TILE: tl.constexpr):
    """(t, k) of the tile's choices `local`; t is 64-bit."""
    # 64-bit for the tile's first choice only: a division of 64 bits per choice would cost more than the sort
    first = tile.to(tl.int64) * TILE
    k = (first % K).to(tl.int32) + local
    return first // K + k // K, k % K


@triton.jit
def _load_experts(expert_ptr, tile, local, N, K, E, stride_t, stride_k, TILE: tl.constexpr):
    """Expert ids of the tile's choices `local`, int32; -1 for a dropped choice and past the last one."""
    t, k = _token_and_choice(tile, local, K, TILE)
    inside = tile.to(tl.int64) * TILE + local < N
    expert = tl.load(expert_ptr + (t * stride_t + k.to(tl.int64) * stride_k), mask=inside, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit
def _write_rows(
    expert_ptr,
    expert,
    first_row,
    kept,
    row_ptr,
    token_ptr,
    slot_ptr,
    tile,
    N,
    K,
    E,
    stride_t,
    stride_k,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write row, token and slot of a tile's choices, and -1 to those of its places that are left over.

    `first_row` [TILE] is the row of the first choice in the tile that has the same expert; `kept` is how many
    choices of all tiles are not dropped.
    """
    local = tl.arange(0, TILE)
    earlier = tl.zeros([TILE, STEP], dtype=tl.int32)
    for start in tl.static_range(0, TILE, STEP):
        other = start + tl.arange(0, STEP)
        other_expert = _load_experts(expert_ptr, tile, other, N, K, E, stride_t, stride_k, TILE)  # [STEP]
        same = other_expert[None, :] == expert[:, None]
        earlier += (same & (other[None, :] < local[:, None])).to(tl.int32)
    row = first_row + tl.sum(earlier, 1)
    is_kept = expert >= 0
    slot = tile.to(tl.int64) * TILE + local
    tl.store(row_ptr + slot, tl.where(is_kept, row, -1), mask=slot < N)
    t, _ = _token_and_choice(tile, local, K, TILE)
    tl.store(token_ptr + row.to(tl.int64), t.to(tl.int32), mask=is_kept)
    tl.store(slot_ptr + row.to(tl.int64), slot.to(tl.int32), mask=is_kept)
    left_over = (slot >= kept) & (slot < N)
    minus_one = tl.full([TILE], -1, dtype=tl.int32)
    tl.store(token_ptr + slot, minus_one, mask=left_over)
    tl.store(slot_ptr + slot, minus_one, mask=left_over)


@triton.jit
def _write_schedule(
    count, offset_ptr, tile_end_ptr, E, EXPERTS: tl.constexpr, HEIGHT: tl.constexpr, NUM_HEIGHTS: tl.constexpr
):
    """Prefix sums over the experts: of their rows, and of their tiles for HEIGHT, 2 HEIGHT, 4 HEIGHT, ..."""
    e = tl.arange(0, EXPERTS)
    tl.store(offset_ptr + e, tl.cumsum(count, 0), mask=e < E)
    for m in tl.static_range(NUM_HEIGHTS):
        # not (count + height - 1) // height, which overflows next to 2**31
        tiles = count // (HEIGHT << m) + (count % (HEIGHT << m) > 0).to(tl.int32)
        tl.store(tile_end_ptr + (m * E + e), tl.cumsum(tiles, 0), mask=e < E)


@triton.jit
def _single_tile_kernel(
    expert_ptr,
    row_ptr,
    token_ptr,
    slot_ptr,
    offset_ptr,
    tile_end_ptr,
    N,
    K,
    E,
    stride_t,
    stride_k,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    NUM_HEIGHTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (1,): the whole plan of at most TILE choices."""
    tile = tl.program_id(0)
    wait_for_inputs(PDL)
    expert = _load_experts(expert_ptr, tile, tl.arange(0, TILE), N, K, E, stride_t, stride_k, TILE)  # [TILE]
    is_kept = expert >= 0
    group = tl.where(is_kept, expert, 0)
    count = tl.histogram(group, EXPERTS, mask=is_kept)
    first_row = tl.gather(tl.cumsum(count, 0) - count, group, 0)
    kept = tl.sum(count, 0)
    # before the ranks, so that the counts and they need not be in registers at once
    _write_schedule(count, offset_ptr, tile_end_ptr, E, EXPERTS, HEIGHT, NUM_HEIGHTS)
    _write_rows(
        expert_ptr,
        expert,
        first_row,
        kept,
        row_ptr,
        token_ptr,
        slot_ptr,
        tile,
        N,
        K,
        E,
        stride_t,
        stride_k,
        TILE,
        STEP,
    )
    allow_next_kernel(PDL)


@triton.jit
def _count_kernel(
    expert_ptr,
    count_ptr,
    N,
    K,
    E,
    stride_t,
    stride_k,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles,): how often each expert was chosen in one tile; count is [tiles, E]."""
    tile = tl.program_id(0)
    wait_for_inputs(PDL)
    expert = _load_experts(expert_ptr, tile, tl.arange(0, TILE), N, K, E, stride_t, stride_k, TILE)  # [TILE]
    count = tl.histogram(tl.where(expert >= 0, expert, 0), EXPERTS, mask=expert >= 0)
    allow_next_kernel(PDL)
    e = tl.arange(0, EXPERTS)
    tl.store(count_ptr + (tile.to(tl.int64) * E + e), count, mask=e < E)


@triton.jit
def _scan_kernel(
    count_ptr,
    before_ptr,
    total_ptr,
    num_tiles,
    E,
    SCAN_TILES: tl.constexpr,
    SCAN_EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(E, SCAN_EXPERTS),): choices of each expert before each tile [tiles, E], in all tiles [E]."""
    e = tl.program_id(0).to(tl.int64) * SCAN_EXPERTS + tl.arange(0, SCAN_EXPERTS)
    total = tl.zeros([SCAN_EXPERTS], dtype=tl.int32)
    wait_for_inputs(PDL)
    start = 0
    while start < num_tiles:
        tile = start + tl.arange(0, SCAN_TILES)
        offset = tile.to(tl.int64)[:, None] * E + e[None, :]
        inside = (tile < num_tiles)[:, None] & (e < E)[None, :]
        count = tl.load(count_ptr + offset, mask=inside, other=0)  # [SCAN_TILES, SCAN_EXPERTS]
        tl.store(before_ptr + offset, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
        start += SCAN_TILES
    allow_next_kernel(PDL)
    tl.store(total_ptr + e, total, mask=e < E)


@triton.jit
def _place_kernel(
    expert_ptr,
    before_ptr,
    total_ptr,
    row_ptr,
    token_ptr,
    slot_ptr,
    offset_ptr,
    tile_end_ptr,
    num_tiles,
    N,
    K,
    E,
    stride_t,
    stride_k,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    NUM_HEIGHTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles + 1,): the rows of one tile; the last program writes offsets and schedule."""
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    wait_for_inputs(PDL)
    count = tl.load(total_ptr + e, mask=e < E, other=0)  # [EXPERTS]
    if tile == num_tiles:
        _write_schedule(count, offset_ptr, tile_end_ptr, E, EXPERTS, HEIGHT, NUM_HEIGHTS)
    else:
        local = tl.arange(0, TILE)
        expert = _load_experts(expert_ptr, tile, local, N, K, E, stride_t, stride_k, TILE)  # [TILE]
        is_kept = expert >= 0
        group = tl.where(is_kept, expert, 0)
        before = tl.load(before_ptr + (tile.to(tl.int64) * E + group), mask=is_kept, other=0)  # [TILE]
        first_row = tl.gather(tl.cumsum(count, 0) - count, group, 0) + before
        kept = tl.sum(count, 0)
        _write_rows(
            expert_ptr,
            expert,
            first_row,
            kept,
            row_ptr,
            token_ptr,
            slot_ptr,
            tile,
            N,
            K,
            E,
            stride_t,
            stride_k,
            TILE,
            STEP,
        )
    allow_next_kernel(PDL)


# --- launch choice: a pure function of sizes, so that it can be tested without a GPU ----


@dataclass(frozen=True, kw_only=True)
class PlanLaunch:
    """`tile` choices per program, compared with `step` others at a time; `experts` is E, padded."""

    num_tiles: int
    tile: int
    step: int
    experts: int
    scan_tiles: int
    scan_experts: int
    options: Options


def choose_launch(N: int, E: int) -> PlanLaunch:
    """Ranking costs more with larger tiles, counting with more of them. Not measured on a GPU yet."""
    tile = 256
    return PlanLaunch(
        num_tiles=triton.cdiv(N, tile),
        tile=tile,
        step=16,
        experts=max(triton.next_power_of_2(E), 128),
        scan_tiles=256,
        scan_experts=16,
        options=Options(num_warps=8),
    )


# --- launchers --------------------------------------------------------------------------


def launch_make_plan(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, K), E = expert.shape, num_experts
    N = T * K
    launch = choose_launch(N, E)
    tile = {"TILE": launch.tile}
    schedule = {"EXPERTS": launch.experts, "HEIGHT": TILE_HEIGHTS[0], "NUM_HEIGHTS": len(TILE_HEIGHTS)}
    keywords = launch.options.keywords()
    row = torch.empty((T, K), dtype=torch.int32, device=expert.device)
    token, slot = row.new_empty(N), row.new_empty(N)
    offset, tile_end = row.new_empty(E), row.new_empty(len(TILE_HEIGHTS), E)
    outputs = (row, token, slot, offset, tile_end)
    sizes = (N, K, E, *expert.stride())
    if launch.num_tiles <= 1:
        _single_tile_kernel[(1,)](expert, *outputs, *sizes, STEP=launch.step, **tile, **schedule, **keywords)
        return outputs
    count, before = row.new_empty(launch.num_tiles, E), row.new_empty(launch.num_tiles, E)
    total = row.new_empty(E)
    _count_kernel[(launch.num_tiles,)](expert, count, *sizes, EXPERTS=launch.experts, **tile, **keywords)
    _scan_kernel[(triton.cdiv(E, launch.scan_experts),)](
        count,
        before,
        total,
        launch.num_tiles,
        E,
        SCAN_TILES=launch.scan_tiles,
        SCAN_EXPERTS=launch.scan_experts,
        **keywords,
    )
    _place_kernel[(launch.num_tiles + 1,)](
        expert,
        before,
        total,
        *outputs,
        launch.num_tiles,
        *sizes,
        STEP=launch.step,
        **tile,
        **schedule,
        **keywords,
    )
    return outputs


# --- for compiling ahead of time --------------------------------------------------------


def compilations() -> list[Compilation]:
    """Every configuration that `choose_launch` gives, for both integer types of the expert ids."""
    outputs = dict.fromkeys(("row_ptr", "token_ptr", "slot_ptr", "offset_ptr", "tile_end_ptr"), "*i32")
    sizes = dict.fromkeys(("N", "K", "E", "stride_t", "stride_k"), "i32")
    schedule = {"HEIGHT": TILE_HEIGHTS[0], "NUM_HEIGHTS": len(TILE_HEIGHTS)}
    choices = {choose_launch(2**16, E) for E in range(1, MAX_EXPERTS + 1)}
    found: list[Compilation] = []
    for launch in sorted(choices, key=lambda launch: launch.experts):
        counting = {"TILE": launch.tile, "EXPERTS": launch.experts}
        placing = {**counting, "STEP": launch.step, **schedule}
        for ids in ("i32", "i64"):
            expert = {"expert_ptr": f"*{ids}"}
            scratch = {"before_ptr": "*i32", "total_ptr": "*i32"}
            single = {**expert, **outputs, **sizes}
            count = {**expert, "count_ptr": "*i32", **sizes}
            place = {**expert, **scratch, **outputs, "num_tiles": "i32", **sizes}
            found += with_and_without_pdl(_single_tile_kernel, ids, single, placing, launch.options)
            found += with_and_without_pdl(_count_kernel, ids, count, counting, launch.options)
            found += with_and_without_pdl(_place_kernel, ids, place, placing, launch.options)
    scan = {"count_ptr": "*i32", "before_ptr": "*i32", "total_ptr": "*i32", "num_tiles": "i32", "E": "i32"}
    steps = {"SCAN_TILES": launch.scan_tiles, "SCAN_EXPERTS": launch.scan_experts}
    return found + with_and_without_pdl(_scan_kernel, "i32", scan, steps, launch.options)
