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
from moe_runtime_kernels import gather_rows, make_plan, scatter_rows


def gather_by_hand(x, plan):
    return torch.stack([x[t] if t >= 0 else torch.zeros_like(x[0]) for t in plan.token_N.tolist()])


def scatter_by_hand(y, plan):
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    zero = torch.zeros_like(wide[0])
    sums = [sum((wide[n] for n in rows if n >= 0), zero) for rows in plan.row_TK.tolist()]
    return torch.stack(sums).to(y.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_gather_rows_matches_the_definition(routing, dtype):
    plan = make_plan(choose(routing), routing.E)
    N = routing.T * routing.K

    def make(draw):
        x, grad = normal(routing.T, 19, dtype=dtype, seed=draw), normal(N, 19, dtype=dtype, seed=100 + draw)
        return {"x": x}, grad

    assert_matches(lambda x: gather_rows(x, plan), lambda x: gather_by_hand(x, plan), make, N)
    assert_same_bits(lambda x: gather_rows(x, plan), *make(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_scatter_rows_matches_the_definition(routing, dtype):
    plan = make_plan(choose(routing), routing.E)
    N = routing.T * routing.K

    def make(draw):
        y, grad = normal(N, 19, dtype=dtype, seed=draw), normal(routing.T, 19, dtype=dtype, seed=100 + draw)
        return {"y": y}, grad

    assert_matches(lambda y: scatter_rows(y, plan), lambda y: scatter_by_hand(y, plan), make, N)
    assert_same_bits(lambda y: scatter_rows(y, plan), *make(0))


def test_sums_of_low_precision_rows_are_rounded_once():
    """Added one by one in bfloat16, every 1 would be lost next to 256."""
    plan = make_plan(torch.arange(9, dtype=torch.int32, device=DEVICE)[None], 9)
    y_ND = torch.tensor([[256.0]] + [[1.0]] * 8, dtype=torch.bfloat16, device=DEVICE)
    assert scatter_rows(y_ND, plan).item() == 264


@pytest.mark.parametrize("routing", PATTERNS[:-1])
def test_scatter_after_gather_is_k_times_x(routing):
    plan = make_plan(choose(routing), routing.E)
    x_TD = normal(routing.T, 8).round()  # whole numbers, so that the sum is exact
    assert torch.equal(scatter_rows(gather_rows(x_TD, plan), plan), routing.K * x_TD)


def test_a_dropped_row_is_zero_whatever_lies_there():
    plan = make_plan(torch.tensor([[2], [0]]), 2)
    y_ND = torch.tensor([[5.0], [torch.nan]])
    assert scatter_rows(y_ND, plan).tolist() == [[0.0], [5.0]]
    assert gather_rows(torch.tensor([[torch.nan], [7.0]]), plan).tolist() == [[7.0], [0.0]]


def test_no_tokens():
    plan = make_plan(torch.empty(0, 2, dtype=torch.int32), 3)
    x_TD = torch.empty(0, 5, requires_grad=True)
    y_TD = scatter_rows(gather_rows(x_TD, plan), plan)
    y_TD.sum().backward()
    assert y_TD.shape == x_TD.grad.shape == (0, 5)


def test_gradients_in_double_precision():
    plan = make_plan(choose(SMALL), SMALL.E)
    x_TD = normal(SMALL.T, 3, dtype=torch.float64).requires_grad_()
    y_ND = normal(SMALL.T * SMALL.K, 2, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: gather_rows(x, plan), x_TD)
    torch.autograd.gradcheck(lambda y: scatter_rows(y, plan), y_ND)


def test_strided_input_is_copied():
    plan = make_plan(choose(PATTERNS[0].values[0]), 8)
    x_DT = normal(5, 64)
    assert torch.equal(gather_rows(x_DT.t(), plan), gather_rows(x_DT.t().contiguous(), plan))


def test_permute_refuses_bad_input():
    x_TD, plan = normal(4, 8), make_plan(torch.zeros(4, 2, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"gather_rows: x must have shape \(T, D\) = \(4, 8\), got \(3, 8\)"):
        gather_rows(x_TD[:3], plan)
    with pytest.raises(ValueError, match=r"gather_rows: x must have 2 axes \(T, D\), got shape \(32,\)"):
        gather_rows(x_TD.flatten(), plan)
    with pytest.raises(ValueError, match=r"gather_rows: x must be .* or float64, got int64"):
        gather_rows(x_TD.long(), plan)
    with pytest.raises(
        ValueError, match=r"scatter_rows: y must have shape \(T\*K, D\) = \(8, 8\), got \(4, 8\)"
    ):
        scatter_rows(x_TD, plan)
    with pytest.raises(ValueError, match=r"scatter_rows: plan must be a RoutingPlan .*, got tuple"):
        scatter_rows(x_TD, tuple(plan))
    with pytest.raises(
        ValueError, match=r"gather_rows: plan.token_N must have shape \(T\*K,\) = \(8,\), got \(7,"
    ):
        gather_rows(x_TD, plan._replace(token_N=plan.token_N[:7]))
    with pytest.raises(ValueError, match=r"gather_rows: plan.slot_N must be int32, got int64"):
        gather_rows(x_TD, plan._replace(slot_N=plan.slot_N.long()))
    with pytest.raises(ValueError, match=r"gather_rows: plan.row_TK must be on meta .*, got cpu"):
        gather_rows(x_TD.to("meta"), make_plan(torch.zeros(4, 2, dtype=torch.int32), 3))


def test_permute_registration():
    plan = make_plan(choose(PATTERNS[-1].values[0], "cpu"), 6)
    ops = torch.ops.moe_runtime
    torch.library.opcheck(ops.gather_rows.default, (torch.randn(41, 4), plan.token_N))
    torch.library.opcheck(ops.scatter_rows.default, (torch.randn(123, 4), plan.row_TK))


def test_permute_compiles_in_one_graph():
    def there_and_back(x, expert):
        plan = make_plan(expert, 5)
        return scatter_rows(gather_rows(x, plan).sin(), plan)

    def make(T):
        return {"x": torch.randn(T, 6), "expert": torch.randint(0, 5, (T, 2))}, torch.randn(T, 6)

    assert_compiles_once(there_and_back, make)
