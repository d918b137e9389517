"""combine's kernels, in Triton's interpreter."""

import pytest
import torch
from inputs import PATTERNS, SMALL, assert_matches, assert_same_bits, choose, normal
from interpreter import DTYPES, interpreted, needs_interpreter, rows_in_reserved_memory
from moe_runtime_kernels import combine, make_plan
from moe_runtime_kernels.combine import combine_backward_reference, combine_reference

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def _kernels():
    with interpreted("combine", "combine_backward"):
        yield


def make_inputs(routing, dtype, draw, D=19):
    T, K = routing.T, routing.K
    inputs = {"y": normal(T * K, D, dtype=dtype, seed=draw), "weight": normal(T, K, seed=draw).abs()}
    return inputs, normal(T, D, dtype=dtype, seed=100 + draw)


def assert_matches_the_reference(plan, make, rows):
    def fn(**inputs):
        return combine(inputs["y"], inputs["weight"], plan, inputs.get("residual"), inputs.get("addend"))

    def definition(y, weight, residual=None, addend=None):
        return combine_reference(y, weight, plan.row_TK, residual, addend)

    assert_matches(fn, definition, make, rows)
    return fn


@pytest.mark.parametrize("routing", PATTERNS)
def test_combine_matches_the_reference(routing):
    plan = make_plan(choose(routing, "cpu"), routing.E)
    rows = 64 if routing.T * routing.K > 32 else routing.T * routing.K
    assert_matches_the_reference(plan, lambda draw: make_inputs(routing, torch.float16, draw), rows)


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no-residual"])
@pytest.mark.parametrize("with_addend", [True, False], ids=["addend", "no-addend"])
def test_residual_and_addend_of_other_dtypes(with_residual, with_addend):
    routing = PATTERNS[-1].values[0]._replace(T=24)
    plan, T = make_plan(choose(routing, "cpu"), routing.E), routing.T

    def make(draw):
        inputs, grad = make_inputs(routing, torch.float16, draw)
        if with_residual:
            inputs["residual"], grad = normal(T, 19, seed=200 + draw), grad.float()
        if with_addend:
            inputs["addend"] = normal(T, 19, dtype=torch.float16, seed=300 + draw)
        return inputs, grad

    assert_matches_the_reference(plan, make, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 256, 2100])
def test_every_loop_runs_twice(D, dtype):
    """2100 columns are several blocks of forward and several steps of backward."""
    routing = PATTERNS[-1].values[0]._replace(T=5)
    plan = make_plan(choose(routing, "cpu"), routing.E)

    def make(draw):
        return make_inputs(routing, dtype, draw, D)

    fn = assert_matches_the_reference(plan, make, 64)
    assert_same_bits(fn, *make(0))


def test_combine_gradients_in_double_precision():
    routing = SMALL._replace(T=3)
    plan, T, K = make_plan(choose(routing, "cpu"), routing.E), routing.T, routing.K
    shapes = ((T * K, 2), (T, K), (T, 2), (T, 2))
    tensors = tuple(normal(*shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    torch.autograd.gradcheck(lambda y, weight, *added: combine(y, weight, plan, *added), tensors)


def test_gates_of_any_dtype():
    routing = PATTERNS[1].values[0]
    plan = make_plan(choose(routing, "cpu"), routing.E)
    inputs, grad_TD = make_inputs(routing, torch.float16, 0)
    y_ND, weight_TK = inputs["y"], inputs["weight"].double().requires_grad_()
    y_TD = combine(y_ND, weight_TK, plan)
    assert torch.equal(y_TD, combine(y_ND, weight_TK.float(), plan))
    (dweight_TK,) = torch.autograd.grad(y_TD, weight_TK, grad_TD)
    _, expected_TK = combine_backward_reference(
        grad_TD, y_ND, weight_TK.detach(), plan.row_TK, plan.token_N, plan.slot_N
    )
    torch.testing.assert_close(dweight_TK, expected_TK, rtol=1e-6, atol=1e-6)


def test_without_tokens_or_with_every_choice_dropped():
    for expert_TK in (torch.empty(0, 2, dtype=torch.int32), torch.full((3, 2), 4, dtype=torch.int32)):
        T = expert_TK.shape[0]
        y_ND = torch.full((2 * T, 5), torch.nan, requires_grad=True)
        weight_TK = torch.ones(T, 2, requires_grad=True)
        residual_TD = torch.ones(T, 5)
        y_TD = combine(y_ND, weight_TK, make_plan(expert_TK, 4), residual_TD)
        y_TD.sum().backward()
        assert torch.equal(y_TD, torch.ones(T, 5))
        assert torch.equal(y_ND.grad, torch.zeros(2 * T, 5))
        assert torch.equal(weight_TK.grad, torch.zeros(T, 2))


def test_without_columns_the_gates_still_get_a_gradient():
    weight_TK = torch.ones(3, 2, requires_grad=True)
    combine(torch.empty(6, 0), weight_TK, make_plan(torch.zeros(3, 2).int(), 4)).sum().backward()
    assert torch.equal(weight_TK.grad, torch.zeros(3, 2))


def test_offsets_past_32_bits():
    from moe_runtime_kernels._triton.combine import _combine_backward_kernel, launch_combine

    D, last = 2**13, 2**18 + 2  # row 2**18 begins at element 2**31
    (y, rows), (dy, drows) = (rows_in_reserved_memory(last + 1, D) for _ in range(2))
    rows[0], rows[last] = 1.0, 2.0
    weight_TK, row_TK = torch.tensor([[3.0, 5.0]]), torch.tensor([[last, 0]], dtype=torch.int32)
    assert launch_combine(y, weight_TK, row_TK, None, None).unique().tolist() == [11.0]

    grad_TD, token_N = torch.full((1, D), 0.5, dtype=torch.float16), torch.tensor([0, 0], dtype=torch.int32)
    sizes = {"K": 2, "CHOICES": 2, "COLUMNS": 1024, "PDL": False}
    dweight_TK = torch.empty(1, 2)
    _combine_backward_kernel[(1,)](grad_TD, y, weight_TK, row_TK, token_N, dy, dweight_TK, D, **sizes)
    assert dweight_TK.tolist() == [[D * 1.0, D * 0.5]]
    assert drows[[0, last]].unique(dim=1).tolist() == [[2.5], [1.5]]


def test_registration():
    plan = make_plan(choose(SMALL, "cpu"), SMALL.E)
    y, weight, residual = torch.randn(14, 4), torch.rand(7, 2), torch.randn(7, 4)
    ops = torch.ops.moe_runtime
    torch.library.opcheck(ops.combine.default, (y, weight, plan.row_TK, residual, None))
    torch.library.opcheck(
        ops.combine_backward.default, (residual, y, weight, plan.row_TK, plan.token_N, plan.slot_N)
    )


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("K", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("D", [1, 64, 1000, 2880, 4096, 100_000])
def test_launch_choice(D, K, itemsize):
    from moe_runtime_kernels._triton.combine import choose_backward_launch

    launch = choose_backward_launch(D, itemsize, K)
    assert K <= launch.choices < 2 * K
    assert launch.columns.bit_count() == 1
    assert 2048 <= launch.choices * launch.columns * itemsize <= 8192 or launch.columns >= D
