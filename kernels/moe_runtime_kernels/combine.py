"""combine: bring expert outputs back to token order.

    out[t] = sum over k of weight[t, k] * y[row[t, k]] + residual[t] + addend[t]    a row of -1 counts as zero

Sums run in float32, k ascending, then the residual, then the addend, and are rounded once: to the residual's
dtype, or to y's without one. The addend is for what a parallel block's attention returns.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS, check_device, check_dims, check_dtype, check_shape
from ._dispatch import accumulator, register_kernel, register_reference
from .permute import gather_rows_reference
from .plan import RoutingPlan, check_plan

# --- contract: schema and output shape, known before any graph is captured --------------

torch.library.define(
    "moe_runtime::combine",
    "(Tensor y, Tensor weight, Tensor row, Tensor? residual, Tensor? addend) -> Tensor",
)
torch.library.define(
    "moe_runtime::combine_backward",
    "(Tensor grad_out, Tensor y, Tensor weight, Tensor row, Tensor token, Tensor slot)"
    " -> (Tensor dy, Tensor dweight)",
)
_combine = torch.ops.moe_runtime.combine.default
_combine_backward = torch.ops.moe_runtime.combine_backward.default


@torch.library.register_fake("moe_runtime::combine")
def _(y, weight, row, residual, addend):
    like = y if residual is None else residual
    return like.new_empty(row.shape[0], y.shape[1])


@torch.library.register_fake("moe_runtime::combine_backward")
def _(grad_out, y, weight, row, token, slot):
    return y.new_empty(y.shape), weight.new_empty(weight.shape)


# --- reference: the definition, in the plainest PyTorch; the CPU path follows it --------


def combine_reference(
    y_ND: Tensor,
    weight_TK: Tensor,
    row_TK: Tensor,
    residual_TD: Tensor | None = None,
    addend_TD: Tensor | None = None,
) -> Tensor:
    T, K = weight_TK.shape
    acc = accumulator(y_ND.dtype)
    out_TD = torch.zeros(T, y_ND.shape[1], dtype=acc, device=y_ND.device)
    for k in range(K):
        out_TD = out_TD + weight_TK[:, k, None].to(acc) * gather_rows_reference(y_ND, row_TK[:, k]).to(acc)
    for added_TD in (residual_TD, addend_TD):
        if added_TD is not None:
            out_TD = out_TD + added_TD.to(acc)
    return out_TD.to(y_ND.dtype if residual_TD is None else residual_TD.dtype)


TOKENS = 64  # in a block of `combine_blocks`, whose rows then stay in the cache


@register_reference("moe_runtime::combine")
def combine_blocks(
    y_ND: Tensor,
    weight_TK: Tensor,
    row_TK: Tensor,
    residual_TD: Tensor | None = None,
    addend_TD: Tensor | None = None,
) -> Tensor:
    """The same in blocks of tokens: each row is passed over once, not K times. The CPU path."""
    (T, K), D = weight_TK.shape, y_ND.shape[1]
    acc = accumulator(y_ND.dtype)
    added = [tensor for tensor in (residual_TD, addend_TD) if tensor is not None]
    out_TD = (y_ND if residual_TD is None else residual_TD).new_empty(T, D)
    any_dropped = bool((row_TK < 0).any())
    for start in range(0, T, TOKENS):
        tokens = slice(start, start + TOKENS)
        row = row_TK[tokens].flatten()
        rows = gather_rows_reference(y_ND, row) if any_dropped else y_ND.index_select(0, row)
        total = torch.bmm(weight_TK[tokens, None].to(acc), rows.to(acc).view(-1, K, D))[:, 0]
        for tensor in added:
            total += tensor[tokens].to(acc)
        out_TD[tokens] = total
    return out_TD


@register_reference("moe_runtime::combine_backward")
def combine_backward_reference(
    grad_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor, token_N: Tensor, slot_N: Tensor
) -> tuple[Tensor, Tensor]:
    acc = accumulator(y_ND.dtype)
    grad_ND = gather_rows_reference(grad_TD.to(acc), token_N)
    weight_N1 = gather_rows_reference(weight_TK.reshape(-1, 1).to(acc), slot_N)
    dweight_N1 = (grad_ND * y_ND.to(acc)).sum(-1, keepdim=True)
    dweight_TK = gather_rows_reference(dweight_N1, row_TK.flatten()).view_as(row_TK)
    return (weight_N1 * grad_ND).to(y_ND.dtype), dweight_TK.to(weight_TK.dtype)


# --- GPU: Triton is imported by the first launch, never by `import` ---------------------

register_kernel("moe_runtime::combine", "combine", "launch_combine")
register_kernel("moe_runtime::combine_backward", "combine", "launch_combine_backward")


# --- autograd and the public function ---------------------------------------------------


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, weight, residual, addend, row, token, slot = inputs
        ctx.save_for_backward(y, weight, row, token, slot)
        ctx.addend_dtype = None if addend is None else addend.dtype
        return _combine(y, weight, row, residual, addend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs_y, needs_weight, needs_residual, needs_addend = ctx.needs_input_grad[:4]
        grad_out = grad_out.contiguous()
        dy = dweight = None
        if needs_y or needs_weight:
            dy, dweight = _combine_backward(grad_out, *ctx.saved_tensors)
        dresidual = grad_out if needs_residual else None
        daddend = grad_out.to(ctx.addend_dtype) if needs_addend else None
        return dy, dweight, dresidual, daddend, None, None, None


def combine(
    y_ND: Tensor,
    weight_TK: Tensor,
    plan: RoutingPlan,
    residual_TD: Tensor | None = None,
    addend_TD: Tensor | None = None,
) -> Tensor:
    """Gate-weighted sum of each token's K expert outputs, plus the residual, plus a second addend.

    Args:
        y_ND: expert outputs in expert order, bf16, fp16, fp32 or fp64.
        weight_TK: gate of each (token, choice); any float dtype, float32 from `route_topk`.
        plan: from `make_plan`, for the same T and K.
        residual_TD: added in float32 before the one rounding; any float dtype.
        addend_TD: added in float32 after the residual, before the one rounding; any float dtype.

    Returns:
        y_TD in the residual's dtype, or y's without one.

    Raises:
        ValueError: shapes, dtypes or devices disagree. Non-contiguous tensors are copied first.
    """
    check_dims("combine", "y", y_ND, "(N, D)")
    check_dtype("combine", "y", y_ND, FLOATS)
    T, K = check_plan("combine", plan, y_ND.device)
    D = y_ND.shape[1]
    check_shape("combine", "y", y_ND, (T * K, D), "(T*K, D)")
    check_gates("combine", weight_TK, residual_TD, (T, K, D), y_ND.device)
    _check_added("combine", "addend", addend_TD, (T, D), y_ND.device)
    residual_TD = None if residual_TD is None else residual_TD.contiguous()
    addend_TD = None if addend_TD is None else addend_TD.contiguous()
    operands = (y_ND.contiguous(), weight_TK.contiguous(), residual_TD, addend_TD)
    return _Combine.apply(*operands, plan.row_TK, plan.token_N, plan.slot_N)


def check_gates(
    op: str, weight_TK: Tensor, residual_TD: Tensor | None, sizes: tuple[int, int, int], device: torch.device
) -> None:
    """The checks of `weight` and `residual`, which `expert_ffn` shares; `sizes` is (T, K, D)."""
    T, K, D = sizes
    check_shape(op, "weight", weight_TK, (T, K), "(T, K)")
    check_dtype(op, "weight", weight_TK, FLOATS)
    check_device(op, "weight", weight_TK, device)
    _check_added(op, "residual", residual_TD, (T, D), device)


def _check_added(
    op: str, name: str, tensor: Tensor | None, sizes: tuple[int, int], device: torch.device
) -> None:
    if tensor is not None:
        check_shape(op, name, tensor, sizes, "(T, D)")
        check_dtype(op, name, tensor, FLOATS)
        check_device(op, name, tensor, device)
