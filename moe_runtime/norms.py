"""RMSNorm and LayerNorm over the last axis, with the weight a layer or each head of a layer owns.

Both normalise in float32 whatever the input's dtype, round to it, and then apply the weight, as Llama does;
they return the input's dtype. Where x holds some heads of a layer only, `head`, integers of x's shape without
its last axis, says which.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_runtime.config import Norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight. `shape` is (D,), or (heads, P) for one row of weights per head."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        return (F.rms_norm(x, x.shape[-1:], eps=self.eps) * _weight(self.weight, head)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class OffsetRMSNorm(RMSNorm):
    """x / sqrt(mean(x²) + eps) · (1 + weight), in float32 or wider to the end (Gemma)."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__(*shape, eps=eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1.0 + _weight(self.weight, head).to(wide)
        return (F.rms_norm(x.to(wide), x.shape[-1:], eps=self.eps) * weight).to(x.dtype)


class JointRMSNorm(RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight over all heads of an attention expert together (OLMo 2).

    x is [..., heads, P] with the heads of any number of experts in the order [slot][expert][head in group]:
    1 slot where experts lie one after another, as many as key-value heads where they share these.
    """

    def __init__(self, heads: int, head_dim: int, *, slots: int, group: int, eps: float) -> None:
        super().__init__(heads, head_dim, eps=eps)
        self.by_expert = (slots, -1, group)

    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        by_expert = wide.unflatten(-2, self.by_expert)
        scale = torch.rsqrt(by_expert.square().mean((-4, -2, -1), keepdim=True) + self.eps)
        return ((by_expert * scale).view_as(x) * _weight(self.weight, head)).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) · weight, + bias if asked (Cohere: no). `shape` as in RMSNorm."""

    def __init__(self, *shape: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * _weight(self.weight, head)
        return (y if self.bias is None else y + _weight(self.bias, head)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, bias={self.bias is not None}"


def _weight(weight: Tensor, head: Tensor | None) -> Tensor:
    """The whole weight, or the row of each head, then in float32 or wider.

    As an embedding, whose gradient sums in a fixed order; in float32, because a long sum in bfloat16 stalls.
    """
    if head is None:
        return weight
    return F.embedding(head, weight.to(torch.promote_types(weight.dtype, torch.float32)))


def make_norm(kind: Norm, *shape: int, eps: float, bias: bool = False) -> RMSNorm | LayerNorm:
    """The norm of that kind; an RMSNorm has no bias, which BlockConfig checks."""
    if kind == "layer_norm":
        return LayerNorm(*shape, eps=eps, bias=bias)
    return (OffsetRMSNorm if kind == "offset_rms_norm" else RMSNorm)(*shape, eps=eps)
