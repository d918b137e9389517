"""How many kernels oneDNN compiles for a step in bfloat16 on a CPU: it keeps them, and they take memory.

One per shape of a product. The products of experts have as many as there are heights of their rows, because a
router sends them other numbers in every batch; few rows of the forward pass are not oneDNN's, nor any where
bfloat16 is widened. There this project's linear layers are not oneDNN's either, but those of a model of
transformers are: the few shapes that both have are counted.
"""

from typing import Any

import torch
from moe_runtime_kernels import _cpu
from moe_runtime_kernels._cpu import onednn_has_bf16, padded_height
from moe_runtime_kernels._native import rows_function
from torch import Tensor

MOST = 1024  # that oneDNN keeps, unless ONEDNN_PRIMITIVE_CACHE_CAPACITY says otherwise
BYTES = 400_000  # of one, about; `python -m benchmarks memory` says how well that fits

_ops, _aten = torch.ops.moe_runtime, torch.ops.aten
# operation -> positions of the operands of its product
_PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
    _aten.linear.default: (0, 1),
}
# whose products of blocks are of the same shapes in every layer; the second operand is a tensor of tokens
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
_FORWARD = (_ops.grouped_gemm.default, _ops.gathered_grouped_gemm.default)
_GROUPED = (
    *_FORWARD,
    _ops.grouped_gemm_input_grad.default,
    _ops.grouped_gemm_weight_grad.default,
    _ops.gathered_grouped_gemm_weight_grad.default,
)


class Kernels:
    """Those of the operations that it has seen."""

    def __init__(self) -> None:
        self._single: set[Any] = set()
        self._of_experts: dict[Any, int] = {}  # whether forward, and a product -> the most rows of an expert

    def see(self, operation: Any, operands: Any) -> None:
        if operation in _PRODUCTS:
            left, right = (operands[i] for i in _PRODUCTS[operation])
            if left.dtype == torch.bfloat16:
                self._single.add((left.shape, left.stride()[-1], right.shape, right.stride()[-1]))
        elif operation in _ATTENTION and operands[1].dtype == torch.bfloat16:
            self._single.add((operation, operands[1].shape))
        elif operation in _GROUPED:
            rows, other = operands[:2]
            self._experts(operation, rows, other.shape[1:], is_forward=operation in _FORWARD)
        elif operation is _ops.expert_ffn.default:
            x, gate_up, down = operands[:3]
            self._experts("gate_up", x, gate_up.shape[1:], is_forward=True)
            self._experts("down", x, down.shape[1:], is_forward=True)
        elif operation in (_ops.expert_ffn_backward.default, _ops.expert_ffn_add_backward.default):
            x, gate_up, down = operands[1:4]
            for gradient in ("of the rows", "of the weight"):
                self._experts(f"gate_up, {gradient}", x, gate_up.shape[1:])
                self._experts(f"down, {gradient}", x, down.shape[1:])

    def _experts(self, name: Any, rows: Tensor, shape: Any, *, is_forward: bool = False) -> None:
        if rows.dtype == torch.bfloat16:
            key = (is_forward, name, rows.shape[1], *shape)
            self._of_experts[key] = max(self._of_experts.get(key, 0), rows.shape[0])

    @property
    def number(self) -> int:
        """Of all heights that rows can have; 0 where oneDNN has no products of bfloat16, and on a GPU."""
        if torch.cuda.is_available() or not onednn_has_bf16():
            return 0
        if _cpu.BF16_IS_WIDENED:
            return min(MOST, len(self._single))
        is_native = rows_function(torch.bfloat16) is not None
        few = _cpu.MOST_NATIVE_ROWS.get(torch.bfloat16, 0) if is_native else 0
        heights = (
            len({padded_height(rows) for rows in range(1 + few * is_forward, most + 1)})
            for (is_forward, *_), most in self._of_experts.items()
        )
        return min(MOST, len(self._single) + sum(heights))
