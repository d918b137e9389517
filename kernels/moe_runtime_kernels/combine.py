"""combine: bring expert outputs back to token order.

    out[t] = residual[t] + sum over k of weight[t, k] * y[row[t, k]]          a row of -1 counts as zero

Sums run in float32, k ascending, the residual last, and are rounded once: to the residual's dtype, or to y's
without one.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS, check_device, check_dims, check_dtype, check_shape
from ._dispatch import accumulator, register_reference
from .permute import gather_rows_reference
from .plan import RoutingPlan, check_plan

# --- contract: schema and output shape, known before any graph is captured --------------

torch.library.define(
    "moe_runtime::combine", "(Tensor y, Tensor weight, Tensor row, Tensor? residual) -> Tensor"
)
torch.library.define(
    "moe_runtime::combine_backward",
    "(Tensor grad_out, Tensor y, Tensor weight, Tensor row, Tensor token, Tensor slot)"
    " -> (Tensor dy, Tensor dweight)",
)
_combine = torch.ops.moe_runtime.combine.default
_combine_backward = torch.ops.moe_runtime.combine_backward.default


@torch.library.register_fake("moe_runtime::combine")
def _(y, weight, row, residual):
    like = y if residual is None else residual
    return like.new_empty(row.shape[0], y.shape[1])


@torch.library.register_fake("moe_runtime::combine_backward")
def _(grad_out, y, weight, row, token, slot):
    return y.new_empty(y.shape), weight.new_empty(weight.shape)


# --- reference: the definition, in the plainest PyTorch; also the CPU path --------------


@register_reference("moe_runtime::combine")
def combine_reference(y_ND: Tensor, weight_TK: Tensor, row_TK: Tensor, residual_TD: Tensor | None) -> Tensor:
    T, K = weight_TK.shape
    acc = accumulator(y_ND.dtype)
    out_TD = torch.zeros(T, y_ND.shape[1], dtype=acc, device=y_ND.device)
    for k in range(K):
        out_TD = out_TD + weight_TK[:, k, None].to(acc) * gather_rows_reference(y_ND, row_TK[:, k]).to(acc)
    if residual_TD is None:
        return out_TD.to(y_ND.dtype)
    return (out_TD + residual_TD.to(acc)).to(residual_TD.dtype)


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


# --- autograd and the public function ---------------------------------------------------


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, residual: Tensor | None, row: Tensor, token: Tensor, slot: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y, weight, row, token, slot)
        return _combine(y, weight, row, residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_out = grad_out.contiguous()
        dy, dweight = _combine_backward(grad_out, *ctx.saved_tensors)
        return dy, dweight, grad_out if ctx.needs_input_grad[2] else None, None, None, None


def combine(y_ND: Tensor, weight_TK: Tensor, plan: RoutingPlan, residual_TD: Tensor | None = None) -> Tensor:
    """Gate-weighted sum of each token's K expert outputs, plus the residual.

    Args:
        y_ND: expert outputs in expert order, bf16, fp16, fp32 or fp64.
        weight_TK: gate of each (token, choice); any float dtype, float32 from `route_topk`.
        plan: from `make_plan`, for the same T and K.
        residual_TD: added in float32 before the one rounding; any float dtype.

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
    residual_TD = None if residual_TD is None else residual_TD.contiguous()
    return _Combine.apply(
        y_ND.contiguous(), weight_TK.contiguous(), residual_TD, plan.row_TK, plan.token_N, plan.slot_N
    )


def check_gates(
    op: str, weight_TK: Tensor, residual_TD: Tensor | None, sizes: tuple[int, int, int], device: torch.device
) -> None:
    """The checks of `weight` and `residual`, which `expert_ffn` shares; `sizes` is (T, K, D)."""
    T, K, D = sizes
    check_shape(op, "weight", weight_TK, (T, K), "(T, K)")
    check_dtype(op, "weight", weight_TK, FLOATS)
    check_device(op, "weight", weight_TK, device)
    if residual_TD is not None:
        check_shape(op, "residual", residual_TD, (T, D), "(T, D)")
        check_dtype(op, "residual", residual_TD, FLOATS)
        check_device(op, "residual", residual_TD, device)
