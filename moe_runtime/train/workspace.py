"""What operations of this project use inside on a CPU and free again: bytes, from their operands' shapes.

`_cpu_experts` works on a few experts at a time; the rows of so many are alive in several forms.
"""

from typing import Any

import torch
from moe_runtime_kernels._cpu import onednn_multiplies, padded_height
from moe_runtime_kernels._cpu_experts import MOST_HIDDEN, MOST_HIDDEN_BACKWARD
from moe_runtime_kernels._dispatch import accumulator
from torch import Tensor

_FORWARD = torch.ops.moe_runtime.expert_ffn.default
_BACKWARD = (
    torch.ops.moe_runtime.expert_ffn_backward.default,
    torch.ops.moe_runtime.expert_ffn_add_backward.default,
)


def workspace(operation: Any, operands: Any) -> int:
    """Bytes that are alive inside an operation at most, its results aside; 0 for what is not known here."""
    if operation is _FORWARD:
        x, gate_up, down, _, _, weight, *_ = operands
        return _forward(x, gate_up, down, weight.numel())
    if operation in _BACKWARD:
        _, x, gate_up, down, _, _, weight, *_ = operands
        return _backward(x, gate_up, down, weight.numel())
    return 0


def _forward(x: Tensor, gate_up: Tensor, down: Tensor, N: int) -> int:
    """y of all rows; of those at once h and a; weights that are rounded."""
    (E, G, D), F = gate_up.shape, down.shape[2]
    N = _padded(x, gate_up, N)
    R = _rows_at_once(N, E, MOST_HIDDEN // G)
    return x.itemsize * (N * D + R * (G + F)) + _rounded(x, gate_up)


def _backward(x: Tensor, gate_up: Tensor, down: Tensor, N: int) -> int:
    """dx of all rows. Of those at once, while dh is put together from the parts of its two halves: the
    gradient of the output, and a rounded for the product with it; as wide as sums are da, a, da times the
    gate, both parts and what they become, and h, which is no copy where it has that width.
    """
    (E, G, D), F = gate_up.shape, down.shape[2]
    N = _padded(x, gate_up, N)
    R = _rows_at_once(N, E, MOST_HIDDEN_BACKWARD // G)
    wide = accumulator(x.dtype).itemsize
    h = 0 if wide == x.itemsize else G
    parts = 2 if G > F else 0
    rows = x.itemsize * (N * D + R * (D + F)) + wide * R * ((3 + parts) * F + G + h)
    return rows + _rounded(x, gate_up)


def _rounded(x: Tensor, gate_up: Tensor) -> int:
    """An expert's matrix in x's dtype, if it is stored in another."""
    return 0 if gate_up.dtype == x.dtype else x.itemsize * gate_up[0].numel()


def _padded(x: Tensor, gate_up: Tensor, N: int) -> int:
    """Rows with the copies that fill each expert's up, with as many rows for every expert."""
    E = gate_up.shape[0]
    return E * padded_height(-(-N // E)) if onednn_multiplies(x, gate_up[0]) else N


def _rows_at_once(N: int, E: int, most: int) -> int:
    """With as many rows for every expert, of which one at least is taken whole."""
    return min(N, max(most, -(-N // E)))
