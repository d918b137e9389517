"""Experts: the stacked weights of a Mixture of Experts, and the call into the fused expert layer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from moe_runtime_kernels import combine, expert_ffn, gathered_grouped_gemm, grouped_gemm, make_plan
from torch import Tensor, nn

from moe_runtime.config import Activation, FeedForwardConfig
from moe_runtime.routers import INITIAL_STD

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Experts(nn.Module):
    """E feed-forward networks, stacked as transformers 5 stores them: `gate_up_proj [E, 2F, D]`, gate rows
    first (`[E, F, D]` without a gate), and `down_proj [E, D, F]`, with one bias row per expert where
    configured.
    """

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        if config.router is None:
            raise ValueError("router must be a RouterConfig for a layer with experts, got None")
        E, F_, D = config.router.num_experts, config.intermediate_size, config.hidden_size
        G = 2 * F_ if config.gated else F_
        self.config = config
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, G, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        self.gate_up_bias = nn.Parameter(torch.zeros(E, G)) if config.bias else None
        self.down_bias = nn.Parameter(torch.zeros(E, D)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, std=INITIAL_STD)
        nn.init.normal_(self.down_proj, std=INITIAL_STD)

    def forward(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, residual_TD: Tensor | None = None
    ) -> Tensor:
        """y_TD = residual + Σ over k of weight[t, k] · FFN of expert[t, k] (x[t]).

        Args:
            x_TD: tokens, in the dtype of the weights, or any under autocast.
            expert_TK: chosen experts; an id of num_experts or more is dropped.
            weight_TK: gates, float32.
            residual_TD: added in the last step of the fused layer, which saves one pass over the output.
        """
        plan = make_plan(expert_TK.int(), self.num_experts)
        dtype, added_later = x_TD.dtype, None
        if torch.is_autocast_enabled(x_TD.device.type):
            # custom operations do not autocast by themselves, and the residual stream keeps its own dtype
            dtype = torch.get_autocast_dtype(x_TD.device.type)
            residual_TD, added_later = None, residual_TD
        weights = [
            None if weight is None else weight.to(dtype)
            for weight in (self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias)
        ]
        forward = self._with_dropout if self.training and self.config.expert_dropout > 0 else self._fused
        y_TD = forward(x_TD.to(dtype), weights, weight_TK, plan, residual_TD)
        return y_TD if added_later is None else added_later + y_TD

    def _fused(self, x_TD, weights, weight_TK, plan, residual_TD):
        gate_up_proj, down_proj, gate_up_bias, down_bias = weights
        return expert_ffn(
            x_TD,
            gate_up_proj,
            down_proj,
            weight_TK,
            plan,
            activation=self.config.activation,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            residual_TD=residual_TD,
        )

    def _with_dropout(self, x_TD, weights, weight_TK, plan, residual_TD):
        """The same layer from its parts, because dropout falls between the two projections."""
        gate_up_proj, down_proj, gate_up_bias, down_bias = weights
        h_NG = gathered_grouped_gemm(x_TD, gate_up_proj, plan, gate_up_bias)
        hidden_NF = activate(h_NG, self.config.activation, self.config.gated)
        hidden_NF = F.dropout(hidden_NF, self.config.expert_dropout)
        return combine(grouped_gemm(hidden_NF, down_proj, plan, down_bias), weight_TK, plan, residual_TD)

    def extra_repr(self) -> str:
        E, D, F_ = self.down_proj.shape
        return f"{E} experts, {D} -> {F_} -> {D}, {self.config.activation}, gated={self.config.gated}"


def activate(h: Tensor, activation: Activation, gated: bool) -> Tensor:
    """act(gate) · up for a gated pre-activation [..., 2F], gate columns first; act(h) otherwise."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(h)
    gate, up = h.chunk(2, dim=-1)
    return act(gate) * up
