"""attention_mix: output projection of all attention experts, each scaled by its gate, as one GEMM.

    y[t] = sum over a of gate[t, a] * (o of expert a at token t) @ (weight's columns of expert a).T

`o` is [T, S, A, Q] and the columns of `weight` are in the same order, C = S * A * Q. With keys and values per
expert S is 1 and Q all heads of one expert; with shared keys and values S counts the key-value heads.

Gradients, with G = dy @ weight, [T, S, A, Q]:  do = gate * G,  dgate[t, a] = sum over s, q of G * o,
dweight = dy^T (gate * o). The gate's gradient needs no product of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS, check_device, check_dims, check_dtype, check_same, check_shape
from ._cpu import product
from ._dispatch import accumulator, cast_for_autocast, register_kernel, register_reference

# --- contract: schema and output shape, known before any graph is captured --------------

torch.library.define("moe_runtime::attention_mix", "(Tensor o, Tensor gate, Tensor weight) -> Tensor")
# `needs` says which of do, dgate and dweight are wanted; one that is not has 0 elements
torch.library.define(
    "moe_runtime::attention_mix_backward",
    "(Tensor grad_out, Tensor o, Tensor gate, Tensor weight, bool[] needs)"
    " -> (Tensor do, Tensor dgate, Tensor dweight)",
)
_attention_mix = torch.ops.moe_runtime.attention_mix.default
_attention_mix_backward = torch.ops.moe_runtime.attention_mix_backward.default


@torch.library.register_fake("moe_runtime::attention_mix")
def _(o, gate, weight):
    return o.new_empty(o.shape[0], weight.shape[0])


@torch.library.register_fake("moe_runtime::attention_mix_backward")
def _(grad_out, o, gate, weight, needs):
    inputs = zip((o, gate, weight), needs, strict=True)
    return tuple(tensor.new_empty(tensor.shape if needed else (0,)) for tensor, needed in inputs)


# --- reference: the definition, in the plainest PyTorch; also the CPU path --------------


TILE_ELEMENTS = 1 << 17


@register_reference("moe_runtime::attention_mix")
def attention_mix_reference(o_TSAQ: Tensor, gate_TA: Tensor, weight_DC: Tensor) -> Tensor:
    return product(_gated(o_TSAQ, gate_TA).flatten(1), weight_DC)


def _gated(o_TSAQ: Tensor, gate_TA: Tensor) -> Tensor:
    """gate[t, a] * o[t, :, a], in tiles of tokens whose float32 copy stays in the cache."""
    gate_T1A1 = gate_TA[:, None, :, None].to(accumulator(o_TSAQ.dtype))
    if gate_T1A1.dtype == o_TSAQ.dtype:
        return gate_T1A1 * o_TSAQ
    gated_TSAQ = torch.empty_like(o_TSAQ)
    tile = max(1, TILE_ELEMENTS // max(1, o_TSAQ[:1].numel()))
    for o, gate, out in zip(*(x.split(tile) for x in (o_TSAQ, gate_T1A1, gated_TSAQ)), strict=True):
        out.copy_(o.to(gate.dtype).mul_(gate))
    return gated_TSAQ


@register_reference("moe_runtime::attention_mix_backward")
def attention_mix_backward_reference(
    grad_TD: Tensor, o_TSAQ: Tensor, gate_TA: Tensor, weight_DC: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(o_TSAQ.dtype)
    do, dgate, dweight = (tensor.new_empty(0) for tensor in (o_TSAQ, gate_TA, weight_DC))
    if needs[0] or needs[1]:
        product_TSAQ = product(grad_TD, weight_DC.t()).view_as(o_TSAQ)
        if needs[0]:
            do = _gated(product_TSAQ, gate_TA)
        if needs[1]:
            dgate = (product_TSAQ.to(acc) * o_TSAQ.to(acc)).sum((1, 3)).to(gate_TA.dtype)
    if needs[2]:
        dweight = grad_TD.t() @ _gated(o_TSAQ, gate_TA).flatten(1)
    return do, dgate, dweight


# --- GPU: Triton is imported by the first launch, never by `import` ---------------------

register_kernel("moe_runtime::attention_mix", "attention_mix", "launch_attention_mix")
register_kernel("moe_runtime::attention_mix_backward", "attention_mix", "launch_attention_mix_backward")


# --- autograd and the public function ---------------------------------------------------


class _AttentionMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(o, gate, weight)
        return _attention_mix(o, gate, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad)
        grads = _attention_mix_backward(grad_out.contiguous(), *ctx.saved_tensors, needs)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def attention_mix(o_TSAQ: Tensor, gate_TA: Tensor, weight_DC: Tensor) -> Tensor:
    """Gate-scaled output projection of all attention experts in one GEMM.

    Args:
        o_TSAQ: attention outputs, bf16, fp16, fp32 or fp64; S, A, Q as in docs/design.md.
        gate_TA: gate of each attention expert; any float dtype, multiplied in float32.
        weight_DC: output projections side by side, o's dtype; C = S * A * Q.

    Returns:
        y_TD in o's dtype (autocast's where that is on).

    Raises:
        ValueError: shapes, dtypes or devices disagree. Non-contiguous tensors are copied first.
    """
    op = "attention_mix"
    check_dims(op, "o", o_TSAQ, "(T, S, A, Q)")
    check_dims(op, "weight", weight_DC, "(D, C)")
    o_TSAQ, weight_DC = cast_for_autocast(o_TSAQ, weight_DC)
    check_dtype(op, "o", o_TSAQ, FLOATS)
    T, S, A, Q = o_TSAQ.shape
    check_shape(op, "gate", gate_TA, (T, A), "(T, A)")
    check_dtype(op, "gate", gate_TA, FLOATS)
    check_device(op, "gate", gate_TA, o_TSAQ.device)
    check_shape(op, "weight", weight_DC, (weight_DC.shape[0], S * A * Q), "(D, S*A*Q)")
    check_same(op, "weight", weight_DC, "o", o_TSAQ)
    return _AttentionMix.apply(o_TSAQ.contiguous(), gate_TA.contiguous(), weight_DC.contiguous())
