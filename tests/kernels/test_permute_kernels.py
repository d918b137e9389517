"""gather_rows' and scatter_rows' kernels, in Triton's interpreter."""

import pytest
import torch
from inputs import PATTERNS, SMALL, assert_matches, assert_same_bits, choose, normal
from interpreter import DTYPES, interpreted, needs_interpreter, rows_in_reserved_memory
from moe_runtime_kernels import gather_rows, make_plan, scatter_rows
from moe_runtime_kernels.permute import gather_rows_reference, scatter_rows_reference

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def _kernels():
    with interpreted("gather_rows", "scatter_rows"):
        yield


@pytest.mark.parametrize("routing", PATTERNS)
def test_gather_rows_matches_the_reference(routing):
    plan = make_plan(choose(routing, "cpu"), routing.E)
    N = routing.T * routing.K
    x_TD = normal(routing.T, 19).requires_grad_()
    grad_ND = normal(N, 19)
    out_ND = gather_rows(x_TD, plan)
    assert torch.equal(out_ND, gather_rows_reference(x_TD, plan.token_N))
    (dx_TD,) = torch.autograd.grad(out_ND, x_TD, grad_ND)
    assert torch.equal(dx_TD, scatter_rows_reference(grad_ND, plan.row_TK))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_scatter_rows_matches_the_reference(routing, dtype):
    plan = make_plan(choose(routing, "cpu"), routing.E)
    N = routing.T * routing.K

    def make(draw):
        y, grad = normal(N, 19, dtype=dtype, seed=draw), normal(routing.T, 19, dtype=dtype, seed=100 + draw)
        return {"y": y}, grad

    assert_matches(
        lambda y: scatter_rows(y, plan), lambda y: scatter_rows_reference(y, plan.row_TK), make, min(N, 64)
    )
    assert_same_bits(lambda y: scatter_rows(y, plan), *make(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 256, 1100])
def test_every_width_and_dtype(D, dtype):
    """Copies, and sums in the same order, have the reference's bits."""
    plan = make_plan(choose(PATTERNS[-1].values[0], "cpu")[:9], 6)
    x_TD, y_ND = normal(9, D, dtype=dtype), normal(27, D, dtype=dtype)
    assert torch.equal(gather_rows(x_TD, plan), gather_rows_reference(x_TD, plan.token_N))
    if dtype != torch.bfloat16:  # the interpreter of Triton 3.6 cuts a sum off instead of rounding it
        assert torch.equal(scatter_rows(y_ND, plan), scatter_rows_reference(y_ND, plan.row_TK))


def test_gradients_in_double_precision():
    routing = SMALL._replace(T=3)
    plan = make_plan(choose(routing, "cpu"), routing.E)
    x_TD = normal(3, 3, dtype=torch.float64).requires_grad_()
    y_ND = normal(3 * routing.K, 2, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: gather_rows(x, plan), x_TD)
    torch.autograd.gradcheck(lambda y: scatter_rows(y, plan), y_ND)


def test_a_dropped_row_is_zero_whatever_lies_there():
    plan = make_plan(torch.tensor([[2], [0]]), 2)
    y_ND = torch.tensor([[5.0], [torch.nan]])
    assert scatter_rows(y_ND, plan).tolist() == [[0.0], [5.0]]
    assert gather_rows(torch.tensor([[torch.nan], [7.0]]), plan).tolist() == [[7.0], [0.0]]


@pytest.mark.parametrize(("T", "D"), [(0, 5), (3, 0)])
def test_nothing_to_do(T, D):
    plan = make_plan(torch.zeros(T, 2, dtype=torch.int32), 3)
    x_TD = torch.empty(T, D, requires_grad=True)
    y_TD = scatter_rows(gather_rows(x_TD, plan), plan)
    y_TD.sum().backward()
    assert y_TD.shape == x_TD.grad.shape == (T, D)


def test_all_dropped_gives_zeros():
    plan = make_plan(torch.full((37, 3), 5), 5)
    x_TD, y_ND = torch.full((37, 5), torch.nan), torch.full((111, 5), torch.nan)
    assert torch.equal(gather_rows(x_TD, plan), torch.zeros(111, 5))
    assert torch.equal(scatter_rows(y_ND, plan), torch.zeros(37, 5))


def test_offsets_past_32_bits():
    from moe_runtime_kernels._triton.permute import launch_gather_rows, launch_scatter_rows

    D = 2**13
    first, rows = rows_in_reserved_memory(2**18 + 3, D)  # row 2**18 begins at element 2**31
    last = rows.shape[0] - 1
    rows[0], rows[last] = 1.0, 2.0
    index = torch.tensor([last, 0, last], dtype=torch.int32)
    assert launch_gather_rows(first, index)[:, 0].tolist() == [2.0, 1.0, 2.0]
    assert launch_gather_rows(first, index)[:, -1].tolist() == [2.0, 1.0, 2.0]
    assert launch_scatter_rows(first, index[:2].view(1, 2)).unique().tolist() == [3.0]


def test_registration():
    plan = make_plan(choose(SMALL, "cpu"), SMALL.E)
    ops = torch.ops.moe_runtime
    torch.library.opcheck(ops.gather_rows.default, (torch.randn(7, 4), plan.token_N))
    torch.library.opcheck(ops.scatter_rows.default, (torch.randn(14, 4), plan.row_TK))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("sources", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("D", [1, 64, 1000, 2880, 4096, 100_000])
def test_launch_choice(D, sources, itemsize):
    """Whole 16-byte loads for 128 threads, 8 KB under way with as few rows as models sum."""
    from moe_runtime_kernels._triton.permute import choose_launch

    launch = choose_launch(D, itemsize, sources)
    assert launch.rows >= 1
    assert launch.columns >= min(D, 2048 // itemsize)
    block_bytes = launch.rows * launch.columns * itemsize
    assert block_bytes % (16 * 32 * launch.options.num_warps) == 0
    assert block_bytes * sources >= 6144
