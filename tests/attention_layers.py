"""Mixtures of attention: tiny random layers, where the heads of an expert are stored, and what gates are."""

import pytest
import torch
from tiny_models import perturb
from torch import Tensor, nn

from moe_runtime.attention import MixtureOfAttention
from moe_runtime.config import AttentionConfig

B, L, D, P, H, A = 2, 9, 12, 6, 4, 3
KV_VARIANTS = [
    pytest.param(kv, kv_heads, id=f"{kv}-kv-{kv_heads}-of-{H}-heads")
    for kv in ("expert", "shared")
    for kv_heads in (4, 2, 1)
]
EVERYTHING = {"bias": True, "output_bias": True, "qk_norm": "rms_norm"}


def mixture(kv="expert", kv_heads=2, num_experts=A, **options) -> MixtureOfAttention:
    torch.manual_seed(0)
    made = MixtureOfAttention(
        AttentionConfig(
            hidden_size=D,
            num_heads=H,
            num_kv_heads=kv_heads,
            head_dim=P,
            num_experts=num_experts,
            kv=kv,
            **options,
        )
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    perturb(made)
    return made


# --- where the heads of one attention expert are stored: written here a second time, as the definition ---


def query_heads(config: AttentionConfig, expert: int) -> list[int]:
    if config.kv == "expert":
        return [expert * H + head for head in range(H)]
    group = H // config.num_kv_heads
    return [
        (kv_head * A + expert) * group + head
        for kv_head in range(config.num_kv_heads)
        for head in range(group)
    ]


def kv_heads(config: AttentionConfig, expert: int) -> list[int]:
    first = expert * config.num_kv_heads if config.kv == "expert" else 0
    return list(range(first, first + config.num_kv_heads))


def by_head(name: str, parameter: Tensor) -> Tensor:
    """A view of a parameter with heads as the first axis."""
    if name.endswith("norm.weight"):
        return parameter
    if name == "o_proj.weight":
        return parameter.unflatten(1, (-1, P)).movedim(1, 0)
    return parameter.unflatten(0, (-1, P))


def gates(router: nn.Module, x_TD: Tensor, top_k: int | None, renormalise: bool) -> Tensor:
    """The definition of gate_TA: a softmax over all experts, of which a top-k keeps the largest entries."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    gate_TA = (x_TD.to(wide) @ router.weight.to(wide).T).softmax(-1)
    if top_k is None:
        return gate_TA
    order_TA = gate_TA.detach().sort(dim=-1, descending=True, stable=True).indices
    gate_TA = gate_TA * torch.zeros_like(gate_TA).scatter(1, order_TA[:, :top_k], 1.0)
    return gate_TA / gate_TA.sum(-1, keepdim=True) if renormalise else gate_TA
