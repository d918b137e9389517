import pytest
import torch
from expert_layers import gemm_by_hand
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
from moe_runtime_kernels import gather_rows, gathered_grouped_gemm, grouped_gemm, make_plan

I, O = 24, 19


def make_inputs(routing, dtype, rows, with_bias, draw):
    inputs = {
        "x": normal(rows, I, dtype=dtype, seed=draw),
        "weight": normal(routing.E, O, I, dtype=dtype, scale=I**-0.5, seed=100 + draw),
    }
    if with_bias:
        inputs["bias"] = normal(routing.E, O, dtype=dtype, seed=200 + draw)
    return inputs, normal(routing.T * routing.K, O, dtype=dtype, seed=300 + draw)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_grouped_gemm_matches_the_definition(routing, dtype, with_bias):
    plan = make_plan(choose(routing), routing.E)
    N = routing.T * routing.K

    def make(draw):
        return make_inputs(routing, dtype, N, with_bias, draw)

    def fn(x, weight, bias=None):
        return grouped_gemm(x, weight, plan, bias)

    assert_matches(fn, lambda **i: gemm_by_hand(plan, **i), make, N)
    assert_same_bits(fn, *make(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_gathered_grouped_gemm_matches_the_definition(routing, dtype):
    plan = make_plan(choose(routing), routing.E)

    def make(draw):
        return make_inputs(routing, dtype, routing.T, True, draw)

    def fn(x, weight, bias):
        return gathered_grouped_gemm(x, weight, plan, bias)

    def definition(x, weight, bias):
        return gemm_by_hand(plan, x[plan.token_N.clamp(min=0).long()], weight, bias)

    assert_matches(fn, definition, make, routing.T * routing.K)
    assert_same_bits(fn, *make(0))
    # and it is the composition that its name says, bit for bit
    x, weight, bias = make(0)[0].values()
    assert torch.equal(fn(x, weight, bias), grouped_gemm(gather_rows(x, plan), weight, plan, bias))


def test_no_tokens():
    plan = make_plan(torch.empty(0, 2, dtype=torch.int32), 3)
    x, weight = torch.empty(0, I, requires_grad=True), torch.ones(3, O, I, requires_grad=True)
    for fn in (grouped_gemm, gathered_grouped_gemm):
        y_NO = fn(x, weight, plan)
        dx, dweight = torch.autograd.grad(y_NO.sum(), (x, weight))
        assert y_NO.shape == (0, O)
        assert dx.shape == (0, I)
        assert torch.equal(dweight, torch.zeros(3, O, I))


def test_an_expert_without_rows_gets_a_gradient_of_zero():
    plan = make_plan(torch.tensor([[2], [0]], dtype=torch.int32), 3)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    bias = torch.ones(3, 1, requires_grad=True)
    grouped_gemm(torch.tensor([[5.0], [7.0]]), weight, plan, bias).sum().backward()
    assert weight.grad.flatten().tolist() == [5.0, 0.0, 7.0]
    assert bias.grad.flatten().tolist() == [1.0, 0.0, 1.0]


def test_gradients_in_double_precision():
    plan = make_plan(choose(SMALL), SMALL.E)
    weight, bias = normal(SMALL.E, 2, 3, dtype=torch.float64), normal(SMALL.E, 2, dtype=torch.float64)
    for fn, rows in ((grouped_gemm, SMALL.T * SMALL.K), (gathered_grouped_gemm, SMALL.T)):
        tensors = tuple(x.requires_grad_() for x in (normal(rows, 3, dtype=torch.float64), weight, bias))
        torch.autograd.gradcheck(lambda x, weight, bias, fn=fn: fn(x, weight, plan, bias), tensors)


def test_strided_input_is_copied():
    plan = make_plan(choose(PATTERNS[0].values[0]), 8)
    x, weight = normal(I, 128).t(), normal(8, I, O).transpose(1, 2)
    assert torch.equal(grouped_gemm(x, weight, plan), grouped_gemm(x.contiguous(), weight.contiguous(), plan))


@pytest.mark.parametrize("fn", [grouped_gemm, gathered_grouped_gemm])
def test_grouped_gemm_refuses_bad_input(fn):
    plan = make_plan(torch.zeros(4, 1, dtype=torch.int32), 3)
    x, weight, bias = normal(4, 8), normal(3, 5, 8), normal(3, 5)
    with pytest.raises(ValueError, match=r"x must have shape \(T(\*K)?, I\) = \(4, 8\), got \(5, 8\)"):
        fn(normal(5, 8), weight, plan)
    with pytest.raises(ValueError, match=r"x must have shape \(T(\*K)?, I\) = \(4, 8\), got \(4, 7\)"):
        fn(x[:, :7], weight, plan)
    with pytest.raises(ValueError, match=r"weight must have 3 axes \(E, O, I\), got shape \(5, 8\)"):
        fn(x, weight[0], plan)
    with pytest.raises(ValueError, match="weight must have the dtype of x, float32, got bfloat16"):
        fn(x, weight.bfloat16(), plan)
    with pytest.raises(ValueError, match=r"plan.offset_E must have shape \(E,\) = \(2,\), got \(3,\)"):
        fn(x, weight[:2], plan)
    with pytest.raises(ValueError, match=r"bias must have shape \(E, O\) = \(3, 5\), got \(3, 4\)"):
        fn(x, weight, plan, bias[:, :4])
    with pytest.raises(ValueError, match="bias must have the dtype of x, float32, got float64"):
        fn(x, weight, plan, bias.double())
    with pytest.raises(ValueError, match="x must be bfloat16 or float16 or float32 or float64, got int32"):
        fn(x.int(), weight.int(), plan)
    with pytest.raises(ValueError, match="weight must be on cpu like the first argument, got meta"):
        fn(x.cpu(), weight.to("meta"), plan)


def test_grouped_gemm_registration():
    plan = make_plan(choose(PATTERNS[-1].values[0], "cpu"), 6)
    x, x_TI, weight, bias = torch.randn(123, 4), torch.randn(41, 4), torch.randn(6, 5, 4), torch.randn(6, 5)
    grad, token, offset, tile_end = torch.randn(123, 5), plan.token_N, plan.offset_E, plan.tile_end_ME
    ops = torch.ops.moe_runtime
    torch.library.opcheck(ops.grouped_gemm.default, (x, weight, offset, tile_end, None))
    torch.library.opcheck(ops.grouped_gemm.default, (x, weight, offset, tile_end, bias))
    torch.library.opcheck(ops.gathered_grouped_gemm.default, (x_TI, weight, token, offset, tile_end, bias))
    torch.library.opcheck(ops.grouped_gemm_input_grad.default, (grad, weight, offset, tile_end))
    torch.library.opcheck(ops.grouped_gemm_weight_grad.default, (grad, x, offset))
    torch.library.opcheck(ops.gathered_grouped_gemm_weight_grad.default, (grad, x_TI, token, offset))
    torch.library.opcheck(ops.grouped_gemm_bias_grad.default, (grad, offset))


def test_grouped_gemm_compiles_in_one_graph():
    weight, down = torch.randn(5, 6, 4), torch.randn(5, 4, 6)

    def fn(x, up, down, bias, expert):
        plan = make_plan(expert, 5)
        return grouped_gemm(gathered_grouped_gemm(x, up, plan, bias).relu(), down, plan)

    def make(T):
        inputs = {"x": torch.randn(T, 4), "up": weight, "down": down, "bias": torch.randn(5, 6)}
        return inputs | {"expert": torch.randint(0, 6, (T, 2))}, torch.randn(T * 2, 4)

    assert_compiles_once(fn, make)
