"""PackedExperts: expert_ffn for inference on a CPU, its weights laid out once as oneDNN's products read them.

    y[t] = residual[t] + sum over k of weight[t, k] * FFN of expert[t, k] (x[t])

oneDNN reorders a weight matrix before every product that it is given a plain one for; for the few rows of an
expert that costs as much as the product. It also applies the activation, and the product with the up half,
to what a product leaves in registers. Source: oneDNN's memory formats and post-operations, through PyTorch's
`torch.ops.mkldnn`.
"""

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ._checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_dims,
    check_dtype,
    check_same,
    check_shape,
)
from ._cpu import BF16_IS_WIDENED, onednn_has_bf16, padded_height
from .combine import combine_blocks

# oneDNN's names: kind, scalars, algorithm. relu2 squares what relu leaves.
_POST_OPERATIONS: dict[str, tuple[str, list[float], str]] = {
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "relu": ("relu", [], ""),
    "relu2": ("relu", [], ""),
}
_NOTHING: tuple[str, list[float], str] = ("none", [], "")
_onednn: Any = torch.ops.mkldnn


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN has products of packed weights of this dtype, and faster ones."""
    if dtype == torch.bfloat16:
        return onednn_has_bf16() and not BF16_IS_WIDENED
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


class PackedExperts:
    """E feed-forward networks in oneDNN's layout: a second copy of their weights, without gradients.

    For the CPU alone, which is checked: ids and counts are read on the host.

    Args:
        gate_up_EGD: gate rows above up rows, G = 2F; or without a gate, G = F.
        down_EDF: float32, or bfloat16 where the processor has products of it (AVX512_BF16
            or AMX), on the CPU.
        activation: silu, gelu, gelu_tanh, relu or relu2.
        gate_up_bias_EG, down_bias_ED: added to each row of the expert; None: no bias.

    Raises:
        ValueError: an argument has the wrong axes, dtype or device, or oneDNN has no such products here.
    """

    def __init__(
        self,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        *,
        activation: str = "silu",
        gate_up_bias_EG: Tensor | None = None,
        down_bias_ED: Tensor | None = None,
    ) -> None:
        op = "PackedExperts"
        check_dims(op, "gate_up", gate_up_EGD, "(E, G, D)")
        check_dims(op, "down", down_EDF, "(E, D, F)")
        check_choice(op, "activation", activation, tuple(_POST_OPERATIONS))
        E, D, F = down_EDF.shape
        G = 2 * F if gate_up_EGD.shape[1] == 2 * F else F
        check_shape(op, "gate_up", gate_up_EGD, (E, G, D), "(E, 2F or F, D)")
        check_same(op, "down", down_EDF, "gate_up", gate_up_EGD)
        for name, bias, width in (("gate_up_bias", gate_up_bias_EG, G), ("down_bias", down_bias_ED, D)):
            if bias is not None:
                check_shape(op, name, bias, (E, width), "(E, width)")
                check_same(op, name, bias, "gate_up", gate_up_EGD)
        check_device(op, "gate_up", gate_up_EGD, torch.device("cpu"))
        if not can_pack(gate_up_EGD.dtype):
            raise ValueError(
                f"{op}: gate_up must be of a dtype that this processor's oneDNN has products of (float32; "
                f"bfloat16 with AVX512_BF16 or AMX; without, expert_ffn is faster), "
                f"got {str(gate_up_EGD.dtype).removeprefix('torch.')}"
            )
        self.num_experts, self.width, self.hidden = E, D, F
        self.dtype, self.activation, self.gated = gate_up_EGD.dtype, activation, G != F
        with torch.no_grad():
            self._first = _pack(gate_up_EGD[:, :F], gate_up_bias_EG, slice(0, F))
            self._up = _pack(gate_up_EGD[:, F:], gate_up_bias_EG, slice(F, G)) if self.gated else None
            self._down = _pack(down_EDF, down_bias_ED, slice(0, D))

    @torch.no_grad()
    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, residual_TD: Tensor | None = None
    ) -> Tensor:
        """The experts' outputs, weighted and summed; sums over choices are float32.

        Args:
            x_TD: tokens, in the dtype of the weights.
            expert_TK: chosen experts, int32 or int64; an id outside 0..E-1 adds nothing.
            weight_TK: gates, any float dtype.
            residual_TD: added before the only rounding of the sum; its dtype is the result's.

        Returns:
            y_TD, without a gradient.
        """
        op = "PackedExperts"
        check_dims(op, "x", x_TD, "(T, D)")
        check_dims(op, "expert", expert_TK, "(T, K)")
        check_dtype(op, "expert", expert_TK, INTEGERS)
        check_dtype(op, "x", x_TD, (self.dtype,))
        check_shape(op, "x", x_TD, (expert_TK.shape[0], self.width), "(T, D)")
        check_shape(op, "weight", weight_TK, expert_TK.shape, "(T, K)")
        for name, tensor in (("x", x_TD), ("expert", expert_TK), ("weight", weight_TK)):
            check_device(op, name, tensor, torch.device("cpu"))
        if residual_TD is not None:
            check_shape(op, "residual", residual_TD, x_TD.shape, "(T, D)")
            check_dtype(op, "residual", residual_TD, FLOATS)
            check_device(op, "residual", residual_TD, torch.device("cpu"))
        if expert_TK.shape[1] < 1:
            shape = tuple(expert_TK.shape)
            raise ValueError(f"{op}: expert must have at least 1 choice per token, got shape {shape}")
        if x_TD.shape[0] == 1:
            y_ND, row_TK = self._one_token(x_TD, expert_TK)
        else:
            y_ND, row_TK = self._rows(x_TD, expert_TK)
        return combine_blocks(y_ND, weight_TK, row_TK, residual_TD)

    def _one_token(self, x_1D: Tensor, expert_1K: Tensor) -> tuple[Tensor, Tensor]:
        """Each choice's row in the order of choices: nothing to sort."""
        chosen = [e if 0 <= e < self.num_experts else None for e in expert_1K[0].tolist()]
        parts = [self._expert(x_1D, e) for e in chosen if e is not None]
        # as many rows as choices, so that dropped ones have something not to read
        parts += [x_1D] * (not parts)
        kept = iter(range(len(parts)))
        return torch.cat(parts), torch.tensor([[-1 if e is None else next(kept) for e in chosen]])

    def _rows(self, x_TD: Tensor, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        """y of every row in expert order, and where each choice's is; -1 where it was dropped."""
        E, (T, K) = self.num_experts, expert_TK.shape
        expert_N = expert_TK.flatten().long()
        expert_N = torch.where((expert_N >= 0) & (expert_N < E), expert_N, E)
        slot_N = expert_N.argsort(stable=True)
        counts = torch.bincount(expert_N, minlength=E + 1).tolist()
        token_N = functional.pad(slot_N // K, (0, max(4, T * K // 16)))
        y_ND = x_TD.new_empty(max(T * K, 1), self.width)
        start = 0
        for e, count in enumerate(counts[:E]):
            if count:
                rows = slice(start, start + count)
                padded = token_N[start : start + padded_height(count)]  # with rows of others, not used
                y_ND[rows] = self._expert(x_TD.index_select(0, padded), e)[:count]
                start += count
        row_N = torch.full_like(slot_N, -1)
        row_N[slot_N[:start]] = torch.arange(start)
        return y_ND, row_N.view(T, K)

    def _expert(self, x_MD: Tensor, e: int) -> Tensor:
        weight, bias = self._first[e]
        post = _POST_OPERATIONS[self.activation]
        a_MF = _onednn._linear_pointwise(x_MD, weight, bias, *post)
        if self.activation == "relu2":
            a_MF = a_MF.square_()
        if self._up is not None:
            weight, bias = self._up[e]
            a_MF = _onednn._linear_pointwise.binary(x_MD, a_MF, weight, bias, "mul")
        weight, bias = self._down[e]
        return _onednn._linear_pointwise(a_MF, weight, bias, *_NOTHING)


def _pack(weight_EOI: Tensor, bias_EO: Tensor | None, columns: slice) -> list[tuple[Tensor, Tensor | None]]:
    biases = [None] * len(weight_EOI) if bias_EO is None else bias_EO[:, columns].contiguous().unbind()
    packed = (_onednn._reorder_linear_weight(weight.contiguous()) for weight in weight_EOI.unbind())
    return list(zip(packed, biases, strict=True))
