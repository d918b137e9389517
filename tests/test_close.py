"""The comparison that all numeric tests rely on catches the faults that kernels have."""

import pytest
import torch
from close import assert_close_to_exact
from inputs import Routing, choose, normal, run
from moe_runtime_kernels import combine, make_plan
from moe_runtime_kernels.combine import combine_reference


def make_inputs(dtype):
    plan = make_plan(choose(Routing(64, 2, 8)), 8)
    inputs = {"y": normal(128, 48, dtype=dtype), "weight": normal(64, 2).softmax(1)}
    return plan, inputs, normal(64, 48, dtype=dtype, seed=1)


def assert_all_close(actual, plan, inputs, grad):
    def reference(y, weight):
        return combine_reference(y, weight, plan.row_TK, None)

    same, exact = run(reference, inputs, grad), run(reference, inputs, grad, dtype=torch.float64)
    for name in exact:
        assert_close_to_exact(name, actual[name], same[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fault",
    ["none", "zeros", "one row lost", "one element", "choices swapped", "gates rounded", "gradient doubled"],
)
def test_the_comparison_has_teeth(fault, dtype):
    plan, inputs, grad = make_inputs(dtype)
    actual = run(lambda y, weight: combine(y, weight, plan), inputs, grad)
    if fault == "none":
        assert_all_close(actual, plan, inputs, grad)
        return
    if fault == "zeros":
        actual["out"].zero_()
    elif fault == "one row lost":
        actual["out"][7].zero_()
    elif fault == "one element":
        actual["out"][7, 5] += 0.1
    elif fault == "choices swapped":
        actual["out"] = combine(inputs["y"], inputs["weight"].flip(1), plan)
    elif fault == "gates rounded":
        actual["dy"] = (actual["dy"].double() * (1 + 2**-6)).to(dtype)
    else:
        actual["dweight"] *= 2
    with pytest.raises(AssertionError, match=r"(out|dy|dweight): (rms|worst) error"):
        assert_all_close(actual, plan, inputs, grad)


def test_accumulating_in_the_storage_dtype_is_caught():
    """A sum of 512 bfloat16 numbers, kept in bfloat16: the commonest fault of a reduction."""
    x = normal(512, 64, dtype=torch.bfloat16)
    total = torch.zeros(64, dtype=torch.bfloat16, device=x.device)
    for row in x:
        total = total + row
    with pytest.raises(AssertionError, match=r"sum: (rms|worst) error"):
        assert_close_to_exact("sum", total, x.float().sum(0).bfloat16(), x.double().sum(0))


def test_what_cannot_be_compared_is_refused():
    x = torch.ones(4)
    nan = torch.tensor([1.0, torch.nan, 1.0, 1.0])
    for actual, exact, message in (
        (x[:3], x, r"shape \(3,\), expected \(4,\)"),
        (x.double(), x, "dtype torch.float64, expected torch.float32"),
        (nan, x, "1 elements are not finite"),
        (x, torch.zeros(4), "the exact tensor is all zeros"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_close_to_exact("x", actual, x, exact.double())
