"""Feed-forward layers: dense, and a Mixture of Experts with an optional shared expert.

Both take the residual stream, so that a block adds once.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_runtime.config import FeedForwardConfig
from moe_runtime.experts import ACTIVATIONS, Experts
from moe_runtime.linear import Linear
from moe_runtime.routers import Routing, TopKRouter


class DenseFeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        D, F, bias = config.hidden_size, config.intermediate_size, config.bias
        self.gate_proj = Linear(D, F, bias=bias) if config.gated else None
        self.up_proj = Linear(D, F, bias=bias)
        self.down_proj = Linear(F, D, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., D] -> y [..., D], plus the residual if one is given."""
        up = self.up_proj(x)
        hidden = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        y = self.down_proj(hidden)
        return y if residual is None else residual + y


class MoEFeedForward(nn.Module):
    """A router and its experts, and a shared expert that every token passes where one is configured.

    In training, `expert_dropout` falls on the hidden activations of the routed experts only (FLAN-MoE).
    """

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        if config.router is None:
            raise ValueError(
                "router must be a RouterConfig for a Mixture of Experts, got None; use DenseFeedForward"
            )
        self.config = config
        self.router = TopKRouter(config.router)
        self.experts = Experts(config)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_intermediate_size:
            dense = replace(config, router=None, intermediate_size=config.shared_intermediate_size)
            self.shared_expert = DenseFeedForward(dense)
            if config.shared_gate:
                self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        token_mask: Tensor | None = None,
        statistics: bool = True,
    ) -> tuple[Tensor, Routing]:
        """x [..., D] -> y [..., D], plus the residual if one is given, and what the router decided.

        Args:
            x: tokens, any leading axes; they are flattened to T.
            residual: same shape as x.
            token_mask: bool, the leading axes of x, False for padding: such a token counts in no loss or
                statistic.
            statistics: whether a TopKRouter is asked for its losses and counts, which cost a decoded token
                more than its choice.
        """
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(x)) * shared
            residual = shared if residual is None else residual + shared
        x_TD = x.flatten(0, -2)
        residual_TD = None if residual is None else residual.flatten(0, -2)
        mask_T = None if token_mask is None else token_mask.flatten()
        options = {} if statistics or not isinstance(self.router, TopKRouter) else {"statistics": False}
        routing = self.router(x_TD, mask_T, *self._sequences(x), **options)
        # by position: a module that replaces `experts` and knows no residual must fail, not lose it
        inputs = (x_TD, routing.expert_TK, routing.weight_TK)
        y_TD = self.experts(*inputs) if residual_TD is None else self.experts(*inputs, residual_TD)
        return y_TD.view(x.shape), routing

    def _sequences(self, x: Tensor) -> tuple[int, ...]:
        """Their number, for a router that wants to know it."""
        assert self.config.router is not None
        return (math.prod(x.shape[:-2]),) if self.config.router.balance_over == "sequence" else ()
