"""One formula per registered operation, for `torch.utils.flop_counter.FlopCounterMode`.

A multiply and an add are 2 FLOPs. Matrix products count, over all N = T * K rows: no padding, no elementwise
work, nothing for routing, plans and row movement, no gradient that is not asked for. A dropped choice counts
like the others, because only the device knows how many there are.

PyTorch's own operations that its counter takes for free are here too: `aten._grouped_mm`, oneDNN's linear,
and attention on the CPU, by the counter's convention for other devices (every query times every key, causal
or not).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import attention_mix, combine, expert_ffn, grouped_gemm, permute, plan, route  # noqa: F401 - registers them

Shape = Sequence[int]


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


def _grouped_gemm(x: Shape, weight: Shape, *rest: Any, out_shape: Any = None) -> int:
    N, I = x
    return 2 * N * I * weight[1]


def _gathered_grouped_gemm(x: Shape, weight: Shape, token: Shape, *rest: Any, out_shape: Any = None) -> int:
    return 2 * token[0] * weight[1] * weight[2]


def _input_grad(grad_out: Shape, weight: Shape, *rest: Any, out_shape: Any = None) -> int:
    N, O = grad_out
    return 2 * N * O * weight[2]


def _weight_grad(grad_out: Shape, x: Shape, *rest: Any, out_shape: Any = None) -> int:
    N, O = grad_out
    return 2 * N * O * x[1]


def _expert_ffn(x: Shape, gate_up: Shape, down: Shape, *rest: Any, out_shape: Any = None) -> int:
    token = rest[5]
    _, G, D = gate_up
    return 2 * token[0] * D * (G + down[2])


def _expert_ffn_backward(
    grad_out: Shape, x: Shape, gate_up: Shape, down: Shape, *rest: Any, out_shape: Any = None
) -> int:
    (N,), h, needs, (_, G, D), F = rest[4], rest[8], rest[10], gate_up, down[2]
    needs_x, needs_gate_up, needs_down, needs_gate_up_bias, _, needs_weight = needs
    hidden_grad = needs_x or needs_gate_up or needs_gate_up_bias or needs_weight
    recomputed = h is None and (hidden_grad or needs_down)
    return 2 * N * D * (F * (hidden_grad + needs_down) + G * (needs_x + needs_gate_up + recomputed))


def _attention_mix(o: Shape, gate: Shape, weight: Shape, *, out_shape: Any = None) -> int:
    D, C = weight
    return 2 * o[0] * D * C


def _attention_mix_backward(
    grad_out: Shape, o: Shape, gate: Shape, weight: Shape, needs: Sequence[bool], *, out_shape: Any = None
) -> int:
    needs_o, needs_gate, needs_weight = needs
    return _attention_mix(o, gate, weight) * ((needs_o or needs_gate) + needs_weight)


def _aten_grouped_mm(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    """Groups split rows (2d x 3d), the summed axis (2d x 2d) or columns (3d x 2d); 3d x 3d is a batch.

    A split axis appears once and is summed over the groups; only the batch multiplies.
    """
    batch = a[0] if len(a) == len(b) == 3 else 1
    return 2 * batch * a[-2] * a[-1] * b[-1]


def _linear_pointwise(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _aten_attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(query, key, value)


def _aten_attention_backward(
    grad_out: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any
) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(grad_out, query, key, value)


_FORMULAS: dict[str, Callable[..., int]] = {
    "moe_runtime.make_plan": _nothing,
    "moe_runtime.route_topk": _nothing,
    "moe_runtime.route_topk_backward": _nothing,
    "moe_runtime.gather_rows": _nothing,
    "moe_runtime.scatter_rows": _nothing,
    "moe_runtime.combine": _nothing,
    "moe_runtime.combine_backward": _nothing,
    "moe_runtime.grouped_gemm": _grouped_gemm,
    "moe_runtime.gathered_grouped_gemm": _gathered_grouped_gemm,
    "moe_runtime.grouped_gemm_input_grad": _input_grad,
    "moe_runtime.grouped_gemm_weight_grad": _weight_grad,
    "moe_runtime.gathered_grouped_gemm_weight_grad": _weight_grad,
    "moe_runtime.grouped_gemm_add_weight_grad": _weight_grad,
    "moe_runtime.gathered_grouped_gemm_add_weight_grad": _weight_grad,
    "moe_runtime.grouped_gemm_bias_grad": _nothing,
    "moe_runtime.expert_ffn": _expert_ffn,
    "moe_runtime.expert_ffn_backward": _expert_ffn_backward,
    "moe_runtime.expert_ffn_add_backward": _expert_ffn_backward,
    "moe_runtime.attention_mix": _attention_mix,
    "moe_runtime.attention_mix_backward": _attention_mix_backward,
    "aten._grouped_mm": _aten_grouped_mm,
    "mkldnn._linear_pointwise": _linear_pointwise,
    "aten._scaled_dot_product_flash_attention_for_cpu": _aten_attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _aten_attention_backward,
}


def register_flop_formulas() -> None:
    """Teach PyTorch's FLOP counter these operations; a formula that is already there stays."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _FORMULAS.items():
        namespace, operation = name.split(".")
        target = getattr(getattr(torch.ops, namespace), operation, None)
        if target is not None and target not in flop_registry:
            register_flop_formula(target)(formula)
