"""The auxiliary losses: their known values, and that the fused operation computes the same ones."""

import math

import pytest
import torch
from close import assert_close_to_exact
from moe_runtime_kernels import route_topk
from tiny_models import randn

from moe_runtime.losses import load_balancing_loss, mean_gate_balance_loss, z_loss

E, K, T = 6, 2, 33


def counts(expert_TK, mask_T=None):
    expert_TK = expert_TK if mask_T is None else expert_TK[mask_T]
    return torch.bincount(expert_TK.flatten().long(), minlength=E).int()


def test_balanced_choices_and_probabilities_give_one():
    prob_TE = torch.full((E, E), 1 / E)
    assert load_balancing_loss(prob_TE, torch.full((E,), K, dtype=torch.int32), K).item() == pytest.approx(1)


def test_all_on_one_expert_gives_the_number_of_experts():
    prob_TE = torch.zeros(T, E)
    prob_TE[:, 3] = 1.0
    count_E = torch.zeros(E, dtype=torch.int32)
    count_E[3] = T
    assert load_balancing_loss(prob_TE, count_E, 1).item() == pytest.approx(E)
    weight_TK, expert_TK = torch.ones(T, 1), torch.full((T, 1), 3)
    assert mean_gate_balance_loss(prob_TE, weight_TK, expert_TK).item() == pytest.approx(E)


def test_z_loss_of_zero_logits():
    assert z_loss(torch.zeros(T, E)).item() == pytest.approx(math.log(E) ** 2)


def test_no_tokens_give_zero():
    none_TE, mask_T = torch.zeros(0, E), torch.zeros(T, dtype=torch.bool)
    assert load_balancing_loss(none_TE, torch.zeros(E, dtype=torch.int32), K).item() == 0
    assert z_loss(none_TE).item() == 0
    assert z_loss(torch.ones(T, E), mask_T).item() == 0


def test_padding_counts_nowhere_even_when_it_is_infinite():
    logits_TE, mask_T = randn(T, E), torch.arange(T) % 3 > 0
    prob_TE = logits_TE.softmax(-1)
    weight_TK, expert_TK = prob_TE.topk(K)
    padded_TE, padded_prob_TE = logits_TE.clone(), prob_TE.clone()
    padded_TE[~mask_T], padded_prob_TE[~mask_T] = math.inf, math.nan
    count_E = counts(expert_TK, mask_T)
    for masked, kept in (
        (z_loss(padded_TE, mask_T), z_loss(logits_TE[mask_T])),
        (
            load_balancing_loss(padded_prob_TE, count_E, K, mask_T),
            load_balancing_loss(prob_TE[mask_T], count_E, K),
        ),
        (
            mean_gate_balance_loss(padded_prob_TE, weight_TK, expert_TK, mask_T),
            mean_gate_balance_loss(prob_TE[mask_T], weight_TK[mask_T], expert_TK[mask_T]),
        ),
    ):
        assert masked.item() == pytest.approx(kept.item(), rel=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["all-tokens", "padding"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_fused_operation_computes_these_losses(score, masked):
    mask_T = torch.arange(T) % 4 > 0 if masked else None

    def fused(logits_TE):
        out = route_topk(logits_TE, K, score=score, token_mask_T=mask_T)
        return out.balance_loss, out.z_loss

    def defined(logits_TE):
        score_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
        count_E = counts(score_TE.topk(K).indices, mask_T)
        prob_TE = score_TE / score_TE.sum(-1, keepdim=True)
        return load_balancing_loss(prob_TE, count_E, K, mask_T), z_loss(logits_TE, mask_T)

    def run(losses, dtype):
        logits_TE = randn(T, E, dtype=dtype).requires_grad_()
        balance, z = losses(logits_TE)
        (3 * balance + 5 * z).backward()
        return {"balance": balance.detach(), "z": z.detach(), "dlogits": logits_TE.grad}

    actual, same, exact = run(fused, torch.float32), run(defined, torch.float32), run(defined, torch.float64)
    for name, value in exact.items():
        assert_close_to_exact(name, actual[name], same[name], value)


def test_mean_gate_variant_equals_the_share_variant_only_when_gates_are_equal():
    """B3."""
    prob_TE = randn(T, E).softmax(-1)
    weight_TK, expert_TK = prob_TE.topk(K)
    by_share = load_balancing_loss(prob_TE, counts(expert_TK), K)
    equal = mean_gate_balance_loss(prob_TE, torch.full((T, K), 1 / K), expert_TK)
    assert equal.item() == pytest.approx(by_share.item(), rel=1e-6)
    renormalised_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    unequal = mean_gate_balance_loss(prob_TE, renormalised_TK, expert_TK)
    assert abs(unequal.item() - by_share.item()) > 1e-3


def test_balance_loss_does_not_grow_with_experts_per_token():
    prob_TE = torch.full((E, E), 1 / E)
    values = {k: load_balancing_loss(prob_TE, torch.full((E,), k), k).item() for k in (1, 2, E)}
    assert values == pytest.approx({1: 1.0, 2: 1.0, E: 1.0})
