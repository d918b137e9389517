import pytest
import torch
from inputs import (
    DEVICE,
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


def combine_by_hand(plan, y, weight, residual=None, addend=None):
    wide = torch.promote_types(y.dtype, torch.float32)
    sums = []
    for t, rows in enumerate(plan.row_TK.tolist()):
        total = torch.zeros_like(y[0], dtype=wide)
        for k, n in enumerate(rows):
            if n >= 0:
                total = total + weight[t, k].to(wide) * y[n].to(wide)
        for added in (residual, addend):
            total = total if added is None else total + added[t].to(wide)
        sums.append(total)
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


@pytest.mark.parametrize("addend_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
def test_the_addend_is_added_after_the_residual_before_the_one_rounding(residual_dtype, addend_dtype):
    routing = PATTERNS[-1].values[0]
    plan, T = make_plan(choose(routing), routing.E), routing.T

    def make(draw):
        inputs, grad = make_inputs(routing, torch.bfloat16, draw)
        if residual_dtype is not None:
            inputs["residual"] = normal(T, 19, dtype=residual_dtype, seed=200 + draw)
            grad = grad.to(residual_dtype)
        return inputs | {"addend": normal(T, 19, dtype=addend_dtype, seed=300 + draw)}, grad

    def fn(y, weight, residual=None, addend=None):
        return combine(y, weight, plan, residual, addend)

    assert_matches(fn, lambda **i: combine_by_hand(plan, **i), make, T)


def test_three_terms_are_rounded_once():
    """In bfloat16, 256 + 1 is 256: the ones survive only if their sum meets 256 in float32."""
    plan = make_plan(torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), 1)
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE)
    y_TD = combine(one, torch.ones(1, 1, device=DEVICE), plan, 256 * one, one)
    assert y_TD.dtype == torch.bfloat16
    assert y_TD.item() == 258


def test_no_gradient_is_computed_that_nobody_wants():
    """With the experts and gates frozen, backward hands the upstream gradient on and calls no operation."""
    plan = make_plan(choose(SMALL), SMALL.E)
    y_ND, weight_TK = normal(SMALL.T * SMALL.K, 3), normal(SMALL.T, SMALL.K)
    residual_TD, grad_TD = normal(SMALL.T, 3).requires_grad_(), normal(SMALL.T, 3, seed=1)
    addend_TD = normal(SMALL.T, 3, dtype=torch.bfloat16).requires_grad_()
    with torch.profiler.profile() as profile:
        combine(y_ND, weight_TK, plan, residual_TD, addend_TD).backward(grad_TD)
    assert "moe_runtime::combine_backward" not in {event.name for event in profile.events()}
    assert torch.equal(residual_TD.grad, grad_TD)
    assert torch.equal(addend_TD.grad, grad_TD.bfloat16())


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
    shapes = ((T * K, 2), (T, K), (T, 2), (T, 2))
    tensors = tuple(normal(*shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    torch.autograd.gradcheck(lambda y, weight, *added: combine(y, weight, plan, *added), tensors)
    torch.autograd.gradcheck(lambda y, weight, _, addend: combine(y, weight, plan, None, addend), tensors)


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
    with pytest.raises(
        ValueError, match=r"combine: addend must have shape \(T, D\) = \(4, 4\), got \(4, 2\)"
    ):
        combine(y_ND, weight_TK, plan, addend_TD=weight_TK)
    with pytest.raises(ValueError, match=r"combine: addend must be .* or float64, got int64"):
        combine(y_ND, weight_TK, plan, y_ND[:4], y_ND[:4].long())
    with pytest.raises(ValueError, match=r"combine: weight must be .* or float64, got int64"):
        combine(y_ND, weight_TK.long(), plan)


def test_combine_registration():
    plan = make_plan(choose(PATTERNS[-1].values[0], "cpu"), 6)
    y, weight, residual = torch.randn(123, 4), torch.rand(41, 3), torch.randn(41, 4)
    ops = torch.ops.moe_runtime
    torch.library.opcheck(ops.combine.default, (y, weight, plan.row_TK, None, None))
    torch.library.opcheck(ops.combine.default, (y, weight, plan.row_TK, None, residual))
    torch.library.opcheck(ops.combine.default, (y.bfloat16(), weight, plan.row_TK, residual, residual.half()))
    torch.library.opcheck(
        ops.combine_backward.default, (residual, y, weight, plan.row_TK, plan.token_N, plan.slot_N)
    )


def test_combine_compiles_in_one_graph():
    def make(T):
        inputs = {"y": torch.randn(T * 2, 6), "weight": torch.rand(T, 2), "residual": torch.randn(T, 6)}
        inputs["addend"] = torch.randn(T, 6).bfloat16()
        return inputs | {"expert": torch.randint(0, 6, (T, 2))}, torch.randn(T, 6)

    def fn(y, weight, residual, addend, expert):
        return combine(y, weight, make_plan(expert, 5), residual, addend)

    assert_compiles_once(fn, make)
