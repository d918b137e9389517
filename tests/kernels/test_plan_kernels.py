"""make_plan's kernels, in Triton's interpreter: equal to the reference, integer by integer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import PATTERNS, choose
from interpreter import interpreted, needs_interpreter
from moe_runtime_kernels import make_plan
from moe_runtime_kernels.plan import MAX_EXPERTS, make_plan_reference

pytestmark = needs_interpreter


def random_ids(T, K, lowest, highest, seed=0):
    g = torch.Generator().manual_seed(seed + T * K)
    return torch.randint(lowest, highest, (T, K), generator=g, dtype=torch.int32)


def assert_equals_the_reference(expert_TK, E):
    with interpreted("make_plan"):
        plan = make_plan(expert_TK, E)
    for name, expected in zip(plan._fields, make_plan_reference(expert_TK, E), strict=True):
        actual = getattr(plan, name)
        assert actual.dtype == torch.int32, f"{name} is {actual.dtype}"
        assert torch.equal(actual, expected), f"{name}: {actual.tolist()}, expected {expected.tolist()}"


@pytest.mark.parametrize("routing", PATTERNS)
def test_one_tile(routing):
    assert_equals_the_reference(choose(routing, "cpu"), routing.E)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("T", "K", "E"),
    [
        pytest.param(128, 2, 8, id="one-full-tile"),
        pytest.param(257, 1, 1, id="one-choice-past-a-tile"),
        pytest.param(301, 3, 17, id="nothing-a-power-of-two"),
        pytest.param(64, 10, 130, id="more-experts-than-a-block"),
    ],
)
def test_several_tiles(T, K, E, dtype):
    assert_equals_the_reference(random_ids(T, K, 0, E).to(dtype), E)
    assert_equals_the_reference(random_ids(T, K, -3, E + 3).to(dtype), E)


def test_more_tiles_than_one_step_of_the_prefix_sum(monkeypatch):
    from moe_runtime_kernels._triton import plan

    def small(N, E, choose_launch=plan.choose_launch):
        launch = choose_launch(N, E)
        sizes = {"num_tiles": -(-N // 32), "tile": 32, "scan_tiles": 4, "scan_experts": 2}
        return replace(launch, **sizes)

    monkeypatch.setattr(plan, "choose_launch", small)
    assert_equals_the_reference(random_ids(150, 2, -1, 6), 5)


def test_one_expert_gets_all():
    assert_equals_the_reference(torch.full((300, 1), 3), 5)


def test_everything_dropped():
    assert_equals_the_reference(torch.full((200, 2), 4), 4)
    assert_equals_the_reference(torch.full((3, 2), -1), 4)
    # no expert although the low 32 bits say so
    assert_equals_the_reference(torch.tensor([[2**32], [1 - 2**33], [2]]), 4)


def test_no_tokens():
    assert_equals_the_reference(torch.empty(0, 3, dtype=torch.int32), 4)


def test_most_experts():
    assert_equals_the_reference(random_ids(100, 3, 0, MAX_EXPERTS), MAX_EXPERTS)


def test_any_strides():
    ids_KT = random_ids(3, 150, 0, 7)
    assert_equals_the_reference(ids_KT.t(), 7)
    assert_equals_the_reference(random_ids(100, 8, 0, 7)[::2, ::3], 7)
    assert_equals_the_reference(torch.tensor([[1]]).expand(40, 2), 3)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_properties(data):
    T, K, E = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    ids = data.draw(st.lists(st.integers(-2, E + 2), min_size=T * K, max_size=T * K))
    assert_equals_the_reference(torch.tensor(ids, dtype=torch.int32).view(T, K), E)


def test_registration():
    with interpreted("make_plan"):
        torch.library.opcheck(torch.ops.moe_runtime.make_plan.default, (random_ids(7, 3, 0, 6), 5))


@pytest.mark.parametrize(("N", "E"), [(0, 1), (1, 1), (256, 8), (257, 128), (2**16, 129), (2**31 - 1, 1024)])
def test_launch_choice(N, E):
    from moe_runtime_kernels._triton.plan import choose_launch

    launch = choose_launch(N, E)
    assert 0 <= launch.num_tiles * launch.tile - N < launch.tile
    assert launch.experts >= E
    assert launch.experts.bit_count() == 1
    assert launch.tile % launch.step == 0
