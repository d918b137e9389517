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
    return LayerNorm(*shape, eps=eps, bias=bias) if kind == "layer_norm" else RMSNorm(*shape, eps=eps)
