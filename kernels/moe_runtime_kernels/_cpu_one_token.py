"""expert_ffn of one token on the CPU, without a plan: a step of decoding.

    y = residual + sum over k of weight[k] * FFN of expert[k] (x)

Each choice is one row, so that nothing is sorted and nothing gathered: with few rows, what operations cost
around the products is more than the products.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._activations import ACTIVATIONS, activate
from ._checks import FLOATS, INTEGERS
from ._cpu import native_takes, onednn_takes, product
from ._cpu_experts import few_rows_product
from ._dispatch import accumulator, is_plain
from ._native import grouped_rows
from .plan import MAX_EXPERTS, RoutingPlan


def one_token_ffn(  # noqa: PLR0913 - the operands and options of expert_ffn
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    *,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor | None:
    """What `expert_ffn` returns with `make_plan(expert_TK, E)`, or None for calls of another kind.

    It serves one token on a CPU without gradient, autocast and compilation, if all operands are plain tensors
    with the shapes and dtypes of a layer. The bits are those of `expert_ffn` too, also for this token among
    so few others that compiled products (`_native`) serve them all; without those, unless rows are not whole
    multiples of 64 bytes, or a library sums a batch of matrices in another order.
    """
    operands = (x_TD, weight_TK, gate_up_EGD, down_EDF, gate_up_bias, down_bias, residual_TD)
    is_one = is_plain(x_TD) and x_TD.shape[0] == 1
    if not is_one or activation not in ACTIVATIONS or not _is_layer(operands, expert_TK):
        return None
    return _one_token(operands, expert_TK[0].tolist(), activation)


def one_planned_token(
    operands: tuple[Tensor | None, ...], plan: RoutingPlan, activation: str
) -> Tensor | None:
    """The same for the checked operands of the operation and their plan of one plain token."""
    x_TD, gate_up, down, gate_up_bias, down_bias, weight_TK, residual_TD = operands
    operands = (x_TD, weight_TK, gate_up, down, gate_up_bias, down_bias, residual_TD)
    if not _is_layer(operands, plan.row_TK):
        return None
    ends, E = plan.offset_E.tolist(), plan.offset_E.shape[0]
    chosen = [E if row < 0 else bisect_right(ends, row) for row in plan.row_TK[0].tolist()]
    return _one_token(operands, chosen, activation)


def _one_token(operands: Sequence[Any], chosen: Sequence[int], activation: str) -> Tensor:
    """For operands of a layer; ids outside 0..E-1 add nothing."""
    x_TD, weight_TK, gate_up_EGD, down_EDF, gate_up_bias, down_bias, residual_TD = operands
    (E, D, _), acc = down_EDF.shape, accumulator(x_TD.dtype)
    kept = [e for e in chosen if 0 <= e < E]
    x_KD = [x_TD] * len(kept)
    y_KD = x_TD.new_zeros(len(chosen), D)  # of a choice that is dropped
    if kept:
        h_KG = _products(x_KD, gate_up_EGD, gate_up_bias, kept)
        a_KF = activate(h_KG.to(acc), down_EDF.shape[2], activation).to(x_TD.dtype)
        rows_KD = _products(a_KF.split(1), down_EDF, down_bias, kept)
        if len(kept) == len(chosen):
            y_KD = rows_KD
        else:
            y_KD[[0 <= e < E for e in chosen]] = rows_KD
    y_TD = torch.bmm(weight_TK[:, None].to(acc), y_KD.to(acc)[None])[:, 0]
    if residual_TD is None:
        return y_TD.to(x_TD.dtype)
    return (y_TD + residual_TD.to(acc)).to(residual_TD.dtype)


def _is_layer(operands: tuple[Tensor | None, ...], expert_TK: Tensor) -> bool:
    """Whether these are a layer's, without gradients. If they do not fit, `expert_ffn` says what is wrong."""
    given = [operand for operand in operands if operand is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    if any(type(t) not in (Tensor, nn.Parameter) or not t.is_cpu for t in (*given, expert_TK)):
        return False
    x, weight, gate_up, down, gate_up_bias, down_bias, residual = (
        None if operand is None else operand.shape for operand in operands
    )
    if down is None or gate_up is None or len(down) != 3 or expert_TK.dim() != 2:
        return False
    (E, D, F), G, K = down, gate_up[1], expert_TK.shape[1]
    return (
        K > 0
        and 1 <= E <= MAX_EXPERTS
        and G in (F, 2 * F)
        and (x, weight, gate_up, tuple(expert_TK.shape)) == ((1, D), (1, K), (E, G, D), (1, K))
        and gate_up_bias in (None, (E, G))
        and down_bias in (None, (E, D))
        and residual in (None, (1, D))
        and expert_TK.dtype in INTEGERS
        and all(tensor.dtype in FLOATS for tensor in given)
        and all(operand is None or operand.dtype == given[0].dtype for operand in operands[2:6])
    )


def _products(
    x_KI: Sequence[Tensor], weight_EOI: Tensor, bias_EO: Tensor | None, experts: Sequence[int]
) -> Tensor:
    """Each row times the matrix of its expert, plus its bias [K, O]."""
    if native_takes(x_KI[0], weight_EOI, bias_EO):
        rows_KI = torch.cat(tuple(x_KI))
        out_KO = rows_KI.new_empty(len(experts), weight_EOI.shape[1])
        grouped_rows(rows_KI, weight_EOI, bias_EO, [(e, k, 1) for k, e in enumerate(experts)], out_KO)
        return out_KO
    is_few = weight_EOI.dtype == torch.float32 and weight_EOI.is_contiguous()
    is_few = is_few and not onednn_takes(x_KI[0], weight_EOI[experts[0]])
    parts = []
    for x_1I, e in zip(x_KI, experts, strict=True):
        expert = slice(e, e + 1) if is_few else e
        bias = None if bias_EO is None else bias_EO[expert]
        parts.append((few_rows_product if is_few else product)(x_1I, weight_EOI[expert], bias))
    return torch.cat(parts)
