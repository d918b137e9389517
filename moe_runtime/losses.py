"""Auxiliary losses of a router as plain functions: the definitions that the fused `route_topk` must equal.

`f_e` is the share of routing slots that expert e got (sum 1), `P_e` the mean over tokens of its full score
(sum 1). A token whose `token_mask_T` is False counts nowhere; over no tokens every loss is 0.
"""

import torch
from torch import Tensor


def load_balancing_loss(
    prob_TE: Tensor, count_E: Tensor, experts_per_token: int, token_mask_T: Tensor | None = None
) -> Tensor:
    """Switch-style balance loss: E · Σ f_e P_e.

    1 when choices and probabilities are both even, E when every choice falls on one expert with probability
    1. Differentiable in `prob_TE` only. Source: Fedus et al. 2021, eq. 4, with f divided by K so that K does
    not scale the loss. transformers' value for Mixtral is K times this.

    Args:
        prob_TE: router scores over all experts, rows sum to 1.
        count_E: how many of the counted tokens chose each expert; sums to tokens · experts_per_token.
        experts_per_token: K.
        token_mask_T: bool, False for padding.
    """
    probability_E, num_tokens = _mean_over_tokens(prob_TE, token_mask_T)
    share_E = count_E.to(prob_TE.dtype) / (num_tokens * experts_per_token).clamp(min=1)
    return prob_TE.shape[1] * (share_E * probability_E).sum()


def mean_gate_balance_loss(
    prob_TE: Tensor, weight_TK: Tensor, expert_TK: Tensor, token_mask_T: Tensor | None = None
) -> Tensor:
    """Branch-Train-MiX's balance loss: E · Σ u_e P_e with u_e the mean gate value of expert e instead of f_e.

    Equals `load_balancing_loss` when all gates are equal and sum to 1. Differentiable in both `prob_TE` and
    `weight_TK`. Source: Sukhbaatar et al. 2024, section 3.2.

    Args:
        prob_TE: router scores over all experts, rows sum to 1.
        weight_TK: gates of the chosen experts.
        expert_TK: the chosen experts, distinct within a row.
        token_mask_T: bool, False for padding.
    """
    gate_TE = torch.zeros_like(prob_TE).scatter(1, expert_TK.long(), weight_TK.to(prob_TE.dtype))
    gate_E, _ = _mean_over_tokens(gate_TE, token_mask_T)
    probability_E, _ = _mean_over_tokens(prob_TE, token_mask_T)
    return prob_TE.shape[1] * (gate_E * probability_E).sum()


def z_loss(logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)²; (ln E)² for zero logits. Source: Zoph et al. 2022, eq. 5."""
    square_T1 = logits_TE.logsumexp(dim=1, keepdim=True).square()
    return _mean_over_tokens(square_T1, token_mask_T)[0].sum()


def _mean_over_tokens(x_TE: Tensor, token_mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean row of the counted tokens, and how many they are."""
    if token_mask_T is None:
        num_tokens = torch.tensor(x_TE.shape[0], device=x_TE.device)
    else:
        num_tokens = token_mask_T.sum()
        # where, not a product: a padding row may be infinite
        x_TE = torch.where(token_mask_T[:, None], x_TE, 0.0)
    return x_TE.sum(dim=0) / num_tokens.clamp(min=1), num_tokens
