"""Attention and mixtures of attention, computed as ONE attention call over the heads of all experts.

Head order: with own keys and values [expert][head]; with shared keys and values [kv head][expert][head in
group], because grouped-query kernels expect the queries of one key-value head to be neighbours. Both are one
view of the attention's output, `o_TSAQ`: S = 1 and Q = H·P, or S = key-value heads and Q = (H / key-value
heads)·P.
"""

from typing import Any

import torch
import torch.nn.functional as F
from moe_runtime_kernels import attention_mix
from torch import Tensor, nn

from moe_runtime.config import AttentionConfig
from moe_runtime.norms import make_norm
from moe_runtime.routers import INITIAL_STD, SoftRouter

Rotary = tuple[Tensor, Tensor]  # cos and sin, [B or 1, L, R], of the R rotated pairs of every head; float32


class MixtureOfAttention(nn.Module):
    """Σ over attention experts a of gate[t, a] · (attention of expert a) · o_projᵀ; one expert is plain
    attention.

    `attend` computes the attention itself and may hold a cache; the default is causal attention by PyTorch.
    It is called as `attend(query, key, value, **attend_arguments)` with query [B, all heads, L, P], key and
    value [B, all key-value heads, L, P], and returns ([B, L, all heads, P], anything).
    """

    def __init__(self, config: AttentionConfig, attend: nn.Module | None = None) -> None:
        super().__init__()
        D, P, A = config.hidden_size, config.head_dim, config.num_experts
        heads, kv_heads = config.total_heads, config.total_kv_heads
        self.config = config
        self.q_proj = nn.Linear(D, heads * P, bias=config.bias)
        self.k_proj = nn.Linear(D, kv_heads * P, bias=config.bias)
        self.v_proj = nn.Linear(D, kv_heads * P, bias=config.bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            self.q_norm = make_norm(config.qk_norm, heads, P, eps=config.norm_eps)
            self.k_norm = make_norm(config.qk_norm, kv_heads, P, eps=config.norm_eps)
        self.attend = CausalAttention(config.sliding_window) if attend is None else attend
        self.router: SoftRouter | None = None
        self.o_proj: nn.Linear | MixtureProjection
        if A == 1:
            self.o_proj = nn.Linear(heads * P, D, bias=config.output_bias)
        else:
            self.router = SoftRouter(D, A, top_k=config.top_k, renormalise=config.renormalise_top_k)
            self.o_proj = MixtureProjection(heads * P, D, num_experts=A, bias=config.output_bias)

    def forward(self, x_BLD: Tensor, rotary: Rotary | None = None, **attend_arguments: Any) -> Tensor:
        """x_BLD -> y_BLD. `rotary` turns queries and keys, see `rotary_tables`; None encodes no position."""
        P = self.config.head_dim
        query, key, value = (
            projection(x_BLD).unflatten(-1, (-1, P)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = (rotate(x, rotary, self.config.rope_interleaved) for x in (query, key))
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        attended, _ = self.attend(*heads_first, **attend_arguments)
        if self.router is None:
            return self.o_proj(attended.flatten(2))
        S = 1 if self.config.kv == "expert" else self.config.num_kv_heads
        Q = self.config.num_heads // S * P  # not -1, which nothing decides when there are no tokens
        o_TSAQ = attended.reshape(x_BLD.shape[0] * x_BLD.shape[1], S, self.config.num_experts, Q)
        return self.o_proj(o_TSAQ, self.router(x_BLD.flatten(0, 1))).view(x_BLD.shape)


class MixtureProjection(nn.Module):
    """The output projections of all attention experts, `weight [D, all heads · P]`, applied and mixed in one
    GEMM.

    Each expert has a bias row of its own, `bias [A, D]`, scaled by its gate like the rest of its output.
    """

    def __init__(self, in_features: int, out_features: int, *, num_experts: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, o_TSAQ: Tensor, gate_TA: Tensor) -> Tensor:
        y_TD = attention_mix(o_TSAQ, gate_TA, self.weight)
        return y_TD if self.bias is None else y_TD + (gate_TA @ self.bias.to(gate_TA.dtype)).to(y_TD.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}"


class CausalAttention(nn.Module):
    """softmax(q kᵀ / sqrt(P)) v over the current and earlier positions, at most `sliding_window` of them."""

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        L = query.shape[2]
        mask_LL = None
        if self.sliding_window is not None and self.sliding_window < L:
            position_L = torch.arange(L, device=query.device)
            age_LL = position_L[:, None] - position_L
            mask_LL = (age_LL >= 0) & (age_LL < self.sliding_window)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_LL, is_causal=mask_LL is None, enable_gqa=grouped
        )
        return out.transpose(1, 2), None


def rotary_tables(position_BL: Tensor, rotated_width: int, theta: float = 10000.0) -> Rotary:
    """cos and sin of position · theta^(-2r / rotated_width), float32, for the R = rotated_width / 2 pairs of
    a head.

    Source: Su et al. 2021. `rotated_width` is the head's width, or less where only a part is rotated; it must
    be even.
    """
    if rotated_width % 2:
        raise ValueError(f"rotated_width must be even, got {rotated_width}")
    pair_R = torch.arange(0, rotated_width, 2, device=position_BL.device, dtype=torch.float32)
    angle_BLR = position_BL[..., None].float() * theta ** (-pair_R / rotated_width)
    return angle_BLR.cos(), angle_BLR.sin()


def rotate(x: Tensor, rotary: Rotary, interleaved: bool = False) -> Tensor:
    """Rotate the first 2R entries of every head of x [B, L, heads, P]; the rest passes through.

    A pair is (r, r + R), or with `interleaved` (2r, 2r + 1), as Cohere and GPT-J store their heads. Computed
    in the tables' dtype, returned in x's.
    """
    cos, sin = (table.unsqueeze(2) for table in rotary)
    rotated, passed = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    pairs = (
        rotated.unflatten(-1, (-1, 2)) if interleaved else rotated.unflatten(-1, (2, -1)).transpose(-1, -2)
    )
    first, second = pairs.to(torch.promote_types(x.dtype, cos.dtype)).unbind(-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((rotated.to(x.dtype), passed), dim=-1)
