"""Triton kernels for route_topk. Contract and reference: ../route.py.

One kernel routes: each program goes through its tokens tile by tile and leaves its sums of counts,
probabilities and z loss behind. A second one adds these up; with several sequences, or many experts, a third
one finishes.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import route
from .._dispatch import accumulator
from .launch import Compilation, Options, allow_next_kernel, wait_for_inputs

MAX_EXPERTS = 1024
TINY = tl.constexpr(route.TINY)
HIGHEST_32 = tl.constexpr(2**31 - 1)
HIGHEST_64 = tl.constexpr(2**63 - 1)

# --- kernels ----------------------------------------------------------------------------


@triton.jit
def _divide(a, b):
    """Rounded to nearest, which `/` is not in float32."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _sort_key(value):
    """Integers in the order of `value`: the zeros are equal, NaN is the highest, `_lowest` is left free."""
    value = tl.where(value == 0.0, 0.0, value)
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ HIGHEST_64, bits)
        key = tl.where(value == value, key, HIGHEST_64)
    else:
        bits = value.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ HIGHEST_32, bits)
        key = tl.where(value == value, key, HIGHEST_32)
    return key


@triton.jit
def _sort_value(key):
    """What `_sort_key` was made from."""
    if key.dtype == tl.int64:
        value = tl.where(key < 0, key ^ HIGHEST_64, key).to(tl.float64, bitcast=True)
    else:
        value = tl.where(key < 0, key ^ HIGHEST_32, key).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _lowest(key):
    """Below the key of every number."""
    if key.dtype == tl.int64:
        lowest = tl.full(key.shape, -HIGHEST_64 - 1, tl.int64)
    else:
        lowest = tl.full(key.shape, -HIGHEST_32 - 1, tl.int32)
    return lowest


@triton.jit
def _rank_largest(key, index, NUMBER: tl.constexpr):
    """Along axis 1: 0 for the largest key, 1 for the next, up to NUMBER - 1; -1 for the others.

    Equal keys rank by `index`, so that no two elements share a rank.
    """
    rank = tl.full(key.shape, -1, tl.int32)
    for k in range(NUMBER):
        largest = tl.max(key, 1)
        first = tl.min(tl.where(key == largest[:, None], index, HIGHEST_32), 1)
        hit = index == first[:, None]
        rank = tl.where(hit, k, rank)
        key = tl.where(hit, _lowest(key), key)
    return rank


@triton.jit
def _keep_groups(
    choice,
    in_e,
    NUM_GROUPS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    ADD_SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """-inf outside the best groups; a group counts its best expert, or its best two added up."""
    key = _sort_key(choice)
    key = tl.where(in_e[None, :], key, _lowest(key))
    key = tl.reshape(key, [ROWS, GROUPS, SIZE])
    best = tl.max(key, 2)  # [ROWS, GROUPS]
    value = _sort_value(best)
    if ADD_SECOND:
        member = tl.arange(0, SIZE)[None, None, :]
        first = tl.min(tl.where(key == best[:, :, None], member, HIGHEST_32), 2)
        second = tl.max(tl.where(member == first[:, :, None], _lowest(key), key), 2)
        value += _sort_value(second)
    group = tl.arange(0, GROUPS)[None, :]
    key = _sort_key(value)
    rank = _rank_largest(tl.where(group < NUM_GROUPS, key, _lowest(key)), group, GROUPS_KEPT)
    rank = tl.broadcast_to(rank[:, :, None], [ROWS, GROUPS, SIZE])
    return tl.where(tl.reshape(rank, [ROWS, GROUPS * SIZE]) >= 0, choice, float("-inf"))


@triton.jit(do_not_specialize=["L", "programs", "rows_per_program"])
def _route_kernel(
    logits_ptr,
    bias_ptr,
    mask_ptr,
    weight_ptr,
    expert_ptr,
    count_ptr,
    prob_ptr,
    z_ptr,
    L,
    programs,
    rows_per_program,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (num_sequences * programs,): one program routes `rows_per_program` tokens of one sequence.

    Experts lie group by group, each padded to SIZE; `e` is the expert at a place. A program's sums go to
    row `program` of `count_ptr` [programs, E], `prob_ptr` [programs, E] and `z_ptr` [programs].
    """
    acc: tl.constexpr = weight_ptr.dtype.element_ty
    MEMBERS: tl.constexpr = E // NUM_GROUPS
    place = tl.arange(0, GROUPS * SIZE)
    if NUM_GROUPS == 1:
        e = place
        in_e = place < E
    else:
        e = (place // SIZE) * MEMBERS + place % SIZE
        in_e = (place // SIZE < NUM_GROUPS) & (place % SIZE < MEMBERS)

    wait_for_inputs(PDL)
    # 64-bit before any product: 4M tokens of 512 experts are 2**31 logits
    program = tl.program_id(0).to(tl.int64)
    first = (program % programs) * rows_per_program
    end = tl.minimum(first + rows_per_program, L)
    start = (program // programs) * L
    count = tl.zeros([GROUPS * SIZE], dtype=tl.int32)
    prob = tl.zeros([GROUPS * SIZE], dtype=acc)
    z = tl.zeros([ROWS], dtype=acc)
    # `while`, because the interpreter cannot count to a run-time number with every NumPy
    while first < end:
        in_t = first + tl.arange(0, ROWS) < end
        t = start + first + tl.arange(0, ROWS)
        is_element = in_t[:, None] & in_e[None, :]
        logits = tl.load((logits_ptr + t * E)[:, None] + e[None, :], mask=is_element, other=0.0)
        logits = tl.where(in_e[None, :], logits.to(acc), float("-inf"))  # [ROWS, GROUPS * SIZE]
        highest = tl.max(logits, 1)
        exps = tl.exp(logits - highest[:, None])
        total = tl.sum(exps, 1)
        if SCORE == "softmax":
            score = _divide(exps, total[:, None])
            share = score
        else:
            score = _divide(tl.full(logits.shape, 1.0, acc), 1.0 + tl.exp(-logits))
            share = _divide(score, tl.sum(score, 1)[:, None] + TINY)

        choice = score
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + e, mask=in_e, other=0.0).to(acc)[None, :]
        if GROUPS_KEPT < NUM_GROUPS:
            add_second: tl.constexpr = GROUP_SCORE == "top2_sum" and MEMBERS > 1
            choice = _keep_groups(choice, in_e, NUM_GROUPS, GROUPS_KEPT, add_second, ROWS, GROUPS, SIZE)
        key = _sort_key(choice)
        rank = _rank_largest(tl.where(in_e[None, :], key, _lowest(key)), e[None, :], K)
        chosen = rank >= 0

        if GATE == "straight_through":
            gate = 1.0 + (score - score)  # NaN stays NaN
        elif GATE == "raw":
            gate = score
        elif SCORE == "softmax":
            # not score / sum: the scores of all chosen experts may have underflowed
            best = tl.max(tl.where(chosen, logits, float("-inf")), 1)
            gate = tl.exp(tl.where(chosen, logits - best[:, None], float("-inf")))
            gate = _divide(gate, tl.sum(gate, 1)[:, None])
        else:
            gate = _divide(score, tl.sum(tl.where(chosen, score, 0.0), 1)[:, None] + TINY)
        here = chosen & in_t[:, None]
        tl.store((weight_ptr + t * K)[:, None] + rank, SCALE * gate, mask=here)
        tl.store((expert_ptr + t * K)[:, None] + rank, tl.broadcast_to(e[None, :], rank.shape), mask=here)

        counts = in_t
        if mask_ptr is not None:
            counts = in_t & (tl.load(mask_ptr + t, mask=in_t, other=0) != 0)
        lse = highest + tl.log(total)
        count += tl.sum((chosen & counts[:, None]).to(tl.int32), 0)
        prob += tl.sum(tl.where(counts[:, None], share, 0.0), 0)
        z += tl.where(counts, lse * lse, 0.0)
        first += ROWS

    allow_next_kernel(PDL)
    tl.store(count_ptr + program * E + e, count, mask=in_e)
    tl.store(prob_ptr + program * E + e, prob, mask=in_e)
    tl.store(z_ptr + program, tl.sum(z, 0))


@triton.jit(do_not_specialize=["programs", "blocks"])
def _reduce_kernel(
    program_count_ptr,
    program_prob_ptr,
    program_z_ptr,
    sequence_count_ptr,
    count_ptr,
    num_counted_ptr,
    balance_ptr,
    z_ptr,
    slots_ptr,
    programs,
    blocks,
    E: tl.constexpr,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (num_sequences * blocks,): one program adds up BLOCK_E experts of one sequence.

    WHOLE: there is one sequence and one block, and this is all. Otherwise `balance_ptr` [sequences, blocks]
    gets the sum of count * probability, `slots_ptr` [sequences, blocks] that of counts, `z_ptr` [sequences]
    that of z.
    """
    wait_for_inputs(PDL)
    pid = tl.program_id(0).to(tl.int64)
    sequence = pid // blocks
    block = pid % blocks
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    in_e = e < E
    first = sequence * programs
    end = first + programs
    acc: tl.constexpr = program_prob_ptr.dtype.element_ty
    count = tl.zeros([ROWS, BLOCK_E], dtype=tl.int32)
    prob = tl.zeros([ROWS, BLOCK_E], dtype=acc)
    z = tl.zeros([ROWS], dtype=acc)
    while first < end:
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & in_e[None, :]
        # [ROWS, BLOCK_E]
        count += tl.load((program_count_ptr + row * E)[:, None] + e[None, :], mask=mask, other=0)
        prob += tl.load((program_prob_ptr + row * E)[:, None] + e[None, :], mask=mask, other=0.0)
        z += tl.load(program_z_ptr + row, mask=row < end, other=0.0)  # [ROWS]
        first += ROWS

    allow_next_kernel(PDL)
    count_E = tl.sum(count, 0)
    prob_E = tl.sum(prob, 0)
    slots = tl.sum(count_E, 0)
    tl.store(sequence_count_ptr + sequence * E + e, count_E, mask=in_e)
    if WHOLE:
        tl.store(count_ptr + e, count_E, mask=in_e)
        tokens = slots // K
        tl.store(num_counted_ptr, tokens)
        tl.store(num_counted_ptr + 1, tl.minimum(tokens, 1))
        load = E * _divide(count_E.to(acc), tl.maximum(slots, 1).to(acc))
        tokens = tl.maximum(tokens, 1).to(acc)
        tl.store(balance_ptr, _divide(tl.sum(load * prob_E, 0), tokens))
        tl.store(z_ptr, _divide(tl.sum(z, 0), tokens))
    else:
        tl.store(balance_ptr + pid, tl.sum(count_E.to(acc) * prob_E, 0))
        tl.store(slots_ptr + pid, slots)
        tl.store(z_ptr + sequence, tl.sum(z, 0), mask=block == 0)


@triton.jit(do_not_specialize=["sequences", "blocks"])
def _finish_kernel(
    sequence_count_ptr,
    sequence_balance_ptr,
    sequence_z_ptr,
    slots_ptr,
    count_ptr,
    num_counted_ptr,
    balance_ptr,
    z_ptr,
    sequences,
    blocks,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (1,): add up the sequences, ascending."""
    wait_for_inputs(PDL)
    acc: tl.constexpr = sequence_balance_ptr.dtype.element_ty
    e = tl.arange(0, BLOCK_E)
    block = tl.arange(0, BLOCKS)
    count = tl.zeros([ROWS, BLOCK_E], dtype=tl.int32)
    tokens = tl.zeros([ROWS], dtype=tl.int32)
    counted = tl.zeros([ROWS], dtype=tl.int32)
    balance = tl.zeros([ROWS], dtype=acc)
    z = tl.zeros([ROWS], dtype=acc)
    first = tl.program_id(0).to(tl.int64)
    while first < sequences:
        row = first + tl.arange(0, ROWS)
        in_rows = row < sequences
        mask = in_rows[:, None] & (e < E)[None, :]
        # [ROWS, BLOCK_E]
        count += tl.load((sequence_count_ptr + row * E)[:, None] + e[None, :], mask=mask, other=0)
        mask = in_rows[:, None] & (block < blocks)[None, :]
        # [ROWS, BLOCKS]
        slots = tl.load((slots_ptr + row * blocks)[:, None] + block[None, :], mask=mask, other=0)
        dot = tl.load((sequence_balance_ptr + row * blocks)[:, None] + block[None, :], mask=mask, other=0.0)
        slots, dot = tl.sum(slots, 1), tl.sum(dot, 1)
        z += tl.load(sequence_z_ptr + row, mask=in_rows, other=0.0)  # [ROWS]
        tokens += slots // K
        counted += tl.minimum(slots, 1)
        dot = E * _divide(dot, tl.maximum(slots, 1).to(acc))
        balance += _divide(dot, tl.maximum(slots // K, 1).to(acc))
        first += ROWS

    allow_next_kernel(PDL)
    num_tokens = tl.sum(tokens, 0)
    num_sequences = tl.sum(counted, 0)
    tl.store(count_ptr + e, tl.sum(count, 0), mask=e < E)
    tl.store(num_counted_ptr, num_tokens)
    tl.store(num_counted_ptr + 1, num_sequences)
    tl.store(balance_ptr, _divide(tl.sum(balance, 0), tl.maximum(num_sequences, 1).to(acc)))
    tl.store(z_ptr, _divide(tl.sum(z, 0), tl.maximum(num_tokens, 1).to(acc)))


@triton.jit(do_not_specialize=["T", "L"])
def _route_backward_kernel(
    dweight_ptr,
    dbalance_ptr,
    dz_ptr,
    logits_ptr,
    expert_ptr,
    sequence_count_ptr,
    num_counted_ptr,
    mask_ptr,
    dlogits_ptr,
    T,
    L,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    ONE_SEQUENCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(T, ROWS),): one program writes the gradients of ROWS tokens."""
    acc: tl.constexpr = dweight_ptr.dtype.element_ty
    wait_for_inputs(PDL)
    # 64-bit before any product: 4M tokens of 512 experts are 2**31 logits
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_t = t < T
    e = tl.arange(0, BLOCK_E)
    in_e = e < E
    is_element = in_t[:, None] & in_e[None, :]
    logits = tl.load((logits_ptr + t * E)[:, None] + e[None, :], mask=is_element, other=0.0)
    logits = tl.where(in_e[None, :], logits.to(acc), float("-inf"))  # [ROWS, BLOCK_E]
    highest = tl.max(logits, 1)
    soft = tl.exp(logits - highest[:, None])
    total = tl.sum(soft, 1)
    soft = _divide(soft, total[:, None])
    lse = highest + tl.log(total)

    g = tl.zeros([ROWS, BLOCK_E], dtype=acc)
    chosen = tl.zeros([ROWS, BLOCK_E], dtype=tl.int32)
    for k in range(K):
        expert = tl.load(expert_ptr + t * K + k, mask=in_t, other=0)  # [ROWS]
        dweight = tl.load(dweight_ptr + t * K + k, mask=in_t, other=0.0)  # [ROWS]
        hit = e[None, :] == expert[:, None]
        g = tl.where(hit, SCALE * dweight[:, None], g)
        chosen = tl.where(hit, 1, chosen)

    if ONE_SEQUENCE:
        sequence = tl.zeros([1], dtype=tl.int64)
        has_count = tl.full([1], 1, tl.int1)
    else:
        sequence = t // L
        has_count = in_t
    # [1 or ROWS, BLOCK_E]
    count = tl.load(
        (sequence_count_ptr + sequence * E)[:, None] + e[None, :],
        mask=has_count[:, None] & in_e[None, :],
        other=0,
    )
    slots = tl.sum(count, 1)
    num_tokens = tl.maximum(tl.load(num_counted_ptr), 1).to(acc)
    sequence_tokens = tl.maximum(slots // K, 1).to(acc) * tl.maximum(tl.load(num_counted_ptr + 1), 1).to(acc)
    load = E * _divide(count.to(acc), tl.maximum(slots, 1).to(acc)[:, None])
    dprob = _divide(tl.load(dbalance_ptr), sequence_tokens)[:, None] * load
    dz = 2.0 * _divide(tl.load(dz_ptr), num_tokens)
    counts = in_t
    if mask_ptr is not None:
        counts = in_t & (tl.load(mask_ptr + t, mask=in_t, other=0) != 0)
    dprob = tl.where(counts[:, None], tl.broadcast_to(dprob, [ROWS, BLOCK_E]), 0.0)
    dlogits = tl.where(counts[:, None], (dz * lse)[:, None] * soft, 0.0)

    if SCORE == "softmax":
        if GATE == "renorm":
            # the gates are a softmax of their own over the chosen logits
            best = tl.max(tl.where(chosen != 0, logits, float("-inf")), 1)
            weight = tl.exp(tl.where(chosen != 0, logits - best[:, None], float("-inf")))
            weight = _divide(weight, tl.sum(weight, 1)[:, None])
            dlogits += weight * (g - tl.sum(weight * g, 1)[:, None])
            ds = dprob
        else:
            ds = dprob + g
        dlogits += soft * (ds - tl.sum(soft * ds, 1)[:, None])
    else:
        score = _divide(tl.full(logits.shape, 1.0, acc), 1.0 + tl.exp(-logits))
        if GATE == "renorm":
            score_sum = tl.sum(tl.where(chosen != 0, score, 0.0), 1)[:, None] + TINY
            mean = tl.sum(_divide(score, score_sum) * g, 1)[:, None]
            g = tl.where(chosen != 0, _divide(g - mean, score_sum), 0.0)
        score_sum = tl.sum(score, 1)[:, None] + TINY
        mean = tl.sum(_divide(score, score_sum) * dprob, 1)[:, None]
        dlogits += score * (1.0 - score) * (_divide(dprob - mean, score_sum) + g)
    allow_next_kernel(PDL)
    dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
    tl.store((dlogits_ptr + t * E)[:, None] + e[None, :], dlogits, mask=is_element)


# --- launch choice: a pure function of sizes, so that it can be tested without a GPU ----


@dataclass(frozen=True, kw_only=True)
class RouteLaunch:
    """Tiles of the forward kernels. `groups` and `size` lay out the experts, `rows` tokens a tile.

    Each of `programs` (per sequence) routes `rows_per_program` tokens; one reducing program adds up
    `reduce_block` experts, `reduce_rows` programs at a time.
    """

    rows: int
    groups: int
    size: int
    options: Options
    programs: int
    rows_per_program: int
    reduce_rows: int
    reduce_block: int
    reduce_options: Options
    finish_rows: int
    finish_block: int
    finish_options: Options


@dataclass(frozen=True, kw_only=True)
class BackwardLaunch:
    rows: int
    block: int
    options: Options


def _tile(block: int, rows: int, elements: int) -> tuple[int, Options]:
    """At most so many rows of `block` in a tile of `elements`, with 8 elements for each thread."""
    rows = max(1, min(rows, elements // block))
    return rows, Options(num_warps=min(8, max(1, rows * block // 256)))


def choose_launch(T: int, num_sequences: int, E: int, num_groups: int = 1) -> RouteLaunch:
    """Few tokens: a program for each. Many: at most 256 programs, so that few sums are left behind.

    Not yet measured on a GPU.

    Raises:
        ValueError: E is above 1024.
    """
    if E > MAX_EXPERTS:
        raise ValueError(f"route_topk: logits must have at most {MAX_EXPERTS} experts on a GPU, got {E}")
    L = T // num_sequences
    groups = triton.next_power_of_2(num_groups)
    size = max(triton.next_power_of_2(E // num_groups), 2 // groups)
    block = groups * size
    # as many warps for each token as without, but fewer sums to add up
    for least_T, most_rows, elements in ((4096, 64, 2048), (64, 8, 1024), (0, 1, 256)):
        rows, options = _tile(block, most_rows, elements)
        if least_T <= T and rows <= L:
            break
    tiles = triton.cdiv(L, rows)
    rows_per_program = rows * max(1, triton.cdiv(tiles, max(1, 256 // num_sequences)))
    programs = triton.cdiv(L, rows_per_program)
    block = max(2, triton.next_power_of_2(E))
    # one program reads some 256 KiB of sums in the time of a launch
    reduce_block = block if programs * block <= 32768 else min(block, 64)
    reduce_rows, reduce_options = _tile(reduce_block, 64, 4096)
    finish_rows, finish_options = _tile(block, 64, 4096)
    return RouteLaunch(
        rows=rows,
        groups=groups,
        size=size,
        options=options,
        programs=programs,
        rows_per_program=rows_per_program,
        reduce_rows=reduce_rows,
        reduce_block=reduce_block,
        reduce_options=reduce_options,
        finish_rows=finish_rows,
        finish_block=block,
        finish_options=finish_options,
    )


def choose_backward_launch(T: int, E: int) -> BackwardLaunch:
    """Small tiles: nothing is added up across rows. Not yet measured on a GPU."""
    block = max(2, triton.next_power_of_2(E))
    rows, options = _tile(block, 8 if T >= 64 else 1, 256)
    return BackwardLaunch(rows=rows, block=block, options=options)


# --- launchers --------------------------------------------------------------------------


def launch_route_topk(
    logits: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    experts_per_token: int,
    score: str,
    gate: str,
    scale: float,
    num_groups: int,
    groups_kept: int,
    group_score: str,
    num_sequences: int,
) -> tuple[Tensor, ...]:
    (T, E), K, B = logits.shape, experts_per_token, num_sequences
    launch = choose_launch(T, B, E, num_groups)
    acc, programs = accumulator(logits.dtype), B * launch.programs
    weight = logits.new_empty(T, K, dtype=acc)
    expert = logits.new_empty(T, K, dtype=torch.int32)
    program_count = expert.new_empty(programs, E)
    program_prob, program_z = weight.new_empty(programs, E), weight.new_empty(programs)
    if T > 0:
        _route_kernel[(programs,)](
            logits,
            bias,
            None if token_mask is None else token_mask.view(torch.uint8),
            weight,
            expert,
            program_count,
            program_prob,
            program_z,
            T // B,
            launch.programs,
            launch.rows_per_program,
            E=E,
            K=K,
            SCORE=score,
            GATE=gate,
            SCALE=scale,
            NUM_GROUPS=num_groups,
            GROUPS_KEPT=groups_kept,
            GROUP_SCORE=group_score,
            ROWS=launch.rows,
            GROUPS=launch.groups,
            SIZE=launch.size,
            **launch.options.keywords(),
        )

    count, sequence_count, num_counted = expert.new_empty(E), expert.new_empty(B, E), expert.new_empty(2)
    balance_loss, z_loss = weight.new_empty(()), weight.new_empty(())
    blocks = triton.cdiv(E, launch.reduce_block)
    whole = B * blocks == 1
    balance = balance_loss if whole else weight.new_empty(B, blocks)
    z, slots = (z_loss, None) if whole else (weight.new_empty(B), expert.new_empty(B, blocks))
    _reduce_kernel[(B * blocks,)](
        program_count,
        program_prob,
        program_z,
        sequence_count,
        count if whole else None,
        num_counted if whole else None,
        balance,
        z,
        slots,
        launch.programs,
        blocks,
        E=E,
        K=K,
        WHOLE=whole,
        ROWS=launch.reduce_rows,
        BLOCK_E=launch.reduce_block,
        **launch.reduce_options.keywords(),
    )
    if not whole:
        _finish_kernel[(1,)](
            sequence_count,
            balance,
            z,
            slots,
            count,
            num_counted,
            balance_loss,
            z_loss,
            B,
            blocks,
            E=E,
            K=K,
            ROWS=launch.finish_rows,
            BLOCK_E=launch.finish_block,
            BLOCKS=triton.next_power_of_2(blocks),
            **launch.finish_options.keywords(),
        )
    return weight, expert, count, sequence_count, num_counted, balance_loss, z_loss


def launch_route_topk_backward(
    dweight: Tensor,
    dbalance_loss: Tensor,
    dz_loss: Tensor,
    logits: Tensor,
    expert: Tensor,
    sequence_count: Tensor,
    num_counted: Tensor,
    token_mask: Tensor | None,
    score: str,
    gate: str,
    scale: float,
) -> Tensor:
    (T, K), (B, E) = expert.shape, sequence_count.shape
    dlogits = torch.empty_like(logits)
    if T == 0:
        return dlogits
    launch = choose_backward_launch(T, E)
    _route_backward_kernel[(triton.cdiv(T, launch.rows),)](
        dweight,
        dbalance_loss,
        dz_loss,
        logits,
        expert,
        sequence_count,
        num_counted,
        None if token_mask is None else token_mask.view(torch.uint8),
        dlogits,
        T,
        T // B,
        E=E,
        K=K,
        SCORE=score,
        GATE=gate,
        SCALE=scale,
        ONE_SEQUENCE=B == 1,
        ROWS=launch.rows,
        BLOCK_E=launch.block,
        **launch.options.keywords(),
    )
    return dlogits


# --- for compiling ahead of time --------------------------------------------------------

# E, K, score, gate, groups, groups kept, and whether there are a bias and a mask
_ROUTERS: tuple[tuple[int, int, str, str, int, int, bool], ...] = (
    (8, 2, "softmax", "renorm", 1, 1, False),
    (60, 4, "softmax", "raw", 1, 1, False),
    (128, 8, "softmax", "renorm", 1, 1, False),
    (128, 1, "sigmoid", "straight_through", 1, 1, False),
    (256, 8, "sigmoid", "renorm", 8, 4, True),
    (512, 10, "softmax", "renorm", 1, 1, True),
    (1024, 16, "sigmoid", "renorm", 1, 1, True),
)
_FLOAT_POINTERS = (
    "weight prob z program_prob program_z balance sequence_balance sequence_z dweight dbalance dz bias"
)
_INT_POINTERS = "expert count program_count sequence_count num_counted slots"
_TYPES = {
    **{f"{name}_ptr": "*fp32" for name in _FLOAT_POINTERS.split()},
    **{f"{name}_ptr": "*i32" for name in _INT_POINTERS.split()},
    "mask_ptr": "*u8",
    **dict.fromkeys(("T", "L", "programs", "rows_per_program", "blocks", "sequences"), "i32"),
}


def compilations() -> list[Compilation]:
    """Every tile that a launch can choose, for the routers of well-known models, PDL off and on."""
    found: dict[str, Compilation] = {}
    for dtype in ("bf16", "fp32"):
        for router in _ROUTERS:
            for T, num_sequences in ((1, 1), (512, 1), (1024, 1), (32768, 1), (32768, 8)):
                for compilation in _compilations(dtype, T, num_sequences, *router):
                    for pdl in (False, True):
                        made = replace(compilation, options=replace(compilation.options, pdl=pdl))
                        found.setdefault(repr(replace(made, label="")), made)
    return list(found.values())


def _compilations(
    dtype: str,
    T: int,
    num_sequences: int,
    E: int,
    K: int,
    score: str,
    gate: str,
    num_groups: int,
    groups_kept: int,
    optional: bool,
) -> list[Compilation]:
    """The launches of one forward and one backward."""
    launch, backward = choose_launch(T, num_sequences, E, num_groups), choose_backward_launch(T, E)
    types = {**_TYPES, "logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}"}
    blocks = triton.cdiv(E, launch.reduce_block)
    whole = num_sequences * blocks == 1
    sizes = {"E": E, "K": K}
    router = {**sizes, "SCORE": score, "GATE": gate, "SCALE": 1.0}
    router |= {} if optional else {"mask_ptr": None}
    groups = {"NUM_GROUPS": num_groups, "GROUPS_KEPT": groups_kept, "GROUP_SCORE": "top2_sum"}
    groups |= {} if optional else {"bias_ptr": None}
    tile = {"ROWS": launch.rows, "GROUPS": launch.groups, "SIZE": launch.size}
    missing = {"slots_ptr": None} if whole else {"count_ptr": None, "num_counted_ptr": None}
    reduce = {"WHOLE": whole, "ROWS": launch.reduce_rows, "BLOCK_E": launch.reduce_block}
    finish = {"ROWS": launch.finish_rows, "BLOCK_E": launch.finish_block}
    finish |= {"BLOCKS": triton.next_power_of_2(blocks)}
    kernels: list[tuple[Any, Options, dict[str, Any]]] = [
        (_route_kernel, launch.options, {**router, **groups, **tile}),
        (_reduce_kernel, launch.reduce_options, {**sizes, **missing, **reduce}),
        (_finish_kernel, launch.finish_options, {**sizes, **finish}),
        (
            _route_backward_kernel,
            backward.options,
            {
                **router,
                "ONE_SEQUENCE": num_sequences == 1,
                "ROWS": backward.rows,
                "BLOCK_E": backward.block,
            },
        ),
    ]
    return [
        Compilation(
            kernel=kernel,
            label=f"{dtype} E={E} K={K} {score} {gate} T={T} sequences={num_sequences}",
            signature={n: types[n] for n in kernel.arg_names if n in types and n not in constexprs},
            constexprs=constexprs,
            options=options,
        )
        for kernel, options, constexprs in (kernels[:2] + kernels[3:] if whole else kernels)
    ]
