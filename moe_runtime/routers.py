"""Routers: which experts a token goes to, and with which weight. Arithmetic is float32 in every model."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moe_runtime_kernels import route_expert_choice, route_topk
from torch import Tensor, nn

from moe_runtime.config import RouterConfig, Score
from moe_runtime.losses import z_loss

INITIAL_STD = 0.02  # never zero: equal scores would send every token to the same experts


class Routing(NamedTuple):
    """What a router decided. Float tensors are float32 (float64 for float64 input), integers int32.

    The last three are None where no statistics were asked for.
    """

    logits_TE: Tensor
    weight_TK: Tensor  # gate of each chosen expert
    expert_TK: Tensor  # the K chosen experts, ties to the lowest index
    count_E: Tensor | None  # tokens that chose each expert, padding not counted
    balance_loss: Tensor | None  # scalar, 1 when balanced
    z_loss: Tensor | None  # scalar


class TopKRouter(nn.Module):
    """Each token chooses its K best experts of E by a linear score.

    `selection_bias` is added to scores for the choice only and learns by no gradient: see
    `update_selection_bias`.
    """

    selection_bias: Tensor | None

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer(
            "selection_bias", torch.zeros(config.num_experts) if config.selection_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(
        self,
        x_TD: Tensor,
        token_mask_T: Tensor | None = None,
        num_sequences: int = 1,
        statistics: bool = True,
    ) -> Routing:
        """Route tokens; those whose `token_mask_T` is False are routed too, but count in no statistic and no
        loss. `num_sequences` divides T and is used where `balance_over` is "sequence".

        Raises:
            ValueError: in training, if the gate is constant and the language-model loss could never train the
                router.
        """
        config = self.config
        constant_gate = config.gate == "renorm" and config.experts_per_token == 1
        if constant_gate and not config.aux_only and _trains(self):
            raise ValueError(
                "gate must not be 'renorm' with experts_per_token = 1 in training: the gate is always 1 and "
                "the loss never reaches the router; use 'straight_through' or 'raw', or set aux_only=True to "
                "train the router by its auxiliary losses alone"
            )
        logits_TE = _float32_logits(x_TD, self.weight)
        chosen = route_topk(
            logits_TE,
            config.experts_per_token,
            score=config.score,
            gate=config.gate,
            scale=config.scale,
            bias_E=None if self.selection_bias is None else self.selection_bias.to(logits_TE.dtype),
            num_groups=config.num_groups,
            groups_kept=config.groups_kept,
            group_score=config.group_score,
            token_mask_T=token_mask_T,
            num_sequences=num_sequences if config.balance_over == "sequence" else 1,
            statistics=statistics,
        )
        return Routing(logits_TE, *chosen)

    @torch.no_grad()
    def update_selection_bias(self, count_E: Tensor, gamma: float = 1e-3) -> None:
        """Move the bias by gamma towards experts with less than the mean load. Call it after each optimiser
        step.

        b_e += gamma · sign(mean(count) - count_e), the auxiliary-loss-free balancing of DeepSeek-V3.

        Args:
            count_E: tokens that chose each expert in the step, summed over micro-batches and devices.

        Raises:
            ValueError: if the router was configured without a selection bias.
        """
        if self.selection_bias is None:
            raise ValueError("selection_bias must be True in the RouterConfig to be updated, got False")
        load_E = count_E.to(self.selection_bias)
        self.selection_bias += gamma * torch.sign(load_E.mean() - load_E)

    def extra_repr(self) -> str:
        config = self.config
        experts = f"{config.num_experts} experts, {config.experts_per_token} per token"
        return f"{experts}, {config.score}, {config.gate}"


class ExpertChoiceRouter(nn.Module):
    """Each expert chooses its `capacity_factor`·T / E best tokens, rounded up: every load is the same.

    For the place of `MoEFeedForward.router`. `weight_TK` and `expert_TK` have K = E columns, of which a token
    uses those of the experts that took it. `balance_loss` is always 1. Source: Zhou et al. 2022.

    Args:
        hidden_size: D.
        num_experts: E.
        capacity_factor: experts that take a token, on average.
        score: gate of a taken token, "softmax" over the experts or "sigmoid".
        causal: whether tokens are predicted from earlier ones.
        allow_future_leak: a causal model must say that it may, because the choice depends on later tokens.

    Raises:
        ValueError: capacity_factor is not positive, or a causal model may not see later tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        score: Score = "softmax",
        causal: bool = True,
        allow_future_leak: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < capacity_factor <= num_experts:
            raise ValueError(
                f"capacity_factor must be above 0 and at most num_experts ({num_experts}), "
                f"got {capacity_factor}"
            )
        if causal and not allow_future_leak:
            raise ValueError(
                "allow_future_leak must be True in a causal model, got False: whether an expert takes a "
                "token depends on later tokens; use TopKRouter, or causal=False in an encoder"
            )
        self.capacity_factor = capacity_factor
        self.score = score
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, x_TD: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        """Let the experts choose among the tokens; those whose `token_mask_T` is False are never chosen, but
        count in T.
        """
        logits_TE = _float32_logits(x_TD, self.weight)
        T, E = logits_TE.shape
        tokens_per_expert = max(1, math.ceil(self.capacity_factor * T / E))
        chosen = route_expert_choice(
            logits_TE,
            tokens_per_expert,
            score=self.score,
            token_mask_T=token_mask_T,
            allow_future_leak=True,  # asked for when this was made
        )
        balance_loss = logits_TE.new_ones(())
        return Routing(logits_TE, *chosen, balance_loss, z_loss(logits_TE, token_mask_T))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} experts, capacity_factor={self.capacity_factor}, {self.score}"


class SoftRouter(nn.Module):
    """A weight for every expert of a soft mixture: softmax over all of them."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, x_TD: Tensor) -> Tensor:
        """gate_TA, float32 (float64 for float64 input); rows sum to 1."""
        return _float32_logits(x_TD, self.weight).softmax(dim=-1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} experts"


class TopKSoftRouter(nn.Module):
    """The `top_k` largest entries of a softmax over all experts; with `renormalise` they sum to 1."""

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int, renormalise: bool = False) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
        self.top_k = top_k
        self.renormalise = renormalise
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """weight_TK, float32 (float64 for float64 input), and expert_TK, int32; ties go to the lowest expert.

        Raises:
            ValueError: in training, if top_k = 1 is renormalised: the constant gate 1 would never train the
                router.
        """
        if self.top_k == 1 and self.renormalise and _trains(self):
            raise ValueError(
                "renormalise must be False with top_k = 1 in training: the gate is always 1 and the loss "
                "never reaches the router"
            )
        logits_TA = _float32_logits(x_TD, self.weight)
        gate = "renorm" if self.renormalise else "raw"
        chosen = route_topk(logits_TA, self.top_k, gate=gate, statistics=False)
        return chosen.weight_TK, chosen.expert_TK

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} experts, top_k={self.top_k}, renormalise={self.renormalise}"


def _trains(router: TopKRouter | TopKSoftRouter) -> bool:
    return router.training and torch.is_grad_enabled() and router.weight.requires_grad


def _float32_logits(x_TD: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in at least float32: autocast is off, because bfloat16 logits would flip close choices."""
    dtype, device = torch.promote_types(x_TD.dtype, torch.float32), x_TD.device.type
    # the meta device has none, and asking raises
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        return F.linear(x_TD.to(dtype), weight.to(dtype))
