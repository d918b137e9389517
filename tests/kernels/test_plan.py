import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DEVICE, PATTERNS, choose
from moe_runtime_kernels import RoutingPlan, gather_rows, make_plan
from moe_runtime_kernels.plan import TILE_HEIGHTS, tile_bound


def plan_by_hand(expert_TK, E):
    """The definition: each expert's choices in the order of (t, k), then the rows left over."""
    T, K = expert_TK.shape
    flat = expert_TK.flatten().tolist()
    slots = [i for e in range(E) for i in range(T * K) if flat[i] == e]
    left_over = [-1] * (T * K - len(slots))
    row = [-1] * (T * K)
    for n, slot in enumerate(slots):
        row[slot] = n
    tiles = [[sum(-(-flat.count(i) // M) for i in range(e + 1)) for e in range(E)] for M in TILE_HEIGHTS]
    return RoutingPlan(
        torch.tensor(row, dtype=torch.int32).view(T, K),
        torch.tensor([slot // K for slot in slots] + left_over, dtype=torch.int32),
        torch.tensor(slots + left_over, dtype=torch.int32),
        torch.tensor([sum(0 <= i <= e for i in flat) for e in range(E)], dtype=torch.int32),
        torch.tensor(tiles, dtype=torch.int32),
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
    assert [tuple(part.shape) for part in plan] == [(0, 3), (0,), (0,), (4,), (4, 4)]
    assert plan.offset_E.tolist() == [0, 0, 0, 0]
    assert plan.tile_end_ME.tolist() == [[0, 0, 0, 0]] * 4


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
    with pytest.raises(ValueError, match="make_plan: num_experts must be from 1 to 1024, got 0"):
        make_plan(expert_TK, 0)
    with pytest.raises(ValueError, match="make_plan: num_experts must be from 1 to 1024, got 1025"):
        make_plan(expert_TK, 1025)
    with pytest.raises(ValueError, match=r"expert must have at least 1 choice per token, got shape \(4, 0\)"):
        make_plan(expert_TK[:, :0], 3)


def test_a_plan_that_was_tampered_with_is_refused():
    x_TD = torch.zeros(4, 8, device=DEVICE)
    plan = make_plan(torch.zeros(4, 2, dtype=torch.int32, device=DEVICE), 3)
    with pytest.raises(
        ValueError, match=r"plan.tile_end_ME must have shape \(M, E\) = \(4, 3\), got \(3, 3\)"
    ):
        gather_rows(x_TD, plan._replace(tile_end_ME=plan.tile_end_ME[:3]))
    with pytest.raises(ValueError, match=r"plan.row_TK must be contiguous .*, got strides \(1, 4\)"):
        gather_rows(x_TD, plan._replace(row_TK=plan.row_TK.t().contiguous().t()))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_tiles_find_their_rows_and_never_exceed_the_bound(data):
    count_E = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=12))
    dropped = data.draw(st.integers(0, 20))
    E, N = len(count_E), sum(count_E) + dropped
    ids = [e for e, count in enumerate(count_E) for _ in range(count)] + [E] * dropped
    plan = make_plan(torch.tensor(ids, dtype=torch.int32).view(N, 1), E)
    starts = [0, *plan.offset_E.tolist()]
    for height, tile_end_E in zip(TILE_HEIGHTS, plan.tile_end_ME.tolist(), strict=True):
        rows = []
        for p in range(tile_bound(N, E, height)):
            e = sum(end <= p for end in tile_end_E)
            if e == E:
                break
            first = starts[e] + (p - ([0, *tile_end_E][e])) * height
            rows += range(first, min(first + height, starts[e + 1]))
        assert rows == list(range(sum(count_E))), f"height {height}"


@pytest.mark.parametrize("height", TILE_HEIGHTS)
@pytest.mark.parametrize(("N", "E"), [(0, 3), (2, 3), (3, 3), (4, 3), (130, 3), (131, 3), (300, 1), (777, 8)])
def test_the_bound_on_tiles_is_reached(N, E, height):
    """By one row for each expert but the last, which gets the rest."""
    plan = make_plan(torch.arange(N, dtype=torch.int32).clamp(max=E - 1)[:, None], E)
    m = TILE_HEIGHTS.index(height)
    assert plan.tile_end_ME[m, -1].item() == tile_bound(N, E, height)


def test_plan_registration():
    for expert_TK in (torch.randint(0, 6, (7, 3)).int(), torch.randint(0, 5, (3, 7)).t()):
        torch.library.opcheck(torch.ops.moe_runtime.make_plan.default, (expert_TK, 5))
