import pytest
import torch
from inputs import (
    DTYPES,
    PATTERNS,
    SMALL,
    assert_compiles_once,
    assert_matches,
    assert_same_bits,
    choose,
    normal,
)
from moe_runtime_kernels import combine, make_plan


def combine_by_hand(plan, y, weight, residual=None):
    wide = torch.promote_types(y.dtype, torch.float32)
    sums = []
    for t, rows in enumerate(plan.row_TK.tolist()):
        total = torch.zeros_like(y[0], dtype=wide)
        for k, n in enumerate(rows):
            if n >= 0:
                total = total + weight[t, k].to(wide) * y[n].to(wide)
        sums.append(total if residual is None else total + residual[t].to(wide))
    return torch.stack(sums).to(y.dtype if residual is None else residual.dtype)


def make_inputs(routing, dtype, draw, D=19):
    T, K = routing.T, routing.K
    inputs = {"y": normal(T * K, D, dtype=dtype, seed=draw), "weight": normal(T, K, seed=draw).abs()}
    return inputs, normal(T, D, dtype=dtype, seed=100 + draw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_combine_matches_the_definition(routing, dtype):
    plan = make_plan(choose(routing), routing.E)

    def fn(y, weight):
        return combine(y, weight, plan)

    def make(draw):
        return make_inputs(routing, dtype, draw)

    assert_matches(fn, lambda **i: combine_by_hand(plan, **i), make, routing.T * routing.K)
    assert_same_bits(fn, *make(0))


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_the_residual_is_added_before_the_one_rounding(residual_dtype):
    routing = PATTERNS[0].values[0]
    plan = make_plan(choose(routing), routing.E)

    def make(draw):
        inputs, grad = make_inputs(routing, torch.bfloat16, draw)
        residual = normal(64, 19, dtype=residual_dtype, seed=200 + draw)
        return inputs | {"residual": residual}, grad.to(residual_dtype)

    def fn(y, weight, residual):
        return combine(y, weight, plan, residual)

    assert_matches(fn, lambda **i: combine_by_hand(plan, **i), make, 128)


def test_combine_without_tokens_or_with_every_choice_dropped():
    for expert_TK in (torch.empty(0, 2, dtype=torch.int32), torch.full((3, 2), 4, dtype=torch.int32)):
        T = expert_TK.shape[0]
        y_ND = torch.full((2 * T, 5), torch.nan, requires_grad=True)
        weight_TK = torch.ones(T, 2, requires_grad=True)
        y_TD = combine(y_ND, weight_TK, make_plan(expert_TK, 4))
        y_TD.sum().backward()
        assert torch.equal(y_TD, torch.zeros(T, 5))
        assert torch.equal(y_ND.grad, torch.zeros(2 * T, 5))
        assert torch.equal(weight_TK.grad, torch.zeros(T, 2))


def test_combine_gradients_in_double_precision():
    plan, T, K = make_plan(choose(SMALL), SMALL.E), SMALL.T, SMALL.K
    shapes = ((T * K, 2), (T, K), (T, 2))
    tensors = tuple(normal(*shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    torch.autograd.gradcheck(lambda y, weight, residual: combine(y, weight, plan, residual), tensors)


def test_combine_refuses_bad_input():
    y_ND, weight_TK = normal(8, 4), normal(4, 2)
    plan = make_plan(torch.zeros(4, 2, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"combine: y must have shape \(T\*K, D\) = \(8, 4\), got \(7, 4\)"):
        combine(y_ND[:7], weight_TK, plan)
    with pytest.raises(
        ValueError, match=r"combine: weight must have shape \(T, K\) = \(4, 2\), got \(2, 4\)"
    ):
        combine(y_ND, weight_TK.t(), plan)
    with pytest.raises(
        ValueError, match=r"combine: residual must have shape \(T, D\) = \(4, 4\), got \(8, 4\)"
    ):
        combine(y_ND, weight_TK, plan, y_ND)
    with pytest.raises(ValueError, match=r"combine: weight must be .* or float64, got int64"):
        combine(y_ND, weight_TK.long(), plan)


def test_combine_registration():
    plan = make_plan(choose(PATTERNS[-1].values[0], "cpu"), 6)
    y, weight, residual = torch.randn(123, 4), torch.rand(41, 3), torch.randn(41, 4)
    ops = torch.ops.moe_runtime
    torch.library.opcheck(ops.combine.default, (y, weight, plan.row_TK, None))
    torch.library.opcheck(ops.combine.default, (y.bfloat16(), weight, plan.row_TK, residual))
    torch.library.opcheck(
        ops.combine_backward.default, (residual, y, weight, plan.row_TK, plan.token_N, plan.slot_N)
    )


def test_combine_compiles_in_one_graph():
    def make(T):
        inputs = {"y": torch.randn(T * 2, 6), "weight": torch.rand(T, 2), "residual": torch.randn(T, 6)}
        return inputs | {"expert": torch.randint(0, 6, (T, 2))}, torch.randn(T, 6)

    def fn(y, weight, residual, expert):
        return combine(y, weight, make_plan(expert, 5), residual)

    assert_compiles_once(fn, make)
