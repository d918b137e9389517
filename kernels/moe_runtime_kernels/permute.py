"""gather_rows and scatter_rows: tokens to expert order and back.

    gather_rows     out[n] = x[token[n]]                     zero where token[n] is -1
    scatter_rows    out[t] = sum over k of y[row[t, k]]      zero where row[t, k] is -1

Each is the transpose of the other, so each one's backward is the other operation. Sums run in float32, k
ascending.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS, check_dims, check_dtype, check_shape
from ._dispatch import accumulator, register_kernel, register_reference
from .plan import RoutingPlan, check_plan

# --- contract: schema and output shape, known before any graph is captured --------------

torch.library.define("moe_runtime::gather_rows", "(Tensor x, Tensor token) -> Tensor")
torch.library.define("moe_runtime::scatter_rows", "(Tensor y, Tensor row) -> Tensor")
gather_rows_op = torch.ops.moe_runtime.gather_rows.default
scatter_rows_op = torch.ops.moe_runtime.scatter_rows.default


@torch.library.register_fake("moe_runtime::gather_rows")
def _(x, token):
    return x.new_empty(token.shape[0], x.shape[1])


@torch.library.register_fake("moe_runtime::scatter_rows")
def _(y, row):
    return y.new_empty(row.shape[0], y.shape[1])


# --- reference: the definition, in the plainest PyTorch; also the CPU path --------------


@register_reference("moe_runtime::gather_rows")
def gather_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` [rows, columns] at `index` [n]; zero where the index is -1, whatever `x` holds."""
    return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0)[:, None], 0)


@register_reference("moe_runtime::scatter_rows")
def scatter_rows_reference(y_ND: Tensor, row_TK: Tensor) -> Tensor:
    T, K = row_TK.shape
    out_TD = torch.zeros(T, y_ND.shape[1], dtype=accumulator(y_ND.dtype), device=y_ND.device)
    for k in range(K):
        out_TD += gather_rows_reference(y_ND, row_TK[:, k])
    return out_TD.to(y_ND.dtype)


# --- GPU: Triton is imported by the first launch, never by `import` ---------------------

register_kernel("moe_runtime::gather_rows", "permute", "launch_gather_rows")
register_kernel("moe_runtime::scatter_rows", "permute", "launch_scatter_rows")


# --- autograd and the public functions --------------------------------------------------


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return gather_rows_op(x, token)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        return scatter_rows_op(grad_out.contiguous(), row), None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return scatter_rows_op(y, row)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return gather_rows_op(grad_out.contiguous(), token), None, None


def gather_rows(x_TD: Tensor, plan: RoutingPlan) -> Tensor:
    """Copy each token's row to the places of its choices in expert order.

    Args:
        x_TD: tokens, bf16, fp16, fp32 or fp64; a non-contiguous tensor is copied first.
        plan: from `make_plan`, for the same T.

    Returns:
        x_ND in x's dtype; rows past the last expert's are zero.

    Raises:
        ValueError: x does not belong to the plan, or has no float dtype.
    """
    check_dims("gather_rows", "x", x_TD, "(T, D)")
    check_dtype("gather_rows", "x", x_TD, FLOATS)
    T, _ = check_plan("gather_rows", plan, x_TD.device)
    check_shape("gather_rows", "x", x_TD, (T, x_TD.shape[1]), "(T, D)")
    return _GatherRows.apply(x_TD.contiguous(), plan.token_N, plan.row_TK)


def scatter_rows(y_ND: Tensor, plan: RoutingPlan) -> Tensor:
    """Sum of each token's K rows, all gates 1; `combine` is the weighted one.

    Args:
        y_ND: rows in expert order, bf16, fp16, fp32 or fp64; a non-contiguous tensor is copied first.
        plan: from `make_plan`, for the same N.

    Returns:
        y_TD in y's dtype, summed in float32 and rounded once.

    Raises:
        ValueError: y does not belong to the plan, or has no float dtype.
    """
    check_dims("scatter_rows", "y", y_ND, "(N, D)")
    check_dtype("scatter_rows", "y", y_ND, FLOATS)
    T, K = check_plan("scatter_rows", plan, y_ND.device)
    check_shape("scatter_rows", "y", y_ND, (T * K, y_ND.shape[1]), "(T*K, D)")
    return _ScatterRows.apply(y_ND.contiguous(), plan.token_N, plan.row_TK)
