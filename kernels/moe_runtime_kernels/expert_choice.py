"""route_expert_choice: experts choose tokens, so that all have the same load.

    s = softmax(logits) over the experts, or sigmoid(logits)
    expert e takes the C tokens t of largest s[t, e]; ties go to the lowest token
    weight[t, e] = s[t, e] where taken, 0 elsewhere

The result has the form of a routing with K = E choices per token, of which most are dropped. Whether a token
is taken depends on all tokens, also on later ones. Plain PyTorch on every device, differentiated by autograd.
Source: Expert Choice (Zhou et al. 2022).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, check_choice, check_device, check_dims, check_dtype, check_shape
from ._dispatch import accumulator
from .route import SCORES, router_scores


class RouteExpertChoice(NamedTuple):
    """The result of `route_expert_choice`. Ids and counts are int32."""

    weight_TE: Tensor
    expert_TE: Tensor
    count_E: Tensor


def route_expert_choice(
    logits_TE: Tensor,
    tokens_per_expert: int,
    *,
    score: str = "softmax",
    token_mask_T: Tensor | None = None,
    allow_future_leak: bool = False,
) -> RouteExpertChoice:
    """Let each expert take its C best tokens; a token may be taken by any number of experts, also by none.

    Args:
        logits_TE: router outputs, bf16, fp16, fp32 or fp64. A token with a NaN among them comes before all
            others, as in any sort of PyTorch's; mask it.
        tokens_per_expert: C, at least 1; where there are fewer tokens, every expert takes them all.
        score: "softmax" or "sigmoid".
        token_mask_T: bool; tokens that are False are never taken.
        allow_future_leak: must be True, because the choice lets a causal language model see the future.

    Returns:
        RouteExpertChoice: weight_TE float32 (float64 for float64 logits); expert_TE, which holds e where
        expert e took the token and elsewhere E, a dropped choice of `make_plan`; and count_E.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    op = "route_expert_choice"
    check_dims(op, "logits", logits_TE, "(T, E)")
    check_dtype(op, "logits", logits_TE, FLOATS)
    check_choice(op, "score", score, SCORES)
    T, E = logits_TE.shape
    if E < 1:
        raise ValueError(f"{op}: logits must have at least 1 expert, got shape {tuple(logits_TE.shape)}")
    if tokens_per_expert < 1:
        raise ValueError(f"{op}: tokens_per_expert must be at least 1, got {tokens_per_expert}")
    if not allow_future_leak:
        raise ValueError(
            f"{op}: allow_future_leak must be True, because the choice depends on later tokens, which a "
            f"causal language model must not see; got {allow_future_leak}"
        )
    if token_mask_T is not None:
        check_shape(op, "token_mask", token_mask_T, (T,), "(T,)")
        check_dtype(op, "token_mask", token_mask_T, (torch.bool,))
        check_device(op, "token_mask", token_mask_T, logits_TE.device)

    logits_TE = logits_TE.to(accumulator(logits_TE.dtype))
    score_TE, _ = router_scores(logits_TE, score)
    choice_TE = score_TE.detach()
    if token_mask_T is not None:
        choice_TE = choice_TE.masked_fill(~token_mask_T[:, None], -torch.inf)
    order_TE = choice_TE.sort(dim=0, descending=True, stable=True).indices
    taken_TE = torch.zeros_like(choice_TE, dtype=torch.bool)
    taken_TE = taken_TE.scatter(0, order_TE[:tokens_per_expert], True)
    if token_mask_T is not None:
        taken_TE = taken_TE & token_mask_T[:, None]
    expert_E = torch.arange(E, dtype=torch.int32, device=logits_TE.device)
    weight_TE = torch.where(taken_TE, score_TE, 0)
    return RouteExpertChoice(weight_TE, torch.where(taken_TE, expert_E, E).int(), taken_TE.sum(0).int())
