"""The shape letters in the operations' names are true: forward and backward of each run under the check."""

import types

import pytest
import torch
from inputs import PATTERNS, choose, normal
from moe_runtime_kernels import (
    attention_mix,
    combine,
    expert_ffn,
    gather_rows,
    gathered_grouped_gemm,
    grouped_gemm,
    make_plan,
    route_topk,
    scatter_rows,
)
from shape_names import checked_shape_names

D, F, O = 11, 13, 17


def leaf(*shape, seed=0):
    return normal(*shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("routing", PATTERNS)
def test_names_hold_for_operations_on_rows(routing):
    T, K, E, _ = routing
    expert_TK = choose(routing)
    with checked_shape_names("moe_runtime_kernels"):
        plan = make_plan(expert_TK, E)
        x, weight = leaf(T, D), leaf(T, K)
        rows = gathered_grouped_gemm(x, leaf(E, O, D), plan, leaf(E, O))
        rows = grouped_gemm(rows, leaf(E, D, O), plan, leaf(E, D)) + gather_rows(x, plan)
        y = combine(rows, weight, plan, x) + scatter_rows(rows, plan)
        for G in (F, 2 * F):
            biases = {"gate_up_bias": leaf(E, G), "down_bias": leaf(E, D)}
            y = y + expert_ffn(x, leaf(E, G, D), leaf(E, D, F), weight, plan, residual_TD=x, **biases)
        y.sum().backward()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gate", ["raw", "renorm", "straight_through"])
def test_names_hold_for_routing(score, gate):
    options = {"bias_E": normal(12), "num_groups": 4, "groups_kept": 2, "token_mask_T": normal(7) > 0}
    with checked_shape_names("moe_runtime_kernels"):
        K = 1 if gate == "straight_through" else 3
        result = route_topk(leaf(7, 12), K, score=score, gate=gate, **options)
        (result.weight_TK.sum() + result.balance_loss + result.z_loss).backward()


def test_names_hold_for_attention_mix():
    with checked_shape_names("moe_runtime_kernels"):
        attention_mix(leaf(5, 2, 3, 4), leaf(5, 3), leaf(7, 24)).sum().backward()


def test_a_lying_name_is_caught():
    module = types.ModuleType("moe_runtime_kernels.lie")
    exec("def f(x_TD):\n    y_DT = x_TD\n    return y_DT", module.__dict__)
    with checked_shape_names("moe_runtime_kernels"), pytest.raises(AssertionError, match="y_DT has D=3"):
        module.f(torch.ones(3, 5))
