"""Other libraries' routers behind the signature `logits_TE -> (weight_TK, expert_TK)`, for the comparison."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Router = Callable[[Tensor], tuple[Tensor, Tensor]]


class _NoProjection:
    """torch.nn.functional, but `linear` hands its input through: a router then starts from the logits."""

    def __getattr__(self, name: str) -> Any:
        return (lambda x, weight: x) if name == "linear" else getattr(F, name)


def _from_logits(router: torch.nn.Module) -> Router:
    forward = type(router).forward
    routed = FunctionType(forward.__code__, {**forward.__globals__, "F": _NoProjection()}, forward.__name__)

    def route(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        _, weight_TK, expert_TK = routed(router, logits_TE)
        return weight_TK, expert_TK

    return route


def _place(router: torch.nn.Module, device: str) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    return router.to(device).eval()


def mixtral_router(num_experts: int, experts_per_token: int, device: str) -> Router:
    """transformers' softmax, top-k and renormalisation."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    config = MixtralConfig(
        hidden_size=num_experts, num_local_experts=num_experts, num_experts_per_tok=experts_per_token
    )
    return _from_logits(_place(MixtralTopKRouter(config), device))


def qwen3_router(num_experts: int, experts_per_token: int, device: str) -> Router:
    """The same with Qwen3-MoE's code, which rounds the gates to the logits' dtype."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(
        hidden_size=num_experts,
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=True,
    )
    return _from_logits(_place(Qwen3MoeTopKRouter(config), device))


def deepseek_router(
    num_experts: int, experts_per_token: int, num_groups: int, groups_kept: int, device: str
) -> Router:
    """Sigmoid scores, the best groups by the sum of their best two, renormalised gates."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=num_experts,
        n_routed_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        n_group=num_groups,
        topk_group=groups_kept,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    return _from_logits(_place(DeepseekV3TopkRouter(config), device))
