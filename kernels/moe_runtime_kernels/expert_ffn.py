"""expert_ffn: gather -> gate_up -> activation -> down -> combine, as one differentiable operation.

    h[n] = x[token[n]] @ gate_up[e].T + gate_up_bias[e]        for the rows n of expert e
    a[n] = act(h[n, :F]) * h[n, F:]   gated,    act(h[n])   otherwise
    y[t] = residual[t] + sum over k of weight[t, k] * (a[row[t, k]] @ down[e].T + down_bias[e])

Backward keeps x, h and the plan, nothing of size N * D; with `recompute` x and the plan, and h is computed a
second time, the same way. With g[n] = dy[token[n]] and w[n] the gate of row n:

    da'[n] = g[n] @ down[e]                           dh[n] = w[n] * da'[n] * da/dh
    dweight = <da'[n], a[n]> + <g[n], down_bias[e]>   dx[t] = sum over k of dh[n] @ gate_up[e], n = row[t, k]
    ddown[e] = sum of g[n]^T (w[n] a[n])              dgate_up[e] = sum of dh[n]^T x[token[n]]
    ddown_bias[e] = sum of w[n] g[n]                  dgate_up_bias[e] = sum of dh[n]

Products take the storage dtype in and sum in float32; activations, gates and sums over choices are float32.
Under autocast on a CPU float32 weights stay float32 in memory and are rounded where they are multiplied.
ddown and dgate_up can be added to float32 main gradients instead of being returned, without being rounded;
every backward pass through the call adds, whatever gradients it was asked for.
The identity for dweight and the set of saved tensors follow SonicMoE (Guo et al. 2025).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._activations import ACTIVATIONS, activate, activate_backward
from ._checks import FLOATS, check_choice, check_device, check_dims, check_dtype, check_same, check_shape
from ._cpu_experts import expert_ffn_backward_blocks, expert_ffn_blocks
from ._cpu_one_token import one_planned_token
from ._dispatch import accumulator, cast_for_autocast, is_plain, register_kernel, register_reference
from .combine import check_gates, combine_reference
from .grouped_gemm import (
    add_weight_grad_reference,
    bias_grad_reference,
    check_main_grad,
    grouped_gemm_reference,
    input_grad_reference,
    weight_grad_reference,
)
from .permute import gather_rows_reference, scatter_rows_reference
from .plan import RoutingPlan, check_plan

# --- contract: schema and output shapes, known before any graph is captured -------------

torch.library.define(
    "moe_runtime::expert_ffn",
    "(Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, Tensor weight,"
    " Tensor? residual, Tensor row, Tensor token, Tensor slot, Tensor offset, Tensor tile_end,"
    " str activation, bool keep_h) -> (Tensor y, Tensor h)",
)
# Without h, it is computed again. `needs` says which of the six gradients are wanted; one that is not has 0
# elements, and so has one that is added to a main gradient, in an operation of its own: this one stays pure.
_OPERANDS = (
    "Tensor grad_out, Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias,"
    " Tensor weight, Tensor row, Tensor token, Tensor slot, Tensor offset, Tensor tile_end, Tensor? h,"
    " str activation, bool[] needs"
)
_GRADS = "(Tensor dx, Tensor dgate_up, Tensor ddown, Tensor dgate_up_bias, Tensor ddown_bias, Tensor dweight)"
torch.library.define("moe_runtime::expert_ffn_backward", f"({_OPERANDS}) -> {_GRADS}")
torch.library.define(
    "moe_runtime::expert_ffn_add_backward",
    f"({_OPERANDS}, Tensor(a!)? gate_up_main_grad, Tensor(b!)? down_main_grad) -> {_GRADS}",
)
_expert_ffn = torch.ops.moe_runtime.expert_ffn.default
_expert_ffn_backward = torch.ops.moe_runtime.expert_ffn_backward.default
_expert_ffn_add_backward = torch.ops.moe_runtime.expert_ffn_add_backward.default


@torch.library.register_fake("moe_runtime::expert_ffn")
def _(x, gate_up, *rest):
    residual, _, token, *_, keep_h = rest[4:]
    y = (x if residual is None else residual).new_empty(x.shape)
    return y, x.new_empty(token.shape[0] if keep_h else 0, gate_up.shape[1])


@torch.library.register_fake("moe_runtime::expert_ffn_backward")
def _gradient_shapes(grad_out, x, gate_up, down, gate_up_bias, down_bias, weight, *rest):
    needs = rest[-1]
    results = (
        (x, x.shape),
        (gate_up, gate_up.shape),
        (down, down.shape),
        (x, gate_up.shape[:2]),
        (x, down.shape[:2]),
        (weight, weight.shape),
    )
    return tuple(
        like.new_empty(shape if needed else (0,))
        for (like, shape), needed in zip(results, needs, strict=True)
    )


@torch.library.register_fake("moe_runtime::expert_ffn_add_backward")
def _(*arguments):
    *operands, needs, gate_up_main_grad, down_main_grad = arguments
    return _gradient_shapes(*operands, _returned(needs, gate_up_main_grad, down_main_grad))


def _returned(
    needs: Sequence[bool], gate_up_main_grad: Tensor | None, down_main_grad: Tensor | None
) -> list[bool]:
    """Which gradients are returned: those that are needed and not added to a main gradient."""
    x, gate_up, down, *rest = needs
    return [x, gate_up and gate_up_main_grad is None, down and down_main_grad is None, *rest]


# --- reference: the definition, in the plainest PyTorch; the CPU path is in _cpu_experts.py ----


def expert_ffn_reference(  # noqa: PLR0913 - the operation's own arguments, in its schema's order
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    weight_TK: Tensor,
    residual_TD: Tensor | None,
    row_TK: Tensor,
    token_N: Tensor,
    slot_N: Tensor,
    offset_E: Tensor,
    tile_end_ME: Tensor,
    activation: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    x_ND = gather_rows_reference(x_TD, token_N)
    h_NG = grouped_gemm_reference(x_ND, gate_up_EGD, offset_E, gate_up_bias_EG)
    a_NF = activate(h_NG.to(accumulator(h_NG.dtype)), down_EDF.shape[2], activation).to(x_TD.dtype)
    y_ND = grouped_gemm_reference(a_NF, down_EDF, offset_E, down_bias_ED)
    y_TD = combine_reference(y_ND, weight_TK, row_TK, residual_TD)
    return y_TD, h_NG if keep_h else h_NG.new_empty(0, h_NG.shape[1])


def expert_ffn_backward_reference(  # noqa: PLR0913 - the operation's own arguments, in its schema's order
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    weight_TK: Tensor,
    row_TK: Tensor,
    token_N: Tensor,
    slot_N: Tensor,
    offset_E: Tensor,
    tile_end_ME: Tensor,
    h_NG: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    gate_up_main_grad: Tensor | None = None,
    down_main_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    needs_x, needs_gate_up, needs_down, needs_gate_up_bias, needs_down_bias, needs_weight = needs
    dtype, acc = x_TD.dtype, accumulator(x_TD.dtype)
    dx, dgate_up, ddown, dgate_up_bias, ddown_bias = (x_TD.new_empty(0) for _ in range(5))
    dweight = weight_TK.new_empty(0)

    grad_ND = gather_rows_reference(grad_TD.to(dtype), token_N)
    weight_N1 = gather_rows_reference(weight_TK.reshape(-1, 1).to(acc), slot_N)
    wide_NG = _h(h_NG, x_TD, gate_up_EGD, gate_up_bias_EG, token_N, offset_E).to(acc)
    if needs_weight or needs_down:
        a_NF = activate(wide_NG, down_EDF.shape[2], activation)
    if needs_down:
        ddown = _weight_grad(grad_ND, (weight_N1 * a_NF).to(dtype), offset_E, down_main_grad)
    if needs_down_bias:
        ddown_bias = bias_grad_reference(weight_N1 * grad_ND.to(acc), offset_E).to(dtype)
    if needs_weight or needs_x or needs_gate_up or needs_gate_up_bias:
        da_NF = input_grad_reference(grad_ND, down_EDF, offset_E).to(acc)
    if needs_weight:
        dweight_N = (da_NF * a_NF).sum(1) + _bias_product(grad_ND, down_bias_ED, offset_E)
        dweight = gather_rows_reference(dweight_N[:, None], row_TK.flatten()).view_as(row_TK)
        dweight = dweight.to(weight_TK.dtype)
    if needs_x or needs_gate_up or needs_gate_up_bias:
        dh_NG = activate_backward(weight_N1 * da_NF, wide_NG, activation).to(dtype)
    if needs_gate_up:
        x_ND = gather_rows_reference(x_TD, token_N)
        dgate_up = _weight_grad(dh_NG, x_ND, offset_E, gate_up_main_grad)
    if needs_gate_up_bias:
        dgate_up_bias = bias_grad_reference(dh_NG, offset_E)
    if needs_x:
        dx = scatter_rows_reference(input_grad_reference(dh_NG, gate_up_EGD, offset_E), row_TK)
    return dx, dgate_up, ddown, dgate_up_bias, ddown_bias, dweight


def _h(
    h_NG: Tensor | None,
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    bias_EG: Tensor | None,
    token_N: Tensor,
    offset_E: Tensor,
) -> Tensor:
    """h as it was kept, or computed again."""
    if h_NG is None:
        return grouped_gemm_reference(gather_rows_reference(x_TD, token_N), gate_up_EGD, offset_E, bias_EG)
    return h_NG


def _weight_grad(grad_NO: Tensor, x_NI: Tensor, offset_E: Tensor, main_grad_EOI: Tensor | None) -> Tensor:
    """The gradient of a weight, or 0 elements if it was added to a main gradient."""
    if main_grad_EOI is None:
        return weight_grad_reference(grad_NO, x_NI, offset_E)
    add_weight_grad_reference(grad_NO, x_NI, main_grad_EOI, offset_E)
    return x_NI.new_empty(0)


def _bias_product(grad_ND: Tensor, bias_ED: Tensor | None, offset_E: Tensor) -> Tensor:
    """<grad[n], bias[e]> for the rows of each expert; grad is zero in rows past the last expert's."""
    acc = accumulator(grad_ND.dtype)
    if bias_ED is None:
        return torch.zeros(grad_ND.shape[0], dtype=acc, device=grad_ND.device)
    row_N = torch.arange(grad_ND.shape[0], dtype=torch.int32, device=grad_ND.device)
    expert_N = torch.searchsorted(offset_E, row_N, right=True).clamp(max=bias_ED.shape[0] - 1)
    return (grad_ND.to(acc) * bias_ED[expert_N].to(acc)).sum(1)


# the same on the CPU, for all devices without kernels of their own
register_reference("moe_runtime::expert_ffn")(expert_ffn_blocks)
register_reference("moe_runtime::expert_ffn_backward")(expert_ffn_backward_blocks)
register_reference("moe_runtime::expert_ffn_add_backward")(expert_ffn_backward_blocks)


# --- GPU: Triton is imported by the first launch, never by `import` ---------------------

register_kernel("moe_runtime::expert_ffn", "expert_ffn", "launch_expert_ffn")
register_kernel("moe_runtime::expert_ffn_backward", "expert_ffn", "launch_expert_ffn_backward")
register_kernel("moe_runtime::expert_ffn_add_backward", "expert_ffn", "launch_expert_ffn_backward")


# --- autograd and the public function ---------------------------------------------------


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, recompute, ctx.gate_up_main_grad, ctx.down_main_grad = inputs
        x, gate_up, down, gate_up_bias, down_bias, weight, _, *plan, ctx.activation = operands
        # a gradient for the residual alone needs nothing from inside
        differentiable = any(ctx.needs_input_grad[:6])
        keep_h = differentiable and not recompute
        y, h = _expert_ffn(*operands, keep_h)
        if differentiable:
            again = (gate_up_bias, None) if recompute else (None, h)
            ctx.save_for_backward(x, gate_up, down, again[0], down_bias, weight, *plan, again[1])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_out = grad_out.contiguous()
        dresidual = grad_out if ctx.needs_input_grad[6] else None
        # order of the inputs: x, gate_up, down, gate_up_bias, down_bias, weight, residual, then the others
        needs = list(ctx.needs_input_grad[:6])
        if not any(needs):
            return (None,) * 6 + (dresidual,) + (None,) * 9
        operands = (grad_out, *ctx.saved_tensors, ctx.activation, needs)
        main_grads = (ctx.gate_up_main_grad, ctx.down_main_grad)
        if main_grads == (None, None):
            grads = _expert_ffn_backward(*operands)
        else:
            grads = _expert_ffn_add_backward(*operands, *main_grads)
            torch.autograd.graph.increment_version([grad for grad in main_grads if grad is not None])
        returned = _returned(needs, *main_grads)
        wanted = (grad if is_there else None for grad, is_there in zip(grads, returned, strict=True))
        return (*wanted, dresidual) + (None,) * 9


def expert_ffn(  # noqa: PLR0913 - a whole layer: its weights, its routing, its residual
    x_TD: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weight_TK: Tensor,
    plan: RoutingPlan,
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual_TD: Tensor | None = None,
    recompute: bool = False,
    gate_up_main_grad: Tensor | None = None,
    down_main_grad: Tensor | None = None,
) -> Tensor:
    """Every token through its K experts, weighted, summed, plus the residual.

    Args:
        x_TD: tokens, bf16, fp16, fp32 or fp64.
        gate_up_proj: [E, 2F, D], the gate's rows first, or [E, F, D] for experts without a gate; x's dtype.
        down_proj: [E, D, F], x's dtype; F decides whether the experts are gated.
        weight_TK: gate of each (token, choice); any float dtype, float32 from `route_topk`.
        plan: from `make_plan`, for the same T, K and E.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu" or "relu2" (squared ReLU).
        gate_up_bias: [E, 2F] or [E, F], x's dtype.
        down_bias: [E, D], x's dtype; weighted by the gate like the rest of the expert's output.
        residual_TD: added in float32 before the one rounding; any float dtype.
        recompute: keep x for backward and not h, N * 2F or N * F numbers, which backward then computes a
            second time: one product of the forward's two. No bit of a result changes.
        gate_up_main_grad: contiguous, float32 (float64 for float64), gate_up_proj's shape; backward adds
            the weight's gradient to it, unrounded, and returns none for the weight. Every backward pass
            through this call adds, whatever inputs it is asked for, and a second pass adds again. Untouched
            where the weight requires no gradient. Shares no memory with weights or the other main gradient.
        down_main_grad: the same for down_proj.

    Returns:
        y_TD in the residual's dtype, or without one in x's (autocast's where that is on).

    Raises:
        ValueError: shapes, dtypes, devices or names are wrong. Non-contiguous tensors are copied first.
    """
    x_TD, *parameters = _cast(x_TD, gate_up_proj, down_proj, gate_up_bias, down_bias)
    _check_operands(x_TD, *parameters)
    check_choice("expert_ffn", "activation", activation, tuple(ACTIVATIONS))
    T, K = check_plan("expert_ffn", plan, x_TD.device)
    E, D = down_proj.shape[:2]
    check_shape("expert_ffn", "x", x_TD, (T, D), "(T, D)")
    check_shape("expert_ffn", "plan.offset_E", plan.offset_E, (E,), "(E,)")
    op, (gate_up, down, *_) = "expert_ffn", parameters
    given: dict[str, Tensor | None] = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
    check_main_grad(op, "gate_up_main_grad", gate_up_main_grad, "gate_up_proj", gate_up, given)
    given["gate_up_main_grad"] = gate_up_main_grad
    check_main_grad(op, "down_main_grad", down_main_grad, "down_proj", down, given)
    check_gates("expert_ffn", weight_TK, residual_TD, (T, K, D), x_TD.device)
    operands = (x_TD, *parameters, weight_TK, residual_TD)
    operands = tuple(None if tensor is None else tensor.contiguous() for tensor in operands)
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in operands)
    if torch.is_grad_enabled() and differentiable:
        options = (activation, recompute, gate_up_main_grad, down_main_grad)
        return _ExpertFFN.apply(*operands, *plan, *options)
    if T == 1 and is_plain(x_TD) and is_plain(plan.row_TK):
        y_1D = one_planned_token(operands, plan, activation)
        if y_1D is not None:
            return y_1D
    y_TD, _ = _expert_ffn(*operands, *plan, activation, False)
    return y_TD


def _cast(x_TD: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor | None) -> tuple[Any, ...]:
    """The operands in autocast's dtype where that is on, except for weights that may stay wide."""
    x_TD, *narrow = cast_for_autocast(x_TD, *biases)
    if not _rounds_weights(x_TD):
        return *cast_for_autocast(x_TD, gate_up, down), *narrow
    weights = (
        weight if weight.dtype == torch.float32 else weight.to(x_TD.dtype) for weight in (gate_up, down)
    )
    return x_TD, *weights, *narrow


def _rounds_weights(x_TD: Tensor) -> bool:
    """Whether float32 weights are rounded to x's dtype inside the operation: on a CPU, under autocast."""
    is_narrow = x_TD.dtype in (torch.bfloat16, torch.float16)
    return x_TD.device.type == "cpu" and is_narrow and torch.is_autocast_enabled("cpu")


def _check_operands(
    x_TD: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None
) -> None:
    op = "expert_ffn"
    check_dims(op, "x", x_TD, "(T, D)")
    check_dtype(op, "x", x_TD, FLOATS)
    check_dims(op, "down_proj", down, "(E, D, F)")
    check_dims(op, "gate_up_proj", gate_up, "(E, 2F, D)")
    E, D, F = down.shape
    G = gate_up.shape[1]
    if gate_up.shape != (E, G, D) or G not in (F, 2 * F):
        raise ValueError(
            f"{op}: gate_up_proj must have shape (E, 2F, D) = {(E, 2 * F, D)}, or (E, F, D) without a gate, "
            f"as down_proj (E, D, F) = {(E, D, F)} says, got {tuple(gate_up.shape)}"
        )
    for name, tensor, shape, letters in (
        ("gate_up_proj", gate_up, (E, G, D), "(E, G, D)"),
        ("down_proj", down, (E, D, F), "(E, D, F)"),
        ("gate_up_bias", gate_up_bias, (E, G), "(E, G)"),
        ("down_bias", down_bias, (E, D), "(E, D)"),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, shape, letters)
            if _rounds_weights(x_TD) and tensor.dtype == torch.float32:
                check_device(op, name, tensor, x_TD.device)
            else:
                check_same(op, name, tensor, "x", x_TD)
