"""Experts: the stacked weights of a Mixture of Experts, and the call into the fused expert layer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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

from moe_runtime.config import Activation, FeedForwardConfig
from moe_runtime.megablocks_backend import check_tensors, load_gmm, rows_per_expert
from moe_runtime.packed_experts import packed_forward
from moe_runtime.routers import INITIAL_STD


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# layers keep one as an attribute; no lambdas, which cannot be pickled
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
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
        if config.experts_backend == "megablocks":
            load_gmm()  # what is missing is said before there are weights
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
            x_TD: tokens, in the dtype of the weights.
            expert_TK: chosen experts; an id of num_experts or more is dropped.
            weight_TK: gates, float32.
            residual_TD: added in the last step of the fused layer, which saves one pass over the output.
        """
        drops_out = self.training and self.config.expert_dropout > 0
        if not drops_out:
            y_TD = packed_forward(self, x_TD, expert_TK, weight_TK, residual_TD)
            if y_TD is not None:
                return y_TD
        operands = (x_TD, self.gate_up_proj, self.down_proj, weight_TK)
        options: dict[str, Any] = {
            "activation": self.config.activation,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
            "residual_TD": residual_TD,
        }
        adapted = getattr(self, "expert_lora", None)
        if adapted is None and not drops_out and self.config.experts_backend == "moe_runtime":
            y_TD = one_token_ffn(*operands, expert_TK, **options)
            if y_TD is not None:
                return y_TD
        plan = make_plan(expert_TK.int(), self.num_experts)
        if adapted is not None:
            self.check_takes_lora()
            return adapted(*operands, plan, **options)
        if self.config.experts_backend == "megablocks":
            return self._by_megablocks(x_TD, weight_TK, plan, residual_TD)
        if drops_out:
            return self._with_dropout(x_TD, weight_TK, plan, residual_TD)
        return expert_ffn(*operands, plan, **options, recompute=self.config.recompute_experts)

    def check_takes_lora(self) -> None:
        """A ValueError if the configuration asks for what an `expert_lora` does not compute."""
        for option, wanted in (
            ("experts_backend", "moe_runtime"),
            ("expert_dropout", 0.0),
            ("recompute_experts", False),
        ):
            if getattr(self.config, option) != wanted:
                raise ValueError(
                    f"{option} must be {wanted!r} with expert_lora, got {getattr(self.config, option)!r}"
                )

    def _with_dropout(
        self, x_TD: Tensor, weight_TK: Tensor, plan: RoutingPlan, residual_TD: Tensor | None
    ) -> Tensor:
        """The same layer from its parts, because dropout falls between the two projections."""
        h_NG = gathered_grouped_gemm(x_TD, self.gate_up_proj, plan, self.gate_up_bias)
        hidden_NF = activate(h_NG, self.config.activation, self.config.gated)
        hidden_NF = F.dropout(hidden_NF, self.config.expert_dropout)
        return combine(
            grouped_gemm(hidden_NF, self.down_proj, plan, self.down_bias), weight_TK, plan, residual_TD
        )

    def _by_megablocks(
        self, x_TD: Tensor, weight_TK: Tensor, plan: RoutingPlan, residual_TD: Tensor | None
    ) -> Tensor:
        """The same layer with the products of megablocks."""
        check_tensors(x_TD, self.gate_up_proj)
        gmm, rows_E = load_gmm(), rows_per_expert(plan)
        h_NG = gmm(gather_rows(x_TD, plan), self.gate_up_proj, rows_E, trans_b=True)
        hidden_NF = activate(h_NG, self.config.activation, self.config.gated)
        hidden_NF = F.dropout(hidden_NF, self.config.expert_dropout, self.training)
        y_ND = gmm(hidden_NF, self.down_proj, rows_E, trans_b=True)
        return combine(y_ND, weight_TK, plan, residual_TD)

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
