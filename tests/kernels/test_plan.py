import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DEVICE, PATTERNS, choose
from moe_runtime_kernels import RoutingPlan, make_plan


def plan_by_hand(expert_TK, E):
    """The definition: each expert's choices in the order of (t, k), then the rows left over."""
    T, K = expert_TK.shape
    flat = expert_TK.flatten().tolist()
    slots = [i for e in range(E) for i in range(T * K) if flat[i] == e]
    left_over = [-1] * (T * K - len(slots))
    row = [-1] * (T * K)
    for n, slot in enumerate(slots):
        row[slot] = n
    return RoutingPlan(
        torch.tensor(row, dtype=torch.int32).view(T, K),
        torch.tensor([slot // K for slot in slots] + left_over, dtype=torch.int32),
        torch.tensor(slots + left_over, dtype=torch.int32),
        torch.tensor([sum(0 <= i <= e for i in flat) for e in range(E)], dtype=torch.int32),
    )


def assert_equal(plan, expected):
    for name, part in expected._asdict().items():
        actual = getattr(plan, name)
        assert actual.dtype == torch.int32, f"{name} is {actual.dtype}"
        assert torch.equal(actual.cpu(), part), f"{name}: {actual.tolist()}, expected {part.tolist()}"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("routing", PATTERNS)
def test_plan_matches_the_definition(routing, dtype):
    expert_TK = choose(routing).to(dtype)
    assert_equal(make_plan(expert_TK, routing.E), plan_by_hand(expert_TK, routing.E))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_plan_properties(data):
    T, K, E = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    ids = data.draw(st.lists(st.integers(-2, E + 2), min_size=T * K, max_size=T * K))
    expert_TK = torch.tensor(ids, dtype=torch.int32, device=DEVICE).view(T, K)
    plan = make_plan(expert_TK, E)
    assert_equal(plan, plan_by_hand(expert_TK, E))
    kept = int(plan.offset_E[-1])
    # the slots of the rows are a permutation of the choices that were kept, and row_TK is its inverse
    slot = plan.slot_N[:kept].long()
    assert slot.unique().numel() == kept
    assert torch.equal(plan.row_TK.flatten()[slot], torch.arange(kept, dtype=torch.int32, device=DEVICE))
    assert (plan.row_TK == -1).sum() == (plan.token_N == -1).sum() == T * K - kept


def test_plan_of_no_tokens():
    plan = make_plan(torch.empty(0, 3, dtype=torch.int32, device=DEVICE), 4)
    assert [tuple(part.shape) for part in plan] == [(0, 3), (0,), (0,), (4,)]
    assert plan.offset_E.tolist() == [0, 0, 0, 0]


def test_plan_takes_any_strides():
    expert_TK = choose(PATTERNS[0].values[0])
    strided = expert_TK.t().contiguous().t()
    assert_equal(make_plan(strided, 8), plan_by_hand(expert_TK, 8))
    assert make_plan(strided, 8).row_TK.is_contiguous()


def test_plan_refuses_bad_input():
    expert_TK = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"make_plan: expert must have 2 axes \(T, K\), got shape \(8,\)"):
        make_plan(expert_TK.flatten(), 3)
    with pytest.raises(ValueError, match="make_plan: expert must be int32 or int64, got float32"):
        make_plan(expert_TK.float(), 3)
    with pytest.raises(ValueError, match="make_plan: num_experts must be at least 1, got 0"):
        make_plan(expert_TK, 0)
    with pytest.raises(ValueError, match=r"expert must have at least 1 choice per token, got shape \(4, 0\)"):
        make_plan(expert_TK[:, :0], 3)


def test_plan_registration():
    for expert_TK in (torch.randint(0, 6, (7, 3)).int(), torch.randint(0, 5, (3, 7)).t()):
        torch.library.opcheck(torch.ops.moe_runtime.make_plan.default, (expert_TK, 5))
