"""`experts_implementation="moe_runtime"`: expert layers of transformers' models on this project's kernels.

    y[t] = sum over k of weight[t, k] * (expert index[t, k] of x[t])

A module in the usual layout runs as one `expert_ffn`. One with transposed weights, interleaved gates, an
activation of its own or a norm after its experts runs from the parts, its own code between two grouped
products. What neither can do goes to transformers' "grouped_mm", with one warning: the class, and why.
"""

from typing import Any

import torch
import torch.nn.functional as functional
from moe_runtime_kernels import (
    RoutingPlan,
    combine,
    expert_ffn,
    gather_rows,
    gathered_grouped_gemm,
    grouped_gemm,
    make_plan,
)
from moe_runtime_kernels._cpu_one_token import one_token_ffn
from torch import Tensor, nn
from transformers import activations
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.utils import logging

from moe_runtime.packed_experts import packed_forward

NAME = "moe_runtime"
INSTEAD = "grouped_mm"  # transformers' own default
MAX_EXPERTS = 1024  # of `make_plan`
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

logger = logging.get_logger(__name__)

# act_fn of an experts module, an object or a function, by the exact type or function; a subclass may differ
_ACTIVATIONS: dict[Any, str] = {
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    functional.silu: "silu",
    activations.GELUActivation: "gelu",
    functional.gelu: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    functional.relu: "relu",
    activations.ReLUSquaredActivation: "relu2",
}


def register() -> None:
    """Make "moe_runtime" a name that `experts_implementation` knows, in this process; repeatable."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' outputs, weighted and summed, as transformers' experts interface asks for them.

    Args:
        self: an experts module of transformers.
        hidden_states: [T, D]; another dtype than the weights' is cast to theirs, or to autocast's.
        top_k_index: [T, K], int32 or int64; an id of E or more adds nothing: expert parallelism marks with it
            the choices whose experts another process holds.
        top_k_weights: [T, K], any float dtype; products and sums over choices are float32.

    Returns:
        [T, D] in the dtype of hidden_states.

    Raises:
        ValueError: the module has an `expert_lora` and does not run as one `expert_ffn`.
    """
    reason = obstacle(self)
    activation = None if reason else fused_activation(self)
    adapter = getattr(self, "expert_lora", None)
    if adapter is not None and activation is None:
        raise ValueError(
            f"expert_lora must sit on experts that run as one expert_ffn, got {type(self).__name__}, which "
            f"runs on {served_by(self)}"
        )
    if reason is not None:
        if not torch.compiler.is_compiling():  # a logger would break the graph
            logger.warning_once(
                f"moe_runtime: {type(self).__name__} runs on transformers' {INSTEAD!r}, because {reason}"
            )
        return ALL_EXPERTS_FUNCTIONS[INSTEAD](self, hidden_states, top_k_index, top_k_weights)
    x_TD = hidden_states.to(_dtype(hidden_states, self.down_proj))
    if activation is not None:
        y_TD = packed_forward(self, x_TD, top_k_index, top_k_weights)
        if y_TD is not None:
            return y_TD.to(hidden_states.dtype)
    if activation is None:
        plan = make_plan(top_k_index, self.down_proj.shape[0])
        return _from_parts(self, x_TD, top_k_weights, plan).to(hidden_states.dtype)
    first, first_bias = first_product(self)
    operands = (x_TD, first, self.down_proj, top_k_weights)
    options: dict[str, Any] = {
        "activation": activation,
        "gate_up_bias": first_bias,
        "down_bias": self.down_proj_bias if self.has_bias else None,
    }
    y_TD = one_token_ffn(*operands, top_k_index, **options) if adapter is None else None
    if y_TD is None:
        plan = make_plan(top_k_index, self.down_proj.shape[0])
        y_TD = (expert_ffn if adapter is None else adapter)(*operands, plan, **options)
    return y_TD.to(hidden_states.dtype)


def served_by(module: Any) -> str:
    """What experts run on: "expert_ffn", "grouped_gemm" (the parts) or transformers' "grouped_mm"."""
    if obstacle(module) is not None:
        return INSTEAD
    return "grouped_gemm" if fused_activation(module) is None else "expert_ffn"


def obstacle(module: Any) -> str | None:
    """Why the kernels cannot run this experts module; None if they can."""
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"its {name} is not one tensor with three axes"
        if weight.dtype not in DTYPES:
            return f"its {name} is {str(weight.dtype).removeprefix('torch.')}, which no kernel takes"
        if weight.shape[0] > MAX_EXPERTS:
            return f"it has {weight.shape[0]} experts, more than {MAX_EXPERTS}"
    return None


def fused_activation(module: Any) -> str | None:
    """The activation with which `expert_ffn` is this module; None if it is another function."""
    own_gate = module.has_gate and type(module)._apply_gate is not _default_apply_gate
    own_layout = module.is_transposed or not module.is_concatenated
    if own_gate or own_layout or getattr(module, "has_post_expert_norm", False):
        return None
    act = module.act_fn
    return _ACTIVATIONS.get(type(act)) or _ACTIVATIONS.get(act)


def _dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of the products: autocast's where that is on, otherwise the weights'."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def first_product(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the first product, whatever it is called."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    return getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None


def _from_parts(module: Any, x_TD: Tensor, weight_TK: Tensor, plan: RoutingPlan) -> Tensor:
    """The layer with the module's own code between the products, and after them."""
    first, first_bias = first_product(module)
    down, down_bias = module.down_proj, module.down_proj_bias if module.has_bias else None
    if module.is_transposed:
        h_NG = transposed_grouped_gemm(gather_rows(x_TD, plan), first, plan, first_bias)
    else:
        h_NG = gathered_grouped_gemm(x_TD, first, plan, first_bias)
    a_NF = module._apply_gate(h_NG) if module.has_gate else module.act_fn(h_NG)
    product = transposed_grouped_gemm if module.is_transposed else grouped_gemm
    y_ND = product(a_NF.to(x_TD.dtype), down, plan, down_bias)
    if getattr(module, "has_post_expert_norm", False):
        y_ND = module.post_expert_norm(y_ND)
    return combine(y_ND, weight_TK, plan)


_input_grad = torch.ops.moe_runtime.grouped_gemm_input_grad.default
_grouped_gemm = torch.ops.moe_runtime.grouped_gemm.default
_weight_grad = torch.ops.moe_runtime.grouped_gemm_weight_grad.default
_bias_grad = torch.ops.moe_runtime.grouped_gemm_bias_grad.default


class _TransposedGroupedGemm(torch.autograd.Function):
    """y = x @ W is what the gradient of y = x @ W.T computes, and vice versa: no weight is copied."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor, tile_end: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offset, tile_end)
        y = _input_grad(x, weight, offset, tile_end)
        if bias is None:
            return y
        row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        expert = torch.searchsorted(offset, row, right=True).clamp(max=bias.shape[0] - 1)
        return y + bias.index_select(0, expert)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offset, tile_end = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_out = grad_out.contiguous()
        dx = _grouped_gemm(grad_out, weight, offset, tile_end, None) if needs_x else None
        dweight = _weight_grad(x, grad_out, offset) if needs_weight else None
        dbias = _bias_grad(grad_out, offset) if needs_bias else None
        return dx, dweight, dbias, None, None


def transposed_grouped_gemm(
    x_NI: Tensor, weight_EIO: Tensor, plan: RoutingPlan, bias_EO: Tensor | None = None
) -> Tensor:
    """Each expert's rows times its matrix, which is stored input first: y[n] = x[n] @ weight[e] + bias[e].

    Args:
        x_NI: rows in expert order.
        weight_EIO: one matrix per expert; cast to x's dtype where it has another.
        plan: from `make_plan`, for the same N and E.
        bias_EO: added to each of the expert's rows.

    Returns:
        y_NO in x's dtype; rows past the last expert's are not to be read.
    """
    weight_EIO = weight_EIO.to(x_NI.dtype).contiguous()
    bias_EO = None if bias_EO is None else bias_EO.to(x_NI.dtype).contiguous()
    operands = (x_NI.contiguous(), weight_EIO, bias_EO)
    return _TransposedGroupedGemm.apply(*operands, plan.offset_E, plan.tile_end_ME)
