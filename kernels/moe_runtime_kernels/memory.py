"""plan_memory: how much memory a layer of experts takes on a GPU, from its sizes alone.

    forward  = plan + h + max(a + y, y + out)                          h only if it is kept
    backward = max(h + dh + a' + part,  dh + a' + ddown,  dh + ddown + yd + dx,  dh + all gradients) + dweight

with the buffers that the launchers of `make_plan` and `expert_ffn` allocate: h, dh [N, G]; a, a' [N, F];
y, yd [N, D]; out, dx [T, D]; part, one float32 per row and block of hidden columns. Nothing is measured: it
is the arithmetic of those allocations, which a test compares, and needs neither a GPU nor Triton.
"""

from dataclasses import dataclass

import torch

from ._checks import check_choice
from .plan import MAX_EXPERTS, TILE_HEIGHTS

# choices that one program of make_plan's kernels counts; from the second on, the counts of each are in memory
_PLAN_TILE = 256
_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that one layer of experts allocates; weights, x, gates, residual and upstream gradient are not.

    PyTorch's allocator rounds each buffer up to 512 bytes, and may give one of more than 1 MiB up to 1 MiB
    too much; there are at most 16 at once.

    Args:
        plan_bytes: the integers of the RoutingPlan, which are among the saved ones.
        saved_bytes: what stays for backward: x and gates, which the caller may hold anyway, plan, and h.
        forward_peak_bytes: most at once during `make_plan` and `expert_ffn`, with plan, h and output.
        forward_workspace_bytes: of these, what is free when they return.
        backward_peak_bytes: most at once during backward, beside what was saved, with the gradients.
        backward_workspace_bytes: of these, what is free when it returns.
        gradient_bytes: what backward returns: gradients of x, gates and weights.
        main_grad_bytes: the float32 main gradients, which are there all the time.
    """

    plan_bytes: int
    saved_bytes: int
    forward_peak_bytes: int
    forward_workspace_bytes: int
    backward_peak_bytes: int
    backward_workspace_bytes: int
    gradient_bytes: int
    main_grad_bytes: int


def plan_memory(  # noqa: PLR0913 - a layer's sizes and the options that change its memory
    T: int,
    D: int,
    F: int,
    E: int,
    K: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = True,
    bias: bool = False,
    training: bool = True,
    recompute: bool = False,
    frozen_experts: bool = False,
    main_grad: bool = False,
) -> MemoryPlan:
    """The memory of `make_plan` and `expert_ffn` on a GPU, forward and backward.

    The gates are float32, and x, the residual if there is one, and the upstream gradient are contiguous and
    have the weights' dtype. In training, x and the gates take gradients. `part` is that of launches which are
    chosen by size: one from the table of measured launches changes it by at most 4 * N * F / 32 bytes.

    Args:
        T: tokens; 0 is allowed.
        D: model width.
        F: width of an expert.
        E: experts.
        K: experts per token.
        dtype: of weights and tokens: bfloat16, float16 or float32.
        gated: experts have a gate, G = 2F; otherwise G = F.
        bias: both projections have one.
        training: a backward follows; the options below are about it.
        recompute: `expert_ffn(recompute=True)`.
        frozen_experts: weights and biases of the experts take no gradient.
        main_grad: both weights' gradients are added to float32 main gradients.

    Raises:
        ValueError: a size is not allowed, the dtype has no kernel, or an option has no effect.
    """
    for name, size, least in (("T", T, 0), ("D", D, 1), ("F", F, 1), ("E", E, 1), ("K", K, 1)):
        if not isinstance(size, int):
            raise ValueError(f"plan_memory: {name} must be an int, got {size!r}")
        if size < least:
            raise ValueError(f"plan_memory: {name} must be at least {least}, got {size}")
    if E > MAX_EXPERTS:
        raise ValueError(f"plan_memory: E must be at most {MAX_EXPERTS}, got {E}")
    if K > E:
        raise ValueError(f"plan_memory: K must be at most E, {E}, got {K}")
    if T * K >= 2**31:
        raise ValueError(f"plan_memory: T * K must be less than 2**31, got {T * K}")
    check_choice("plan_memory", "dtype", str(dtype).removeprefix("torch."), tuple(_DTYPES))
    _check_options(training, recompute, frozen_experts, main_grad)
    size, N, G = dtype.itemsize, T * K, 2 * F if gated else F
    plan_bytes = 4 * (3 * N + E + len(TILE_HEIGHTS) * E)
    tiles = -(-N // _PLAN_TILE)
    counts = 4 * (2 * tiles * E + E) if tiles > 1 else 0
    x, y, h, a = size * T * D, size * N * D, size * N * G, size * N * F
    kept_h = h if training and not recompute else 0
    forward_peak = plan_bytes + max(counts, kept_h + y + max(a, x))
    backward_peak = gradients = 0
    if training:
        again, trained = h if recompute else 0, not frozen_experts
        weighted_a, gates = a if trained else 0, 4 * N
        part = 4 * N * -(-F // _hidden_block(size, N, E, aligned=D % 16 == F % 16 == 0))
        ddown, dgate_up = (size * E * D * width if trained and not main_grad else 0 for width in (F, G))
        dbias = size * E * (D + G) if trained and bias else 0
        gradients = gates + x + ddown + dgate_up + dbias
        backward_peak = max(
            gates + again + h + weighted_a + part,
            gates + h + weighted_a + ddown,
            gates + h + ddown + y + x,
            h + gradients,
        )
    return MemoryPlan(
        plan_bytes=plan_bytes,
        saved_bytes=x + 4 * N + plan_bytes + kept_h if training else 0,
        forward_peak_bytes=forward_peak,
        forward_workspace_bytes=forward_peak - plan_bytes - kept_h - x,
        backward_peak_bytes=backward_peak,
        backward_workspace_bytes=backward_peak - gradients,
        gradient_bytes=gradients,
        main_grad_bytes=4 * E * D * (F + G) if main_grad else 0,
    )


def _check_options(training: bool, recompute: bool, frozen_experts: bool, main_grad: bool) -> None:
    options = (("recompute", recompute), ("frozen_experts", frozen_experts), ("main_grad", main_grad))
    for name, chosen in options:
        if chosen and not training:
            raise ValueError(f"plan_memory: {name} must be False without training, got True")
    if main_grad and frozen_experts:
        raise ValueError("plan_memory: main_grad must be False with frozen_experts, got True")


def _hidden_block(itemsize: int, N: int, E: int, *, aligned: bool) -> int:
    """Hidden columns of a program of the backward kernel, as its launch choice gives them."""
    if itemsize == 2 and aligned:
        return 128
    return 64 if itemsize == 2 and N <= 16 * E else 32
