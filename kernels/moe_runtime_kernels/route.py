"""route_topk: choose K experts per token; their gates, the load, and both auxiliary losses, in one pass.

    s = softmax(logits) or sigmoid(logits)            p = s / sum of s over all experts (s itself for softmax)
    chosen = the K largest of s + bias among the experts of the groups kept; ties go to the lowest index
    weight = scale * s                             gate "raw"
             scale * s / sum of the chosen s       gate "renorm"; softmax: a softmax of chosen logits
             scale * 1, with the gradient of s     gate "straight_through", K = 1 only
    balance_loss = E * sum over e of f[e] * P[e]      f: share of the routing slots, sums to 1; P: mean of p
    z_loss = mean of logsumexp(logits)**2

With `num_sequences` the balance loss is the mean of that of each sequence that has tokens.
All arithmetic is float32 (float64 for float64 logits). Loads and losses skip masked tokens. `f` and the
choice have no gradient, so `bias` has none. Sources: Switch Transformer (Fedus et al. 2021, eq. 4), with f
divided by K so that K does not scale the loss; ST-MoE (Zoph et al. 2022, eq. 5); DeepSeek-V3 (2024) for
sigmoid scores, bias and groups.
"""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, check_choice, check_device, check_dims, check_dtype, check_shape
from ._dispatch import accumulator, is_plain, register_kernel, register_reference

SCORES = ("softmax", "sigmoid")
GATES = ("raw", "renorm", "straight_through")
GROUP_SCORES = ("top2_sum", "max")
TINY = 1e-20  # keeps 0 / 0 out of sigmoid scores that have all underflowed
MOST_SORTED = 2**13  # values; for more, making keys and `topk` of these take less time
KEYS_AT_A_TIME = 2**17  # 1 MiB, which stays in the cache


class RouteTopK(NamedTuple):
    """The result of `route_topk`. Ids and counts are int32, the losses scalars; None without statistics."""

    weight_TK: Tensor
    expert_TK: Tensor
    count_E: Tensor | None
    balance_loss: Tensor | None
    z_loss: Tensor | None


# --- contract: schema and output shapes, known before any graph is captured -------------

torch.library.define(
    "moe_runtime::route_topk",
    "(Tensor logits, Tensor? bias, Tensor? token_mask, int experts_per_token, str score, str gate,"
    " float scale, int num_groups, int groups_kept, str group_score, SymInt num_sequences)"
    " -> (Tensor weight, Tensor expert, Tensor count, Tensor sequence_count, Tensor num_counted,"
    " Tensor balance_loss, Tensor z_loss)",
)
torch.library.define(
    "moe_runtime::route_topk_backward",
    "(Tensor dweight, Tensor dbalance_loss, Tensor dz_loss, Tensor logits, Tensor expert,"
    " Tensor sequence_count, Tensor num_counted, Tensor? token_mask, str score, str gate, float scale)"
    " -> Tensor dlogits",
)
_route_topk = torch.ops.moe_runtime.route_topk.default
_route_topk_backward = torch.ops.moe_runtime.route_topk_backward.default


@torch.library.register_fake("moe_runtime::route_topk")
def _(logits, bias, token_mask, experts_per_token, *options):
    (T, E), num_sequences = logits.shape, options[-1]
    weight = logits.new_empty(T, experts_per_token, dtype=accumulator(logits.dtype))
    expert = weight.new_empty(weight.shape, dtype=torch.int32)
    counts = (expert.new_empty(E), expert.new_empty(num_sequences, E), expert.new_empty(2))
    return weight, expert, *counts, weight.new_empty(()), weight.new_empty(())


@torch.library.register_fake("moe_runtime::route_topk_backward")
def _(dweight, dbalance_loss, dz_loss, logits, *rest):
    return logits.new_empty(logits.shape)


# --- reference: the definition, in the plainest PyTorch; also the CPU path --------------


@register_reference("moe_runtime::route_topk")
def route_topk_reference(  # noqa: PLR0913 - the operation's own arguments, in its schema's order
    logits_TE: Tensor,
    bias_E: Tensor | None,
    token_mask_T: Tensor | None,
    experts_per_token: int,
    score: str,
    gate: str,
    scale: float,
    num_groups: int,
    groups_kept: int,
    group_score: str,
    num_sequences: int,
) -> tuple[Tensor, ...]:
    """B is num_sequences. `num_counted`: the tokens that count, and the sequences that have any."""
    options = (experts_per_token, score, gate, scale, num_groups, groups_kept, group_score)
    logits_TE = logits_TE.to(accumulator(logits_TE.dtype))
    weight_TK, expert_TK, prob_TE = _choose(logits_TE, bias_E, *options)
    all_count = token_mask_T is None or bool(token_mask_T.all())
    if all_count and logits_TE.shape[0] == 1:
        statistics = _statistics_of_one(logits_TE, prob_TE, expert_TK)
    else:
        statistics = _statistics(
            logits_TE, prob_TE, expert_TK, None if all_count else token_mask_T, num_sequences
        )
    return weight_TK, expert_TK.int(), *statistics


def _choose(  # noqa: PLR0913 - the operation's own arguments
    logits_TE: Tensor,
    bias_E: Tensor | None,
    experts_per_token: int,
    score: str,
    gate: str,
    scale: float,
    num_groups: int,
    groups_kept: int,
    group_score: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight_TK, expert_TK and p of wide logits."""
    score_TE, prob_TE = router_scores(logits_TE, score)
    choice_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E.to(score_TE.dtype)
    choice_TE = _keep_groups(choice_TE, num_groups, groups_kept, group_score)
    expert_TK = _top(choice_TE, experts_per_token)

    if gate == "renorm" and score == "softmax":
        chosen_TK = logits_TE.gather(1, expert_TK).softmax(1)
    else:
        chosen_TK = score_TE.gather(1, expert_TK)
    if gate == "straight_through":
        chosen_TK = 1 + (chosen_TK - chosen_TK.detach())
    elif gate == "renorm" and score == "sigmoid":
        chosen_TK = chosen_TK / (chosen_TK.sum(1, keepdim=True) + TINY)
    return scale * chosen_TK, expert_TK, prob_TE


def _statistics(
    logits_TE: Tensor, prob_TE: Tensor, expert_TK: Tensor, token_mask_T: Tensor | None, num_sequences: int
) -> tuple[Tensor, ...]:
    """The counts and both losses."""
    B, K, (T, E) = num_sequences, expert_TK.shape[1], logits_TE.shape
    square_T, slots_TK = logits_TE.logsumexp(1).square(), torch.ones_like(expert_TK, dtype=torch.int32)
    if token_mask_T is None:
        tokens_B1 = expert_TK.new_full((B, 1), T // B)
        num_counted = torch.tensor((T, B if T else 0), dtype=torch.int32, device=expert_TK.device)
    else:
        tokens_B1 = token_mask_T.view(B, T // B).sum(1, keepdim=True)
        num_counted = torch.stack((tokens_B1.sum(), (tokens_B1 > 0).sum())).int()
        slots_TK = slots_TK.masked_fill(~token_mask_T[:, None], 0)
        prob_TE = prob_TE.masked_fill(~token_mask_T[:, None], 0)
        square_T = square_T.masked_fill(~token_mask_T, 0)
    num_tokens, sequences = num_counted.clamp(min=1)  # a mean over none is 0
    count_BE = slots_TK.new_zeros(B, E)
    count_BE.scatter_add_(1, expert_TK.reshape(B, T // B * K), slots_TK.view(B, T // B * K))
    prob_BE = prob_TE.view(B, T // B, E).sum(1) / tokens_B1.clamp(min=1)
    balance_loss = (_load(count_BE, prob_BE.dtype) * prob_BE).sum() / sequences
    counts = (count_BE.sum(0, dtype=torch.int32), count_BE, num_counted)
    return *counts, balance_loss, square_T.sum() / num_tokens


def _statistics_of_one(logits_1E: Tensor, prob_1E: Tensor, expert_1K: Tensor) -> tuple[Tensor, ...]:
    """The same of one token that counts, to the bit: a step of decoding spends its time on calls."""
    count_1E = torch.zeros_like(prob_1E, dtype=torch.int32).scatter_(1, expert_1K, 1)
    load_1E = prob_1E.shape[1] * (count_1E.to(prob_1E.dtype) / expert_1K.shape[1])
    num_counted = torch.tensor((1, 1), dtype=torch.int32, device=prob_1E.device)
    z_loss = logits_1E.logsumexp(1).square().squeeze(0)
    return count_1E[0].clone(), count_1E, num_counted, (load_1E * prob_1E).sum(), z_loss


def router_scores(logits_TE: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """The score s of each expert and its normalised form p."""
    if score == "softmax":
        prob_TE = logits_TE.softmax(1)
        return prob_TE, prob_TE
    # not torch.sigmoid: on a CPU its vectorised and scalar parts differ by an ulp, and ties go by position
    score_TE = 1 / (1 + torch.exp(-logits_TE))
    return score_TE, score_TE / (score_TE.sum(1, keepdim=True) + TINY)


def _top(value: Tensor, number: int) -> Tensor:
    """Indices of the largest values, in falling order; ties go to the lowest index, a NaN ranks highest.

    A stable sort, or the same from `_top_keys` where that is faster.
    """
    if value.dtype != torch.float32 or value.numel() <= MOST_SORTED:
        return value.sort(stable=True, dim=1, descending=True).indices[:, :number]
    rows = KEYS_AT_A_TIME // value.shape[1] + 1
    return torch.cat([_top_keys(part, number) for part in value.split(rows)])


def _top_keys(value: Tensor, number: int) -> Tensor:
    """By `topk`, which promises no order of ties, over integers without ties: value and place in one."""
    columns = value.shape[1]
    # one zero, and one NaN, which is above infinity; negative numbers as integers rise as they fall
    bits = (value + 0.0).masked_fill_(value.isnan(), torch.nan).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    place = torch.arange(columns - 1, -1, -1, device=value.device)
    return place.add(bits.long(), alpha=columns).topk(number, dim=1).indices


def _keep_groups(choice_TE: Tensor, num_groups: int, groups_kept: int, group_score: str) -> Tensor:
    """-inf outside the best groups; a group counts its best expert, or its best two added up."""
    if groups_kept == num_groups:
        return choice_TE
    T, E = choice_TE.shape
    grouped = choice_TE.view(T, num_groups, E // num_groups)
    best = grouped.topk(min(2 if group_score == "top2_sum" else 1, E // num_groups), dim=2).values
    kept = torch.zeros(T, num_groups, dtype=torch.bool, device=choice_TE.device)
    kept = kept.scatter(1, _top(best.sum(2), groups_kept), True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).view(T, E)


def _counted(logits_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Which tokens enter the means."""
    if token_mask_T is None:
        return torch.ones(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device)
    return token_mask_T


def _load(count_BE: Tensor, dtype: torch.dtype) -> Tensor:
    """E * f: each expert's load in units of an even one; 0 in a sequence without tokens."""
    return count_BE.shape[1] * (count_BE.to(dtype) / count_BE.sum(1, keepdim=True).clamp(min=1))


@register_reference("moe_runtime::route_topk_backward")
def route_topk_backward_reference(  # noqa: PLR0913 - the operation's own arguments, in its schema's order
    dweight_TK: Tensor,
    dbalance_loss: Tensor,
    dz_loss: Tensor,
    logits_TE: Tensor,
    expert_TK: Tensor,
    count_BE: Tensor,
    num_counted: Tensor,
    token_mask_T: Tensor | None,
    score: str,
    gate: str,
    scale: float,
) -> Tensor:
    dtype, expert_TK = logits_TE.dtype, expert_TK.long()
    logits_TE = logits_TE.to(accumulator(dtype))
    num_tokens, sequences = num_counted.clamp(min=1)
    counted_T1 = _counted(logits_TE, token_mask_T)[:, None]
    score_TE, prob_TE = router_scores(logits_TE, score)
    tokens_B1 = (count_BE.sum(1, keepdim=True) // expert_TK.shape[1]).clamp(min=1)
    dprob_BE = dbalance_loss / (sequences * tokens_B1) * _load(count_BE, logits_TE.dtype)
    dprob_TE = dprob_BE.repeat_interleave(logits_TE.shape[0] // count_BE.shape[0], 0)
    dprob_TE = torch.where(counted_T1, dprob_TE, 0)
    dlogits_TE = torch.where(counted_T1, _z_grad(logits_TE) * (dz_loss / num_tokens), 0)

    dchosen_TK = scale * dweight_TK
    if gate == "renorm" and score == "softmax":
        # the gates are a softmax of their own over the chosen logits
        weight_TK = logits_TE.gather(1, expert_TK).softmax(1)
        dlogits_TE = dlogits_TE.scatter_add(1, expert_TK, _softmax_grad(weight_TK, dchosen_TK))
        dchosen_TK = torch.zeros_like(dchosen_TK)
    elif gate == "renorm":
        chosen_TK = score_TE.gather(1, expert_TK)
        dchosen_TK = _normalised_grad(chosen_TK, dchosen_TK)

    if score == "softmax":
        return (dlogits_TE + _softmax_grad(prob_TE, dprob_TE.scatter_add(1, expert_TK, dchosen_TK))).to(dtype)
    dscore_TE = _normalised_grad(score_TE, dprob_TE).scatter_add(1, expert_TK, dchosen_TK)
    return (dlogits_TE + score_TE * (1 - score_TE) * dscore_TE).to(dtype)


def _z_grad(logits_TE: Tensor) -> Tensor:
    return 2 * logits_TE.logsumexp(1, keepdim=True) * logits_TE.softmax(1)


def _softmax_grad(prob: Tensor, dprob: Tensor) -> Tensor:
    return prob * (dprob - (prob * dprob).sum(1, keepdim=True))


def _normalised_grad(value: Tensor, dshare: Tensor) -> Tensor:
    """Gradient in v of v / (sum of v + TINY)."""
    total = value.sum(1, keepdim=True) + TINY
    return (dshare - (value / total * dshare).sum(1, keepdim=True)) / total


# --- GPU: Triton is imported by the first launch, never by `import` ---------------------

register_kernel("moe_runtime::route_topk", "route", "launch_route_topk")
register_kernel("moe_runtime::route_topk_backward", "route", "launch_route_topk_backward")


# --- autograd and the public function ---------------------------------------------------


class _RouteTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        weight, expert, count, sequence_count, num_counted, balance_loss, z_loss = _route_topk(
            logits, bias, token_mask, *options
        )
        ctx.mark_non_differentiable(expert, count)
        ctx.save_for_backward(logits, expert, sequence_count, num_counted, token_mask)
        ctx.score_gate_scale = options[1:4]
        return weight, expert, count, balance_loss, z_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dweight: Tensor, _: Any, __: Any, dbalance: Tensor, dz: Tensor) -> tuple[Any, ...]:
        dlogits = _route_topk_backward(
            dweight.contiguous(), dbalance, dz, *ctx.saved_tensors, *ctx.score_gate_scale
        )
        return (dlogits,) + (None,) * 10


def route_topk(  # noqa: PLR0913 - one router, described once; RouterConfig holds these fields for the layers
    logits_TE: Tensor,
    experts_per_token: int,
    *,
    score: str = "softmax",
    gate: str = "renorm",
    scale: float = 1.0,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    groups_kept: int = 1,
    group_score: str = "top2_sum",
    token_mask_T: Tensor | None = None,
    num_sequences: int = 1,
    check_finite: bool = False,
    statistics: bool = True,
) -> RouteTopK:
    """Choose K experts for each token and compute gates, loads and both auxiliary losses.

    Args:
        logits_TE: router outputs, bf16, fp16, fp32 or fp64; a non-contiguous tensor is copied first.
        experts_per_token: K, between 1 and E.
        score: "softmax" or "sigmoid".
        gate: "raw", "renorm", or with K = 1 "straight_through".
        scale: multiplies every gate.
        bias_E: added to the scores for the choice only; any float dtype, no gradient.
        num_groups: divides E into groups of neighbours; only the `groups_kept` best ones are chosen from.
        groups_kept: at most num_groups, and enough for K experts.
        group_score: "top2_sum" or "max" of score + bias in the group.
        token_mask_T: bool; tokens that are False are routed, but left out of count_E and of both losses.
        num_sequences: divides T; the tokens of a sequence are neighbours. The balance loss is the mean of
            that of each sequence with tokens that count.
        check_finite: for debugging: raise if a token that counts has a logit that is not finite. It waits
            for the device.
        statistics: whether to return count_E and both losses; without, they are None. On a CPU, where no
            gradients are asked for, that saves most of the time of one token, and some of that of many.

    Returns:
        RouteTopK: weight_TK and the two losses float32 (float64 for float64 logits), expert_TK and count_E
        int32, the experts of a token in falling order of the choice. Losses over no tokens are 0. Logits
        that are not finite give K distinct experts in range all the same, a NaN ranking highest; the gates
        and the losses may then be NaN.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value; on a GPU, E is above 1024.
    """
    T, E = _check_logits(logits_TE, experts_per_token, score, gate)
    _check_groups(E, experts_per_token, num_groups, groups_kept, group_score)
    if bias_E is not None:
        check_shape("route_topk", "bias", bias_E, (E,), "(E,)")
        check_dtype("route_topk", "bias", bias_E, FLOATS)
        check_device("route_topk", "bias", bias_E, logits_TE.device)
        bias_E = bias_E.detach().contiguous()
    if token_mask_T is not None:
        check_shape("route_topk", "token_mask", token_mask_T, (T,), "(T,)")
        check_dtype("route_topk", "token_mask", token_mask_T, (torch.bool,))
        check_device("route_topk", "token_mask", token_mask_T, logits_TE.device)
        token_mask_T = token_mask_T.contiguous()
    if num_sequences < 1 or T % num_sequences:
        raise ValueError(f"route_topk: num_sequences must divide T = {T}, got {num_sequences}")
    # compared, because math.isfinite takes no number that torch.compile traces
    if not (isinstance(scale, Real | torch.SymFloat) and -math.inf < scale < math.inf):
        raise ValueError(f"route_topk: scale must be a finite number, got {scale!r}")
    if check_finite:
        _check_finite(logits_TE, token_mask_T)
    choice = (num_groups, groups_kept, group_score)
    options = (experts_per_token, score, gate, float(scale), *choice, num_sequences)
    operands = (logits_TE.contiguous(), bias_E, token_mask_T)
    chosen: tuple[Tensor, ...]
    if torch.is_grad_enabled():
        chosen = _RouteTopK.apply(*operands, *options)
    elif not statistics and is_plain(logits_TE):
        wide_TE = operands[0].to(accumulator(logits_TE.dtype))
        weight_TK, expert_TK, _ = _choose(wide_TE, bias_E, *options[:-1])
        chosen = (weight_TK, expert_TK.int())
    else:
        route = route_topk_reference if is_plain(logits_TE) and T == 1 else _route_topk
        weight_TK, expert_TK, count_E, _, _, *losses = route(*operands, *options)
        chosen = (weight_TK, expert_TK, count_E, *losses)
    return RouteTopK(*chosen) if statistics else RouteTopK(*chosen[:2], None, None, None)


def _check_logits(logits_TE: Tensor, experts_per_token: int, score: str, gate: str) -> tuple[int, int]:
    check_dims("route_topk", "logits", logits_TE, "(T, E)")
    check_dtype("route_topk", "logits", logits_TE, FLOATS)
    T, E = logits_TE.shape
    if E < 1:
        raise ValueError(
            f"route_topk: logits must have at least 1 expert, got shape {tuple(logits_TE.shape)}"
        )
    if not 1 <= experts_per_token <= E:
        raise ValueError(
            f"route_topk: experts_per_token must be between 1 and E = {E}, got {experts_per_token}"
        )
    check_choice("route_topk", "score", score, SCORES)
    check_choice("route_topk", "gate", gate, GATES)
    if gate == "straight_through" and experts_per_token != 1:
        raise ValueError(
            f"route_topk: gate 'straight_through' needs experts_per_token = 1, got {experts_per_token}"
        )
    return T, E


def _check_groups(
    E: int, experts_per_token: int, num_groups: int, groups_kept: int, group_score: str
) -> None:
    check_choice("route_topk", "group_score", group_score, GROUP_SCORES)
    if num_groups < 1 or E % num_groups:
        raise ValueError(f"route_topk: num_groups must divide E = {E}, got {num_groups}")
    if not 1 <= groups_kept <= num_groups:
        raise ValueError(
            f"route_topk: groups_kept must be between 1 and num_groups = {num_groups}, got {groups_kept}"
        )
    if groups_kept * (E // num_groups) < experts_per_token:
        raise ValueError(
            f"route_topk: groups_kept must leave at least experts_per_token = {experts_per_token} experts, "
            f"got {groups_kept} groups of {E // num_groups}"
        )


def _check_finite(logits_TE: Tensor, token_mask_T: Tensor | None) -> None:
    """Waits for the device, which is why it is off unless asked for."""
    bad_TE = ~logits_TE.detach().isfinite() & _counted(logits_TE, token_mask_T)[:, None]
    if bad_TE.any():
        token, expert = bad_TE.nonzero()[0].tolist()
        raise ValueError(
            f"route_topk: logits must be finite with check_finite, got {logits_TE[token, expert].item()} for "
            f"token {token} and expert {expert}"
        )
