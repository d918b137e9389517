"""The expert layer on the CPU: what expert_ffn's references say, with fewer passes over memory.

The references' steps each pass over all routed rows. Here a group of experts at a time goes through the
gather, both products and the activation, while its rows are in the processor's cache.

A group is neighbouring experts with about as many rows, which in float32 are one batch of products: one
parallel region, in which threads share out experts, instead of one for each expert, in which they share out
its few rows. Each expert is padded to the rows of the largest of its group with copies of its last row, which
nobody reads. In other dtypes each expert is a group, padded where oneDNN multiplies.

Weights may be wider than the rows, as under autocast. An expert's are then rounded where they are multiplied,
into memory that the next expert's take, and their gradients are widened as they are written: the bits of
rounding all weights before and widening all gradients after, which would be a pass over memory each. Where
bfloat16 is multiplied in float32 anyway, wider weights are multiplied as they are, and gradients not rounded.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from ._activations import activate, activate_backward
from ._cpu import (
    MOST_NATIVE_ROWS,
    is_few,
    is_widened,
    native_takes,
    onednn_multiplies,
    onednn_takes,
    padded_height,
    product,
    widened_product,
    write_weight_grad,
)
from ._dispatch import accumulator
from ._native import grouped_rows
from .combine import combine_blocks

MOST_EXPERTS = 16  # in a group
MOST_ROWS = 32  # of an expert in a group of several: a product of more keeps all threads busy alone
MOST_HIDDEN = 2**23  # elements of h between the products of a few groups
MOST_HIDDEN_BACKWARD = 2**19  # the same, where it has a gradient and both have several forms
CACHED = 2**18  # elements of h that go through the activation at once: 1 MiB of float32
FEW_ROWS = 3  # of an expert, for which MKL's product has one thread
PARTS = 8  # of a matrix that few rows of float32 are multiplied with


class Group(NamedTuple):
    """Neighbouring experts, all with rows, each padded to `height` of them."""

    experts: slice
    height: int
    padded: slice  # its rows among the padded ones of all groups


def make_groups(ends: Sequence[int], most_experts: int, few_heights: bool) -> list[Group]:
    """Groups of the experts that have rows, in order; `ends` is offset_E. Few heights: of one expert, too."""
    groups: list[Group] = []
    count = [end - start for start, end in pairwise([0, *ends])]
    first, E = 0, len(ends)
    while first < E:
        last, height, used = first + 1, count[first], count[first]
        while last < min(E, first + most_experts) and height and count[last]:
            taller, more = padded_height(max(height, count[last])), used + count[last]
            # padding costs its share of the products, a group of its own the start of two
            if taller > MOST_ROWS or taller * (last + 1 - first) > more + more // 8 + 4 * (last + 1 - first):
                break
            last, height, used = last + 1, taller, more
        if height:
            height = padded_height(height) if few_heights else height
            start = groups[-1].padded.stop if groups else 0
            padded = slice(start, start + height * (last - first))
            groups.append(Group(slice(first, last), height, padded))
        first = last
    return groups


class Blocks(NamedTuple):
    """A plan in groups. Where nothing is padded, `row_R` and `place_N` are None: both would count up."""

    groups: list[Group]
    ends: list[int]
    row_R: Tensor | None  # the row of each padded one
    place_N: Tensor | None  # where each row is among the padded ones

    @property
    def num_padded(self) -> int:
        return self.groups[-1].padded.stop if self.groups else 0

    def pad(self, values: Tensor) -> Tensor:
        """Of values for each row [N, ...], those of the padded ones."""
        return values[: self.num_padded] if self.row_R is None else values.index_select(0, self.row_R)

    def unpad(self, values: Tensor) -> Tensor:
        """Of values for each padded row [R, ...], those of the rows that experts have."""
        return values if self.place_N is None else values.index_select(0, self.place_N)

    def places(self, row_TK: Tensor) -> Tensor:
        """Where each choice's row is among the padded ones; -1 where it was dropped."""
        if self.place_N is None or row_TK.numel() == 0:
            return row_TK
        return self.place_N[row_TK.clamp(min=0)].masked_fill(row_TK < 0, -1)


def make_blocks(x_TD: Tensor, weight_EOI: Tensor, offset_E: Tensor, is_native: bool = False) -> Blocks:
    ends = offset_E.tolist()
    through_onednn = onednn_multiplies(x_TD, weight_EOI[0])
    batches_pay = x_TD.dtype == torch.float32 and not through_onednn and not is_native
    groups = make_groups(ends, MOST_EXPERTS if batches_pay else 1, through_onednn)
    if not groups or groups[-1].padded.stop == ends[-1]:
        return Blocks(groups, ends, None, None)
    starts = [0, *ends]
    of_experts = [
        (group.padded.start + i * group.height - starts[e], group.height, ends[e] - starts[e], ends[e] - 1)
        for group in groups
        for i, e in enumerate(range(group.experts.start, group.experts.stop))
    ]
    shift, height, count, last = torch.tensor(of_experts).unbind(1)
    row_R = torch.arange(groups[-1].padded.stop) - shift.repeat_interleave(height)
    row_R = torch.minimum(row_R, last.repeat_interleave(height))
    return Blocks(groups, ends, row_R, torch.arange(ends[-1]) + shift.repeat_interleave(count))


class Scratch:
    """Memory in the dtype of the rows for one expert's matrix, which the next expert's overwrites."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype)

    def like(self, weight_nOI: Tensor) -> Tensor:
        if self._memory.numel() < weight_nOI.numel():
            self._memory = self._memory.new_empty(weight_nOI.numel())
        return self._memory[: weight_nOI.numel()].view(weight_nOI.shape)

    def rounded(self, x_RI: Tensor, weight_nOI: Tensor) -> Tensor:
        """The matrices in the dtype of the rows; the same tensor if they have it or are multiplied wider."""
        if weight_nOI.dtype == x_RI.dtype or is_widened(x_RI, weight_nOI):
            return weight_nOI
        if weight_nOI.stride(2) != 1 and weight_nOI.stride(1) == 1:
            return self.like(weight_nOI.transpose(1, 2)).transpose(1, 2).copy_(weight_nOI)
        return self.like(weight_nOI).copy_(weight_nOI)


def products(
    x_RI: Tensor,
    weight_EOI: Tensor,
    bias_EO: Tensor | None,
    groups: Sequence[Group],
    scratch: Scratch,
    out_RO: Tensor | None = None,
) -> Tensor:
    """Rows of groups that follow each other times their experts' matrices, plus biases, into `out` if given.

    Experts with few rows are one call of `grouped_rows`. PyTorch's grouped product does what the
    loop here would, without Python between the experts.
    """
    is_native = native_takes(x_RI, weight_EOI, bias_EO)
    most_rows = MOST_NATIVE_ROWS[x_RI.dtype] if is_native else 0
    few: list[Group] = []
    more: list[Group] = []
    for group in groups:
        (few if group.height <= most_rows else more).append(group)
    if not few and out_RO is None and bias_EO is None and _grouped_mm_takes(x_RI, weight_EOI, groups):
        first = groups[0].experts.start
        ends: list[int] = []
        for group in groups:  # experts without rows end where the one before them does
            ends += [group.padded.start] * (group.experts.start - first - len(ends))
            ends.append(group.padded.stop)
        offset_n = torch.tensor(ends, dtype=torch.int32) - groups[0].padded.start
        weight_nIO = weight_EOI[first : first + len(ends)].transpose(1, 2)
        return functional.grouped_mm(x_RI, weight_nIO, offs=offset_n)
    if out_RO is None:
        out_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    start = groups[0].padded.start
    if few:
        parts = [
            (e, group.padded.start - start + i * group.height, group.height)
            for group in few
            for i, e in enumerate(range(group.experts.start, group.experts.stop))
        ]
        grouped_rows(x_RI, weight_EOI, bias_EO, parts, out_RO)
    for experts, _, padded in more:
        rows = slice(padded.start - start, padded.stop - start)
        bias_nO = None if bias_EO is None else bias_EO[experts]
        experts_product(x_RI[rows], scratch.rounded(x_RI[rows], weight_EOI[experts]), bias_nO, out_RO[rows])
    return out_RO


def _grouped_mm_takes(x_RI: Tensor, weight_EOI: Tensor, groups: Sequence[Group]) -> bool:
    """Whether its loop over experts has the products of `experts_product`, and their layout suits it."""
    itemsize = x_RI.itemsize
    return (
        x_RI.dtype == weight_EOI.dtype
        and x_RI.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and len(groups) > 1
        and all(group.experts.stop - group.experts.start == 1 for group in groups)
        and (x_RI.dtype != torch.float32 or min(group.height for group in groups) > FEW_ROWS)
        and not onednn_takes(x_RI, weight_EOI[0])
        and not is_widened(x_RI, weight_EOI)
        and min(weight_EOI.shape[1:]) > 1
        and 1 in weight_EOI.stride()[1:]
        and all(size * itemsize % 16 == 0 for size in (*x_RI.stride(), *weight_EOI.stride()) if size != 1)
    )


def experts_product(x_RI: Tensor, weight_nOI: Tensor, bias_nO: Tensor | None, out_RO: Tensor) -> None:
    """Each expert's padded rows times its matrix, plus its bias, into `out`."""
    n, O, I = weight_nOI.shape
    through_onednn = onednn_takes(x_RI, weight_nOI[0])
    bias_O = None if bias_nO is None else bias_nO[0]
    few = x_RI.shape[0] <= FEW_ROWS * n and x_RI.dtype == torch.float32 and weight_nOI.is_contiguous()
    if n == 1 and is_few(x_RI, weight_nOI[0], bias_O):
        grouped_rows(x_RI, weight_nOI, bias_nO, [(0, 0, x_RI.shape[0])], out_RO)
    elif few and not through_onednn:
        out_RO.copy_(few_rows_product(x_RI, weight_nOI, bias_nO))
    elif n == 1 and is_widened(x_RI, weight_nOI):
        widened_product(x_RI, weight_nOI[0], bias_O, out_RO)
    elif n == 1 and (through_onednn or bias_nO is not None):
        out_RO.copy_(product(x_RI, weight_nOI[0], bias_O))
    elif n == 1:
        torch.mm(x_RI, weight_nOI[0].t(), out=out_RO)
    elif bias_nO is None:
        torch.bmm(x_RI.view(n, -1, I), weight_nOI.transpose(1, 2), out=out_RO.view(n, -1, O))
    else:
        x_nMI, weight_nIO = x_RI.view(n, -1, I), weight_nOI.transpose(1, 2)
        torch.baddbmm(bias_nO[:, None], x_nMI, weight_nIO, out=out_RO.view(n, -1, O))


def few_rows_product(x_RI: Tensor, weight_nOI: Tensor, bias_nO: Tensor | None) -> Tensor:
    """The same as a batch of products of the matrix with the rows, which threads share out in parts of it."""
    n, O, I = weight_nOI.shape
    x_nIM = x_RI.view(n, -1, I).transpose(1, 2)
    if n == 1 and O % PARTS == 0:
        y_nOM = torch.bmm(weight_nOI.view(PARTS, O // PARTS, I), x_nIM.expand(PARTS, -1, -1)).view(1, O, -1)
    else:
        y_nOM = torch.bmm(weight_nOI, x_nIM)
    y_nMO = y_nOM.transpose(1, 2)
    return (y_nMO if bias_nO is None else y_nMO + bias_nO[:, None]).reshape(-1, O)


# --- forward ----------------------------------------------------------------------------


def expert_ffn_blocks(  # noqa: PLR0913 - the operation's own arguments, in its schema's order
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    weight_TK: Tensor,
    residual_TD: Tensor | None,
    row_TK: Tensor,
    token_N: Tensor,
    slot_N: Tensor,
    offset_E: Tensor,
    tile_end_ME: Tensor,
    activation: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    (G, D), F = gate_up_EGD.shape[1:], down_EDF.shape[2]
    is_native = native_takes(x_TD, gate_up_EGD, gate_up_bias_EG)
    is_native = is_native and native_takes(x_TD, down_EDF, down_bias_ED)
    blocks = make_blocks(x_TD, gate_up_EGD, offset_E, is_native)
    token_R, scratch = blocks.pad(token_N), Scratch(x_TD.dtype)
    parts = chunks(blocks.groups, MOST_HIDDEN // G)
    several = len(parts) > 1
    h_RG = x_TD.new_empty(blocks.num_padded if keep_h and several else 0, G)
    # one row more than none, to be read and not used where all choices are dropped
    y_RD = x_TD.new_empty(blocks.num_padded if several else 1, D)
    for groups in parts:
        rows = slice(groups[0].padded.start, groups[-1].padded.stop)
        x_RD = x_TD.index_select(0, token_R[rows])
        part_RG = products(x_RD, gate_up_EGD, gate_up_bias_EG, groups, scratch)
        del x_RD
        a_RF = _activated(part_RG, F, activation)
        part_RD = products(a_RF, down_EDF, down_bias_ED, groups, scratch, y_RD[rows] if several else None)
        if not several:
            h_RG, y_RD = part_RG if keep_h else h_RG, part_RD
        elif keep_h:
            h_RG[rows] = part_RG
    y_TD = combine_blocks(y_RD, weight_TK, blocks.places(row_TK), residual_TD)
    return y_TD, _all_rows(h_RG, blocks, token_N) if keep_h else h_RG


def _activated(h_RG: Tensor, F: int, activation: str) -> Tensor:
    """a_RF, computed in float32 and rounded once, in parts of h that stay in the cache."""
    acc, most_rows = accumulator(h_RG.dtype), max(CACHED // h_RG.shape[1], 1)
    if h_RG.shape[0] <= most_rows:
        return activate(h_RG.to(acc), F, activation).to(h_RG.dtype)
    a_RF = h_RG.new_empty(h_RG.shape[0], F)
    for h, a in zip(h_RG.split(most_rows), a_RF.split(most_rows), strict=True):
        a.copy_(activate(h.to(acc), F, activation))
    return a_RF


def chunks(groups: list[Group], most_rows: int) -> list[list[Group]]:
    """Groups in turn, together no more than so many padded rows unless one alone has more."""
    parts: list[list[Group]] = []
    for group in groups:
        if parts and group.padded.stop - parts[-1][0].padded.start <= most_rows:
            parts[-1].append(group)
        else:
            parts.append([group])
    return parts


def _size(group: Group) -> int:
    return group.padded.stop - group.padded.start


def _all_rows(h_RG: Tensor, blocks: Blocks, token_N: Tensor) -> Tensor:
    """h_NG of its padded rows; zero in those past the last expert's."""
    h = blocks.unpad(h_RG)
    num_dropped = token_N.shape[0] - h.shape[0]
    return torch.cat([h, h.new_zeros(num_dropped, h.shape[1])]) if num_dropped else h


# --- backward ---------------------------------------------------------------------------


def expert_ffn_backward_blocks(  # noqa: C901, PLR0913 - one branch per gradient; the schema's arguments
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    weight_TK: Tensor,
    row_TK: Tensor,
    token_N: Tensor,
    slot_N: Tensor,
    offset_E: Tensor,
    tile_end_ME: Tensor,
    h_NG: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    gate_up_main_grad: Tensor | None = None,
    down_main_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    needs_x, needs_gate_up, needs_down, needs_gate_up_bias, needs_down_bias, needs_weight = needs
    dtype, acc, F = x_TD.dtype, accumulator(x_TD.dtype), down_EDF.shape[2]
    blocks = make_blocks(x_TD, gate_up_EGD, offset_E)
    token_R, used, scratch = blocks.pad(token_N), blocks.ends[-1], Scratch(dtype)
    grad_TD = grad_TD.to(dtype)
    # zero for the copies: they add nothing to the gradients of weights and biases
    weight_R1 = _weights(weight_TK.flatten().to(acc), slot_N[:used], blocks)[:, None]
    dx_RD = x_TD.new_empty(max(blocks.num_padded, 1) if needs_x else 0, x_TD.shape[1])
    dweight_R = weight_R1.new_empty(blocks.num_padded if needs_weight else 0)
    dgate_up = _stack(gate_up_EGD, needs_gate_up and gate_up_main_grad is None, blocks)
    ddown = _stack(down_EDF, needs_down and down_main_grad is None, blocks)
    dgate_up_bias = _stack(gate_up_EGD[:, :, 0], needs_gate_up_bias, blocks, dtype)
    ddown_bias = _stack(down_EDF[:, :, 0], needs_down_bias, blocks, dtype)

    for groups in chunks(blocks.groups, MOST_HIDDEN_BACKWARD // gate_up_EGD.shape[1]):
        rows = slice(groups[0].padded.start, groups[-1].padded.stop)
        parts = [slice(g.padded.start - rows.start, g.padded.stop - rows.start) for g in groups]
        grad_RD, gate_R1 = grad_TD.index_select(0, token_R[rows]), weight_R1[rows]
        if h_NG is None:
            x_RD = x_TD.index_select(0, token_R[rows])
            h_RG = products(x_RD, gate_up_EGD, gate_up_bias_EG, groups, scratch).to(acc)
            del x_RD
        else:
            h_RG = (h_NG[rows] if blocks.row_R is None else h_NG.index_select(0, blocks.row_R[rows])).to(acc)
        da_RF = products(grad_RD, down_EDF.transpose(1, 2), None, groups, scratch).to(acc)
        if needs_weight or needs_down:
            a_RF = activate(h_RG, F, activation)
        if needs_weight:
            dweight_R[rows] = (da_RF * a_RF).sum(1)
        if needs_down:
            weighted_RF = (gate_R1 * a_RF).to(dtype)
        dh_RG = activate_backward(gate_R1 * da_RF, h_RG, activation).to(dtype)
        x_RD = x_TD.index_select(0, token_R[rows]) if needs_gate_up else x_TD
        for group, part in zip(groups, parts, strict=True):
            experts = group.experts
            if needs_weight and down_bias_ED is not None:
                grad_nMD = grad_RD[part].to(acc).view(-1, group.height, grad_RD.shape[1])
                dweight_R[group.padded] += (grad_nMD * down_bias_ED[experts, None].to(acc)).sum(2).flatten()
            if needs_down:
                _weight_grad(grad_RD[part], weighted_RF[part], ddown, down_main_grad, group, scratch)
            if needs_down_bias:
                ddown_bias[experts] = _sums(gate_R1[part] * grad_RD[part].to(acc), group)
            if needs_gate_up:
                _weight_grad(dh_RG[part], x_RD[part], dgate_up, gate_up_main_grad, group, scratch)
            if needs_gate_up_bias:
                dgate_up_bias[experts] = _sums(dh_RG[part].to(acc), group)
            if needs_x:
                gate_up_nDG = scratch.rounded(dh_RG[part], gate_up_EGD[experts].transpose(1, 2))
                experts_product(dh_RG[part], gate_up_nDG, None, dx_RD[group.padded])
    ones_TK = torch.ones_like(row_TK, dtype=acc)
    dx = combine_blocks(dx_RD, ones_TK, blocks.places(row_TK)) if needs_x else dx_RD.flatten()
    dweight = weight_TK.new_zeros(weight_TK.shape if needs_weight else (0,))
    if needs_weight:
        dweight.view(-1)[slot_N[:used]] = blocks.unpad(dweight_R).to(dweight.dtype)
    return dx, dgate_up, ddown, dgate_up_bias, ddown_bias, dweight


def _weights(weights: Tensor, slot_N: Tensor, blocks: Blocks) -> Tensor:
    """Of the gates of all slots, those of padded rows; zero for the copies."""
    of_rows_N = weights.index_select(0, slot_N)
    if blocks.place_N is None:
        return of_rows_N
    return of_rows_N.new_zeros(blocks.num_padded).index_copy_(0, blocks.place_N, of_rows_N)


def _stack(like: Tensor, needed: bool, blocks: Blocks, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient, zero for experts without rows; without elements where it is not needed."""
    if not needed:
        return like.new_empty(0, dtype=dtype)
    grad = like.new_empty(like.shape, dtype=dtype)
    for e, (start, end) in enumerate(pairwise([0, *blocks.ends])):
        if start == end:
            grad[e].zero_()
    return grad


def _sums(grad_RO: Tensor, group: Group) -> Tensor:
    """Of each expert's rows."""
    return grad_RO.view(-1, group.height, grad_RO.shape[1]).sum(1)


def _weight_grad(
    grad_RO: Tensor,
    x_RI: Tensor,
    dweight_EOI: Tensor,
    main_grad_EOI: Tensor | None,
    group: Group,
    scratch: Scratch,
) -> None:
    """The gradients of a group's matrices, written, or added to the main gradients."""
    grad_nOM = grad_RO.view(-1, group.height, grad_RO.shape[1]).transpose(1, 2)
    x_nMI = x_RI.view(-1, group.height, x_RI.shape[1])
    if main_grad_EOI is not None:
        acc = main_grad_EOI.dtype
        main_grad_EOI[group.experts].baddbmm_(grad_nOM.to(acc), x_nMI.to(acc))
        return
    dweight_nOI = dweight_EOI[group.experts]
    is_direct = dweight_nOI.dtype == x_RI.dtype or is_widened(grad_RO.t(), x_RI.t())
    out_nOI = dweight_nOI if is_direct else scratch.like(dweight_nOI)
    if len(out_nOI) == 1:  # faster than a batch of one
        write_weight_grad(grad_RO, x_RI, out_nOI[0])
    else:
        torch.bmm(grad_nOM, x_nMI, out=out_nOI)
    if out_nOI is not dweight_nOI:
        dweight_nOI.copy_(out_nOI)
