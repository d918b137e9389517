"""grouped_gemm's kernels, in Triton's interpreter: every tile that can be launched, forward and backward."""

import pytest
import torch
from inputs import PATTERNS, Routing, assert_matches, assert_same_bits, choose, normal
from interpreter import DTYPES, interpreted, needs_interpreter
from moe_runtime_kernels import gathered_grouped_gemm, grouped_gemm, make_plan
from moe_runtime_kernels.grouped_gemm import (
    bias_grad_reference,
    gathered_grouped_gemm_reference,
    grouped_gemm_reference,
)
from moe_runtime_kernels.plan import TILE_HEIGHTS

pytestmark = [
    needs_interpreter,
    # raised by Triton 3.6, whose interpreter takes a loop's bound out of an array
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

I, O = 32, 48
SKEWED = Routing(40, 3, 6, "sentinels")


@pytest.fixture(autouse=True)
def _kernels():
    names = ("grouped_gemm", "gathered_grouped_gemm", "grouped_gemm_input_grad", "grouped_gemm_weight_grad")
    with interpreted(*names, "gathered_grouped_gemm_weight_grad", "grouped_gemm_bias_grad"):
        yield


def make_inputs(routing, dtype, rows, sizes, draw, with_bias=True):
    I, O = sizes
    inputs = {
        "x": normal(rows, I, dtype=dtype, seed=draw),
        "weight": normal(routing.E, O, I, dtype=dtype, scale=I**-0.5, seed=100 + draw),
    }
    if with_bias:
        inputs["bias"] = normal(routing.E, O, dtype=dtype, seed=200 + draw)
    return inputs, normal(routing.T * routing.K, O, dtype=dtype, seed=300 + draw)


def check(routing, dtype, sizes=(I, O), gathered=False, with_bias=True):
    plan = make_plan(choose(routing, "cpu"), routing.E)
    N = routing.T * routing.K

    def make(draw):
        return make_inputs(routing, dtype, routing.T if gathered else N, sizes, draw, with_bias)

    def fn(x, weight, bias=None):
        return (gathered_grouped_gemm if gathered else grouped_gemm)(x, weight, plan, bias)

    def definition(x, weight, bias=None):
        if gathered:
            return gathered_grouped_gemm_reference(x, weight, plan.token_N, plan.offset_E, bias)
        return grouped_gemm_reference(x, weight, plan.offset_E, bias)

    assert_matches(fn, definition, make, max(N, 16))
    assert_same_bits(fn, *make(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_grouped_gemm_matches_the_reference(routing, dtype):
    check(routing, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", [PATTERNS[0], PATTERNS[2], PATTERNS[-1]])
def test_gathered_grouped_gemm_matches_the_reference(routing, dtype):
    check(routing, dtype, gathered=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gathered"])
@pytest.mark.parametrize("sizes", [(48, 80), (33, 65), (1, 1), (16, 7)], ids=str)
def test_widths_that_no_block_divides(sizes, gathered, dtype):
    check(SKEWED, dtype, sizes, gathered, with_bias=sizes != (48, 80))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["cuda80", "cuda90", "cuda100", "hip"])
@pytest.mark.parametrize("height", TILE_HEIGHTS)
def test_every_tile_that_is_launched(height, family, dtype, monkeypatch):
    """Tiles higher and lower than an expert's rows, on few enough numbers for the interpreter."""
    from moe_runtime_kernels._triton import grouped_gemm as forward
    from moe_runtime_kernels._triton import grouped_wgrad as weight_grad

    chosen = forward.choose_launch(dtype.itemsize, height, 1, aligned=True, family=family)
    of_weights = weight_grad.choose_launch(dtype.itemsize, aligned=True, family=family)
    monkeypatch.setattr(forward, "choose_launch", lambda *arguments, **keywords: chosen)
    monkeypatch.setattr(weight_grad, "choose_launch", lambda *arguments, **keywords: of_weights)
    check(Routing(40, 2, 2, "sentinels"), dtype, (80, 96), gathered=True)


def test_no_rows_and_no_row_kept():
    for T, expert in ((0, 0), (3, 9)):
        plan = make_plan(torch.full((T, 2), expert, dtype=torch.int32), 4)
        x, weight = normal(2 * T, I).requires_grad_(), normal(4, O, I).requires_grad_()
        y = grouped_gemm(x, weight, plan)
        assert y.shape == (2 * T, O)
        assert not y.any()
        dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
        assert not dx.any()
        assert not dweight.any()


def test_what_lies_in_rows_left_over_has_no_part():
    plan = make_plan(choose(SKEWED, "cpu"), SKEWED.E)
    kept = int(plan.offset_E[-1])
    assert kept < plan.token_N.shape[0]
    x = normal(plan.token_N.shape[0], I)
    x[kept:] = torch.nan
    weight = normal(SKEWED.E, O, I).requires_grad_()
    y = grouped_gemm(x, weight, plan)
    assert not y[kept:].any()
    grad = normal(*y.shape)
    grad[kept:] = torch.nan
    (dweight,) = torch.autograd.grad(y, weight, grad)
    assert torch.isfinite(dweight).all()


def test_the_bias_gradient_of_rows_with_gates():
    from moe_runtime_kernels._triton.grouped_wgrad import grouped_bias_grad

    plan = make_plan(choose(SKEWED, "cpu"), SKEWED.E)
    grad_TO, gate_TK = normal(SKEWED.T, 37), normal(SKEWED.T, SKEWED.K)
    rows = plan.token_N >= 0
    scaled = torch.zeros(len(rows), 37)
    scaled[rows] = grad_TO[plan.token_N[rows]] * gate_TK.flatten()[plan.slot_N[rows]][:, None]
    actual = grouped_bias_grad(grad_TO, plan.offset_E, token=plan.token_N, slot=plan.slot_N, scale=gate_TK)
    torch.testing.assert_close(actual, bias_grad_reference(scaled, plan.offset_E))


def test_float64_has_no_kernel():
    plan = make_plan(choose(SKEWED, "cpu"), SKEWED.E)
    x, weight = torch.randn(120, I, dtype=torch.float64), torch.randn(6, O, I, dtype=torch.float64)
    with pytest.raises(ValueError, match="on a GPU x must be bfloat16, float16 or float32, got float64"):
        grouped_gemm(x, weight, plan)


def test_tiles_follow_the_rows_of_an_expert():
    from moe_runtime_kernels._triton.grouped_gemm import choose_launch

    def height(N, E):
        return choose_launch(2, N, E, aligned=True, family="cuda90").block_m

    assert [height(N, 128) for N in (1, 128, 1024, 8192, 65536, 2**20)] == [16, 16, 16, 64, 128, 128]
    assert choose_launch(2, 512, 128, aligned=True, family="cuda90").swapped
    assert not choose_launch(2, 2**16, 128, aligned=True, family="cuda90").swapped
    assert choose_launch(2, 2**16, 1, aligned=True, family="cuda80").block_n == 128
    assert choose_launch(2, 2**16, 1, aligned=False, family="cuda90").block_m == 32
