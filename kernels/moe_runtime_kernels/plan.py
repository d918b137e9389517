"""make_plan: where each (token, choice) goes when rows are sorted by expert.

    row_TK[t, k]   position of choice k of token t in expert order      token_N[n]   token of row n
    offset_E[e]    end of expert e's rows; its start is offset_E[e-1]   slot_N[n]    t * K + k of row n

A stable counting sort: within one expert, rows keep the order of (t, k). A choice outside 0..E-1 is dropped:
its `row_TK` is -1, and the N - offset_E[E-1] rows left over at the end have `token_N = slot_N = -1`.

    tile_end_ME[m, e]    sum over experts 0..e of cdiv(their rows, TILE_HEIGHTS[m])

is the schedule of a grouped product whose tiles have so many rows, of one expert each: program p finds its
expert as the number of entries <= p, and stops where that is E. `tile_bound` says how many programs suffice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._checks import INTEGERS, check_device, check_dims, check_dtype, check_shape
from ._dispatch import is_plain, register_kernel, register_reference

TILE_HEIGHTS = (16, 32, 64, 128)  # each twice the one before: the kernel relies on it
MAX_EXPERTS = 1024  # a program of the kernel holds the counts of all experts
_HEIGHT_M1 = torch.tensor(TILE_HEIGHTS, dtype=torch.int32, device="cpu")[:, None]


class RoutingPlan(NamedTuple):
    """Where each (token, choice) goes; int32, made once per layer by `make_plan` and passed whole."""

    row_TK: Tensor
    token_N: Tensor
    slot_N: Tensor
    offset_E: Tensor
    tile_end_ME: Tensor


def tile_bound(num_rows: int, num_experts: int, height: int) -> int:
    """Most tiles of `height` rows, of one expert each, that any routing of so many rows can need.

    From shapes alone, so that a launch needs no device value. Reached when all experts but one have one row.
    """
    if num_rows < num_experts:
        return num_rows
    return (num_rows - num_experts) // height + num_experts


# --- contract: schema and output shapes, known before any graph is captured -------------

torch.library.define(
    "moe_runtime::make_plan",
    "(Tensor expert, int num_experts)"
    " -> (Tensor row, Tensor token, Tensor slot, Tensor offset, Tensor tile_end)",
)
_make_plan = torch.ops.moe_runtime.make_plan.default


@torch.library.register_fake("moe_runtime::make_plan")
def _(expert, num_experts):
    row = torch.empty_like(expert, dtype=torch.int32, memory_format=torch.contiguous_format)
    parts = (row.new_empty(size) for size in (row.numel(), row.numel(), num_experts))
    return row, *parts, row.new_empty(len(TILE_HEIGHTS), num_experts)


# --- reference: the definition, in the plainest PyTorch ---------------------------------


def make_plan_reference(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, K = expert_TK.shape
    expert_N, device = expert_TK.flatten(), expert_TK.device
    sorted_N, slot_N = expert_N.sort(stable=True)
    any_dropped = T > 0 and (int(sorted_N[0]) < 0 or int(sorted_N[-1]) >= num_experts)
    if any_dropped:
        kept_N = (expert_N >= 0) & (expert_N < num_experts)
        sorted_N, slot_N = torch.where(kept_N, expert_N, num_experts).sort(stable=True)
    expert_E = torch.arange(num_experts, dtype=sorted_N.dtype, device=device)
    start_E = torch.searchsorted(sorted_N, expert_E, out_int32=True)
    offset_E = torch.searchsorted(sorted_N, expert_E, right=True, out_int32=True)
    tiles_ME = -((start_E - offset_E) // _HEIGHT_M1.to(device))  # rounded up
    position_N = torch.arange(T * K, dtype=torch.int32, device=device)
    row_N = torch.empty_like(position_N).scatter_(0, slot_N, position_N)  # the inverse of slot_N
    slot_N = slot_N.int()
    token_N = slot_N // K
    if any_dropped:
        row_N = row_N.masked_fill(~kept_N, -1)
        dropped_N = sorted_N == num_experts
        slot_N, token_N = slot_N.masked_fill(dropped_N, -1), token_N.masked_fill(dropped_N, -1)
    return row_N.view(T, K), token_N, slot_N, offset_E, tiles_ME.cumsum(1, dtype=torch.int32)


# --- CPU: compiled where it can be ------------------------------------------------------


@register_reference("moe_runtime::make_plan")
def _make_plan_cpu(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = _native.plan(expert_TK, num_experts, TILE_HEIGHTS) if is_plain(expert_TK) else None
    return make_plan_reference(expert_TK, num_experts) if parts is None else parts


# --- GPU: Triton is imported by the first launch, never by `import` ---------------------

register_kernel("moe_runtime::make_plan", "plan", "launch_make_plan")


# --- the public function; integers have no gradient -------------------------------------


def make_plan(expert_TK: Tensor, num_experts: int) -> RoutingPlan:
    """Sort the chosen (token, expert) pairs by expert, stably.

    Args:
        expert_TK: chosen experts, int32 or int64, any strides; an id outside 0..num_experts-1 is dropped.
        num_experts: E, from 1 to 1024.

    Returns:
        RoutingPlan of row_TK, token_N, slot_N, offset_E and tile_end_ME, int32, with N = T * K.

    Raises:
        ValueError: an argument has the wrong axes or dtype, or T * K does not fit int32.
    """
    check_dims("make_plan", "expert", expert_TK, "(T, K)")
    check_dtype("make_plan", "expert", expert_TK, INTEGERS)
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"make_plan: num_experts must be from 1 to {MAX_EXPERTS}, got {num_experts}")
    if expert_TK.shape[1] < 1:
        raise ValueError(
            f"make_plan: expert must have at least 1 choice per token, got shape {tuple(expert_TK.shape)}"
        )
    if expert_TK.numel() >= 2**31:
        raise ValueError(f"make_plan: expert must have fewer than 2**31 elements, got {expert_TK.numel()}")
    return RoutingPlan(*_make_plan(expert_TK.detach(), num_experts))


def check_plan(op: str, plan: RoutingPlan, device: torch.device) -> tuple[int, int]:
    """Check that a plan's parts agree with each other and live on `device`; returns its (T, K)."""
    if not isinstance(plan, RoutingPlan):
        raise ValueError(f"{op}: plan must be a RoutingPlan as make_plan returns, got {type(plan).__name__}")
    check_dims(op, "plan.row_TK", plan.row_TK, "(T, K)")
    check_dims(op, "plan.offset_E", plan.offset_E, "(E,)")
    T, K = plan.row_TK.shape
    E, M = plan.offset_E.shape[0], len(TILE_HEIGHTS)
    check_shape(op, "plan.token_N", plan.token_N, (T * K,), "(T*K,)")
    check_shape(op, "plan.slot_N", plan.slot_N, (T * K,), "(T*K,)")
    check_shape(op, "plan.tile_end_ME", plan.tile_end_ME, (M, E), "(M, E)")
    for name in RoutingPlan._fields:
        part = getattr(plan, name)
        check_dtype(op, f"plan.{name}", part, (torch.int32,))
        check_device(op, f"plan.{name}", part, device)
        if not part.is_contiguous():
            raise ValueError(
                f"{op}: plan.{name} must be contiguous as make_plan returns it, got strides {part.stride()}"
            )
    return T, K
