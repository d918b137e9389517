"""route_topk: choose K experts per token; their gates, the load, and both auxiliary losses, in one pass.

    s = softmax(logits) or sigmoid(logits)            p = s / sum of s over all experts (s itself for softmax)
    chosen = the K largest of s + bias among the experts of the groups kept; ties go to the lowest index
    weight = scale * s                             gate "raw"
             scale * s / sum of the chosen s       gate "renorm"; softmax: a softmax of chosen logits
             scale * 1, with the gradient of s     gate "straight_through", K = 1 only
    balance_loss = E * sum over e of f[e] * P[e]      f: share of the routing slots, sums to 1; P: mean of p
    z_loss = mean of logsumexp(logits)**2

All arithmetic is float32 (float64 for float64 logits). Loads and losses skip masked tokens. `f` and the
choice have no gradient, so `bias` has none. Sources: Switch Transformer (Fedus et al. 2021, eq. 4), with f
divided by K so that K does not scale the loss; ST-MoE (Zoph et al. 2022, eq. 5); DeepSeek-V3 (2024) for
sigmoid scores, bias and groups.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, check_choice, check_device, check_dims, check_dtype, check_shape
from ._dispatch import accumulator, register_reference

SCORES = ("softmax", "sigmoid")
GATES = ("raw", "renorm", "straight_through")
GROUP_SCORES = ("top2_sum", "max")
TINY = 1e-20  # keeps 0 / 0 out of sigmoid scores that have all underflowed


class RouteTopK(NamedTuple):
    """The result of `route_topk`. Ids and counts are int32, the losses scalars."""

    weight_TK: Tensor
    expert_TK: Tensor
    count_E: Tensor
    balance_loss: Tensor
    z_loss: Tensor


# --- contract: schema and output shapes, known before any graph is captured -------------

torch.library.define(
    "moe_runtime::route_topk",
    "(Tensor logits, Tensor? bias, Tensor? token_mask, int experts_per_token, str score, str gate,"
    " float scale, int num_groups, int groups_kept, str group_score)"
    " -> (Tensor weight, Tensor expert, Tensor count, Tensor balance_loss, Tensor z_loss)",
)
torch.library.define(
    "moe_runtime::route_topk_backward",
    "(Tensor dweight, Tensor dbalance_loss, Tensor dz_loss, Tensor logits, Tensor expert, Tensor count,"
    " Tensor? token_mask, str score, str gate, float scale) -> Tensor dlogits",
)
_route_topk = torch.ops.moe_runtime.route_topk.default
_route_topk_backward = torch.ops.moe_runtime.route_topk_backward.default


@torch.library.register_fake("moe_runtime::route_topk")
def _(logits, bias, token_mask, experts_per_token, *options):
    T, E = logits.shape
    weight = logits.new_empty(T, experts_per_token, dtype=accumulator(logits.dtype))
    expert = weight.new_empty(weight.shape, dtype=torch.int32)
    return weight, expert, expert.new_empty(E), weight.new_empty(()), weight.new_empty(())


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits_TE = logits_TE.to(accumulator(logits_TE.dtype))
    score_TE, prob_TE = _scores(logits_TE, score)
    choice_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E.to(score_TE.dtype)
    choice_TE = _keep_groups(choice_TE, num_groups, groups_kept, group_score)
    expert_TK = _top(choice_TE, experts_per_token)

    chosen_TK = score_TE.gather(1, expert_TK)
    if gate == "straight_through":
        chosen_TK = 1 + (chosen_TK - chosen_TK.detach())
    elif gate == "renorm" and score == "softmax":
        chosen_TK = logits_TE.gather(1, expert_TK).softmax(1)
    elif gate == "renorm":
        chosen_TK = chosen_TK / (chosen_TK.sum(1, keepdim=True) + TINY)

    counted_T, num_tokens = _counted(logits_TE, token_mask_T)
    count_E = torch.zeros(logits_TE.shape[1], dtype=torch.int32, device=logits_TE.device)
    slots_TK = counted_T[:, None].expand_as(expert_TK)
    count_E = count_E.index_add(0, expert_TK.flatten(), slots_TK.flatten().int())
    prob_E = torch.where(counted_T[:, None], prob_TE, 0).sum(0) / num_tokens
    balance_loss = (_load(count_E, num_tokens, expert_TK, prob_E.dtype) * prob_E).sum()
    z_loss = torch.where(counted_T, logits_TE.logsumexp(1).square(), 0).sum() / num_tokens
    return scale * chosen_TK, expert_TK.int(), count_E, balance_loss, z_loss


def _scores(logits_TE: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """The score s of each expert and its normalised form p."""
    if score == "softmax":
        prob_TE = logits_TE.softmax(1)
        return prob_TE, prob_TE
    # not torch.sigmoid: on a CPU its vectorised and scalar parts differ by an ulp, and ties go by position
    score_TE = 1 / (1 + torch.exp(-logits_TE))
    return score_TE, score_TE / (score_TE.sum(1, keepdim=True) + TINY)


def _top(value: Tensor, number: int) -> Tensor:
    """Indices of the largest values, in falling order. A stable sort, so that ties go to the lowest index."""
    return value.sort(stable=True, dim=1, descending=True).indices[:, :number]


def _keep_groups(choice_TE: Tensor, num_groups: int, groups_kept: int, group_score: str) -> Tensor:
    """-inf outside the best groups; a group counts its best expert, or its best two added up."""
    if groups_kept == num_groups:
        return choice_TE
    T, E = choice_TE.shape
    grouped = choice_TE.view(T, num_groups, E // num_groups)
    best = grouped.sort(2, descending=True).values[..., : 2 if group_score == "top2_sum" else 1]
    kept = torch.zeros(T, num_groups, dtype=torch.bool, device=choice_TE.device)
    kept = kept.scatter(1, _top(best.sum(2), groups_kept), True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).view(T, E)


def _counted(logits_TE: Tensor, token_mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens enter the means, and their number; at least 1, so that a mean over none is 0."""
    if token_mask_T is None:
        token_mask_T = torch.ones(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device)
    return token_mask_T, token_mask_T.sum().clamp(min=1)


def _load(count_E: Tensor, num_tokens: Tensor, expert_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """E * f: each expert's load in units of an even one."""
    return count_E.shape[0] * (count_E.to(dtype) / (num_tokens * expert_TK.shape[1]))


@register_reference("moe_runtime::route_topk_backward")
def route_topk_backward_reference(  # noqa: PLR0913 - the operation's own arguments, in its schema's order
    dweight_TK: Tensor,
    dbalance_loss: Tensor,
    dz_loss: Tensor,
    logits_TE: Tensor,
    expert_TK: Tensor,
    count_E: Tensor,
    token_mask_T: Tensor | None,
    score: str,
    gate: str,
    scale: float,
) -> Tensor:
    dtype, expert_TK = logits_TE.dtype, expert_TK.long()
    logits_TE = logits_TE.to(accumulator(dtype))
    counted_T, num_tokens = _counted(logits_TE, token_mask_T)
    counted_T1 = counted_T[:, None]
    score_TE, prob_TE = _scores(logits_TE, score)
    load_E = _load(count_E, num_tokens, expert_TK, logits_TE.dtype)
    dprob_TE = torch.where(counted_T1, dbalance_loss / num_tokens * load_E, 0)
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


# --- autograd and the public function ---------------------------------------------------


class _RouteTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, token_mask: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        weight, expert, count, balance_loss, z_loss = _route_topk(logits, bias, token_mask, *options)
        ctx.mark_non_differentiable(expert, count)
        ctx.save_for_backward(logits, expert, count, token_mask)
        ctx.score_gate_scale = options[1:4]
        return weight, expert, count, balance_loss, z_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dweight: Tensor, _: Any, __: Any, dbalance: Tensor, dz: Tensor) -> tuple[Any, ...]:
        dlogits = _route_topk_backward(
            dweight.contiguous(), dbalance, dz, *ctx.saved_tensors, *ctx.score_gate_scale
        )
        return (dlogits,) + (None,) * 9


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

    Returns:
        RouteTopK: weight_TK and the two losses float32 (float64 for float64 logits), expert_TK and count_E
        int32, the experts of a token in falling order of the choice. Losses over no tokens are 0.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    T, E = _check_logits(logits_TE, experts_per_token, score, gate)
    _check_groups(E, experts_per_token, num_groups, groups_kept, group_score)
    if bias_E is not None:
        check_shape("route_topk", "bias", bias_E, (E,), "(E,)")
        check_dtype("route_topk", "bias", bias_E, FLOATS)
        check_device("route_topk", "bias", bias_E, logits_TE.device)
        bias_E = bias_E.detach()
    if token_mask_T is not None:
        check_shape("route_topk", "token_mask", token_mask_T, (T,), "(T,)")
        check_dtype("route_topk", "token_mask", token_mask_T, (torch.bool,))
        check_device("route_topk", "token_mask", token_mask_T, logits_TE.device)
    options = (experts_per_token, score, gate, float(scale), num_groups, groups_kept, group_score)
    return RouteTopK(*_RouteTopK.apply(logits_TE.contiguous(), bias_E, token_mask_T, *options))


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
