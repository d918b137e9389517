"""grouped_gemm: rows times their expert's matrix.

    y[n] = x[n] @ weight[e].T + bias[e]     for the rows n of expert e; rows past the last expert's are zero

gathered_grouped_gemm reads x[token[n]] instead of x[n], so that no gathered copy is kept for backward.

Gradients, over the rows n of expert e:

    dx[n] = dy[n] @ weight[e]      dweight[e] = sum of dy[n]^T x[n]      dbias[e] = sum of dy[n]

Products take the storage dtype in and sum in float32. Each gradient is an operation of its own, so that one
that nobody asked for costs nothing. Experts without rows get gradients of zero.

With a main gradient, a float32 tensor of the weight's shape, dweight is added to it without being rounded to
the storage dtype, and the weight gets no gradient of its own: main_grad[e] += sum of dy[n]^T x[n]. Every
backward pass through the call adds, whatever gradients it was asked for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS, check_apart, check_device, check_dims, check_dtype, check_same, check_shape
from ._cpu import (
    MOST_NATIVE_ROWS,
    few_heights,
    native_takes,
    rows_product,
    write_weight_grad,
)
from ._dispatch import accumulator, cast_for_autocast, register_kernel, register_reference
from ._native import grouped_rows
from .permute import gather_rows_reference, scatter_rows_op
from .plan import RoutingPlan, check_plan

# --- contract: schema and output shape, known before any graph is captured --------------

torch.library.define(
    "moe_runtime::grouped_gemm",
    "(Tensor x, Tensor weight, Tensor offset, Tensor tile_end, Tensor? bias) -> Tensor",
)
torch.library.define(
    "moe_runtime::gathered_grouped_gemm",
    "(Tensor x, Tensor weight, Tensor token, Tensor offset, Tensor tile_end, Tensor? bias) -> Tensor",
)
torch.library.define(
    "moe_runtime::grouped_gemm_input_grad",
    "(Tensor grad_out, Tensor weight, Tensor offset, Tensor tile_end) -> Tensor",
)
torch.library.define(
    "moe_runtime::grouped_gemm_weight_grad", "(Tensor grad_out, Tensor x, Tensor offset) -> Tensor"
)
torch.library.define(
    "moe_runtime::gathered_grouped_gemm_weight_grad",
    "(Tensor grad_out, Tensor x, Tensor token, Tensor offset) -> Tensor",
)
torch.library.define(
    "moe_runtime::grouped_gemm_add_weight_grad",
    "(Tensor grad_out, Tensor x, Tensor(a!) main_grad, Tensor offset) -> ()",
)
torch.library.define(
    "moe_runtime::gathered_grouped_gemm_add_weight_grad",
    "(Tensor grad_out, Tensor x, Tensor token, Tensor(a!) main_grad, Tensor offset) -> ()",
)
torch.library.define("moe_runtime::grouped_gemm_bias_grad", "(Tensor grad_out, Tensor offset) -> Tensor")
_grouped_gemm = torch.ops.moe_runtime.grouped_gemm.default
_gathered_grouped_gemm = torch.ops.moe_runtime.gathered_grouped_gemm.default
_input_grad = torch.ops.moe_runtime.grouped_gemm_input_grad.default
_weight_grad = torch.ops.moe_runtime.grouped_gemm_weight_grad.default
_gathered_weight_grad = torch.ops.moe_runtime.gathered_grouped_gemm_weight_grad.default
_add_weight_grad = torch.ops.moe_runtime.grouped_gemm_add_weight_grad.default
_gathered_add_weight_grad = torch.ops.moe_runtime.gathered_grouped_gemm_add_weight_grad.default
_bias_grad = torch.ops.moe_runtime.grouped_gemm_bias_grad.default


@torch.library.register_fake("moe_runtime::grouped_gemm")
def _(x, weight, offset, tile_end, bias):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake("moe_runtime::gathered_grouped_gemm")
def _(x, weight, token, offset, tile_end, bias):
    return x.new_empty(token.shape[0], weight.shape[1])


@torch.library.register_fake("moe_runtime::grouped_gemm_input_grad")
def _(grad_out, weight, offset, tile_end):
    return grad_out.new_empty(grad_out.shape[0], weight.shape[2])


@torch.library.register_fake("moe_runtime::grouped_gemm_weight_grad")
def _(grad_out, x, offset):
    return x.new_empty(offset.shape[0], grad_out.shape[1], x.shape[1])


@torch.library.register_fake("moe_runtime::gathered_grouped_gemm_weight_grad")
def _(grad_out, x, token, offset):
    return x.new_empty(offset.shape[0], grad_out.shape[1], x.shape[1])


@torch.library.register_fake("moe_runtime::grouped_gemm_add_weight_grad")
def _(grad_out, x, main_grad, offset):
    return None


@torch.library.register_fake("moe_runtime::gathered_grouped_gemm_add_weight_grad")
def _(grad_out, x, token, main_grad, offset):
    return None


@torch.library.register_fake("moe_runtime::grouped_gemm_bias_grad")
def _(grad_out, offset):
    return grad_out.new_empty(offset.shape[0], grad_out.shape[1])


# --- reference: the definition, in the plainest PyTorch; also the CPU path --------------


def expert_slices(offset_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows. Reads the plan on the host: for references only."""
    ends = offset_E.tolist()
    return [(e, slice(s, end)) for e, (s, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > s]


def grouped_gemm_reference(
    x_NI: Tensor, weight_EOI: Tensor, offset_E: Tensor, bias_EO: Tensor | None = None
) -> Tensor:
    experts = expert_slices(offset_E)
    if native_takes(x_NI, weight_EOI, bias_EO):
        return _native_grouped_gemm(x_NI, weight_EOI, bias_EO, experts)
    # unbind, not weight_EOI[e]: differentiated, each index would write a zero gradient of the whole stack
    matrices, biases = weight_EOI.unbind(0), None if bias_EO is None else bias_EO.unbind(0)
    parts = []
    used = 0
    for e, rows in experts:
        parts.append(rows_product(x_NI, rows, matrices[e], None if biases is None else biases[e]))
        used = rows.stop
    parts.append(x_NI.new_zeros(x_NI.shape[0] - used, weight_EOI.shape[1]))
    return torch.cat(parts)


def _native_grouped_gemm(
    x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, experts: list[tuple[int, slice]]
) -> Tensor:
    """All experts with few rows in one call, the others each by itself."""
    most_rows = MOST_NATIVE_ROWS[x_NI.dtype]
    out_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
    few = []
    for e, rows in experts:
        if rows.stop - rows.start <= most_rows:
            few.append((e, rows.start, rows.stop - rows.start))
        else:
            out_NO[rows] = rows_product(x_NI, rows, weight_EOI[e], None if bias_EO is None else bias_EO[e])
    grouped_rows(x_NI, weight_EOI, bias_EO, few, out_NO)
    out_NO[experts[-1][1].stop if experts else 0 :] = 0
    return out_NO


def gathered_grouped_gemm_reference(
    x_TI: Tensor, weight_EOI: Tensor, token_N: Tensor, offset_E: Tensor, bias_EO: Tensor | None = None
) -> Tensor:
    return grouped_gemm_reference(gather_rows_reference(x_TI, token_N), weight_EOI, offset_E, bias_EO)


def input_grad_reference(grad_NO: Tensor, weight_EOI: Tensor, offset_E: Tensor) -> Tensor:
    return grouped_gemm_reference(grad_NO, weight_EOI.transpose(1, 2), offset_E)


@register_reference("moe_runtime::grouped_gemm_weight_grad")
def weight_grad_reference(grad_NO: Tensor, x_NI: Tensor, offset_E: Tensor) -> Tensor:
    E, O, I = offset_E.shape[0], grad_NO.shape[1], x_NI.shape[1]
    dweight_EOI = torch.zeros(E, O, I, dtype=x_NI.dtype, device=x_NI.device)
    for e, rows in expert_slices(offset_E):
        grad_MO, x_MI = few_heights(grad_NO, rows), few_heights(x_NI, rows)
        write_weight_grad(grad_MO, x_MI, dweight_EOI[e])
    return dweight_EOI


@register_reference("moe_runtime::gathered_grouped_gemm_weight_grad")
def gathered_weight_grad_reference(
    grad_NO: Tensor, x_TI: Tensor, token_N: Tensor, offset_E: Tensor
) -> Tensor:
    return weight_grad_reference(grad_NO, gather_rows_reference(x_TI, token_N), offset_E)


@register_reference("moe_runtime::grouped_gemm_add_weight_grad")
def add_weight_grad_reference(grad_NO: Tensor, x_NI: Tensor, main_grad_EOI: Tensor, offset_E: Tensor) -> None:
    acc = main_grad_EOI.dtype
    for e, rows in expert_slices(offset_E):
        main_grad_EOI[e] += grad_NO[rows].to(acc).t() @ x_NI[rows].to(acc)


@register_reference("moe_runtime::gathered_grouped_gemm_add_weight_grad")
def gathered_add_weight_grad_reference(
    grad_NO: Tensor, x_TI: Tensor, token_N: Tensor, main_grad_EOI: Tensor, offset_E: Tensor
) -> None:
    add_weight_grad_reference(grad_NO, gather_rows_reference(x_TI, token_N), main_grad_EOI, offset_E)


@register_reference("moe_runtime::grouped_gemm_bias_grad")
def bias_grad_reference(grad_NO: Tensor, offset_E: Tensor) -> Tensor:
    acc = accumulator(grad_NO.dtype)
    dbias_EO = torch.zeros(offset_E.shape[0], grad_NO.shape[1], dtype=acc, device=grad_NO.device)
    for e, rows in expert_slices(offset_E):
        dbias_EO[e] = grad_NO[rows].sum(0, dtype=acc)
    return dbias_EO.to(grad_NO.dtype)


# the schedule of the tiles is for kernels; the references loop over experts


@register_reference("moe_runtime::grouped_gemm")
def _(x, weight, offset, tile_end, bias):
    return grouped_gemm_reference(x, weight, offset, bias)


@register_reference("moe_runtime::gathered_grouped_gemm")
def _(x, weight, token, offset, tile_end, bias):
    return gathered_grouped_gemm_reference(x, weight, token, offset, bias)


@register_reference("moe_runtime::grouped_gemm_input_grad")
def _(grad_out, weight, offset, tile_end):
    return input_grad_reference(grad_out, weight, offset)


# --- GPU: Triton is imported by the first launch, never by `import` ---------------------

register_kernel("moe_runtime::grouped_gemm", "grouped_gemm", "launch_grouped_gemm")
register_kernel("moe_runtime::gathered_grouped_gemm", "grouped_gemm", "launch_gathered_grouped_gemm")
register_kernel("moe_runtime::grouped_gemm_input_grad", "grouped_gemm", "launch_input_grad")
register_kernel("moe_runtime::grouped_gemm_weight_grad", "grouped_wgrad", "launch_weight_grad")
register_kernel(
    "moe_runtime::gathered_grouped_gemm_weight_grad", "grouped_wgrad", "launch_gathered_weight_grad"
)
register_kernel("moe_runtime::grouped_gemm_add_weight_grad", "grouped_wgrad", "launch_add_weight_grad")
register_kernel(
    "moe_runtime::gathered_grouped_gemm_add_weight_grad", "grouped_wgrad", "launch_gathered_add_weight_grad"
)
register_kernel("moe_runtime::grouped_gemm_bias_grad", "grouped_wgrad", "launch_bias_grad")


# --- autograd and the public functions --------------------------------------------------


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        offset, tile_end, ctx.main_grad = rest
        ctx.save_for_backward(x, weight, offset, tile_end)
        return _grouped_gemm(x, weight, offset, tile_end, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offset, tile_end = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_out = grad_out.contiguous()
        dx = _input_grad(grad_out, weight, offset, tile_end) if needs_x else None
        dweight = None
        if needs_weight and ctx.main_grad is not None:
            _add_weight_grad(grad_out, x, ctx.main_grad, offset)
            torch.autograd.graph.increment_version(ctx.main_grad)
        elif needs_weight:
            dweight = _weight_grad(grad_out, x, offset)
        dbias = _bias_grad(grad_out, offset) if needs_bias else None
        return dx, dweight, dbias, None, None, None


class _GatheredGroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        row, token, offset, tile_end, ctx.main_grad = rest
        ctx.save_for_backward(x, weight, row, token, offset, tile_end)
        return _gathered_grouped_gemm(x, weight, token, offset, tile_end, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, row, token, offset, tile_end = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_out = grad_out.contiguous()
        dx = None
        if needs_x:
            dx = scatter_rows_op(_input_grad(grad_out, weight, offset, tile_end), row)
        dweight = None
        if needs_weight and ctx.main_grad is not None:
            _gathered_add_weight_grad(grad_out, x, token, ctx.main_grad, offset)
            torch.autograd.graph.increment_version(ctx.main_grad)
        elif needs_weight:
            dweight = _gathered_weight_grad(grad_out, x, token, offset)
        dbias = _bias_grad(grad_out, offset) if needs_bias else None
        return dx, dweight, dbias, None, None, None, None, None


def grouped_gemm(
    x_NI: Tensor,
    weight_EOI: Tensor,
    plan: RoutingPlan,
    bias_EO: Tensor | None = None,
    *,
    main_grad_EOI: Tensor | None = None,
) -> Tensor:
    """Each expert's rows times its matrix.

    Args:
        x_NI: rows in expert order, bf16, fp16, fp32 or fp64.
        weight_EOI: one matrix per expert, x's dtype.
        plan: from `make_plan`, for the same N and E.
        bias_EO: added to each of the expert's rows, x's dtype.
        main_grad_EOI: contiguous, float32 (float64 for float64); backward adds the weight's gradient to it
            and returns none for the weight. Every backward pass through this call adds, whatever inputs it
            is asked for, and a second pass adds again. Untouched where the weight requires no gradient.
            Shares no memory with the weight.

    Returns:
        y_NO in x's dtype (autocast's where that is on); rows past the last expert's are zero.

    Raises:
        ValueError: shapes, dtypes or devices disagree. Non-contiguous tensors are copied first.
    """
    given = {"weight": weight_EOI}
    x_NI, weight_EOI, bias_EO = _checked("grouped_gemm", x_NI, weight_EOI, plan, bias_EO)
    check_main_grad("grouped_gemm", "main_grad", main_grad_EOI, "weight", weight_EOI, given)
    T, K = plan.row_TK.shape
    check_shape("grouped_gemm", "x", x_NI, (T * K, weight_EOI.shape[2]), "(T*K, I)")
    return _GroupedGemm.apply(x_NI, weight_EOI, bias_EO, plan.offset_E, plan.tile_end_ME, main_grad_EOI)


def gathered_grouped_gemm(
    x_TI: Tensor,
    weight_EOI: Tensor,
    plan: RoutingPlan,
    bias_EO: Tensor | None = None,
    *,
    main_grad_EOI: Tensor | None = None,
) -> Tensor:
    """`grouped_gemm(gather_rows(x, plan), weight, plan, bias)` without storing the gathered rows.

    Args:
        x_TI: tokens, bf16, fp16, fp32 or fp64.
        weight_EOI: one matrix per expert, x's dtype.
        plan: from `make_plan`, for the same T and E.
        bias_EO: added to each of the expert's rows, x's dtype.
        main_grad_EOI: contiguous, float32 (float64 for float64); backward adds the weight's gradient to it
            and returns none for the weight. Every backward pass through this call adds, whatever inputs it
            is asked for, and a second pass adds again. Untouched where the weight requires no gradient.
            Shares no memory with the weight.

    Returns:
        y_NO in x's dtype (autocast's where that is on); rows past the last expert's are zero.

    Raises:
        ValueError: shapes, dtypes or devices disagree. Non-contiguous tensors are copied first.
    """
    given = {"weight": weight_EOI}
    x_TI, weight_EOI, bias_EO = _checked("gathered_grouped_gemm", x_TI, weight_EOI, plan, bias_EO)
    check_main_grad("gathered_grouped_gemm", "main_grad", main_grad_EOI, "weight", weight_EOI, given)
    check_shape("gathered_grouped_gemm", "x", x_TI, (plan.row_TK.shape[0], weight_EOI.shape[2]), "(T, I)")
    return _GatheredGroupedGemm.apply(
        x_TI, weight_EOI, bias_EO, plan.row_TK, plan.token_N, plan.offset_E, plan.tile_end_ME, main_grad_EOI
    )


def check_main_grad(
    op: str,
    name: str,
    main_grad: Tensor | None,
    weight_name: str,
    weight: Tensor,
    given: Mapping[str, Tensor | None],
) -> None:
    """A main gradient can be added to in place; None is none.

    Args:
        op: the operation, for messages.
        name: of the main gradient.
        main_grad: what is checked.
        weight_name: of the weight whose gradient is added.
        weight: in the dtype of the products.
        given: the caller's tensors that must not change with it: weights and other main gradients.

    Raises:
        ValueError: it cannot be added to. While a graph is compiled, where a tensor is in memory and under
            what mode it was made are not known, and not checked.
    """
    if main_grad is None:
        return
    if not isinstance(main_grad, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor or None, got {type(main_grad).__name__}")
    if main_grad.shape != weight.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {weight_name}, {tuple(weight.shape)}, got "
            f"{tuple(main_grad.shape)}"
        )
    check_dtype(op, name, main_grad, (accumulator(weight.dtype),))
    check_device(op, name, main_grad, weight.device)
    if not main_grad.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, because it is added to in place, got strides "
            f"{main_grad.stride()}"
        )
    if main_grad.requires_grad:
        raise ValueError(
            f"{op}: {name} must not require a gradient, because it is added to in place, got one that does"
        )
    if torch.compiler.is_compiling():
        return
    if main_grad.is_inference():
        raise ValueError(
            f"{op}: {name} must not be made under torch.inference_mode, because autograd cannot count its "
            "changes, got one that is"
        )
    check_apart(op, name, main_grad, given)


def _checked(
    op: str, x: Tensor, weight_EOI: Tensor, plan: RoutingPlan, bias_EO: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands, cast for autocast and contiguous, after all checks but that of x's shape."""
    check_dims(op, "x", x, "(rows, I)")
    check_dims(op, "weight", weight_EOI, "(E, O, I)")
    x, weight_EOI, bias_EO = cast_for_autocast(x, weight_EOI, bias_EO)
    check_dtype(op, "x", x, FLOATS)
    check_same(op, "weight", weight_EOI, "x", x)
    check_plan(op, plan, x.device)
    E, O, _ = weight_EOI.shape
    check_shape(op, "plan.offset_E", plan.offset_E, (E,), "(E,)")
    if bias_EO is not None:
        check_shape(op, "bias", bias_EO, (E, O), "(E, O)")
        check_same(op, "bias", bias_EO, "x", x)
        bias_EO = bias_EO.contiguous()
    return x.contiguous(), weight_EOI.contiguous(), bias_EO
