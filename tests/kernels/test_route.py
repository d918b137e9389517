import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DEVICE, DTYPES, assert_compiles_once, assert_matches, assert_same_bits, normal
from moe_runtime_kernels import route, route_topk
from route_cases import CASES, joined, make_case


def choose_by_hand(score_E, K, bias_E, num_groups, groups_kept, group_score):
    """Indices of the K best experts of one token, by sorting numbers; `sorted` keeps the order of ties."""
    choice = [s + b for s, b in zip(score_E, bias_E, strict=True)]
    size = len(choice) // num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
    best = [sorted((choice[e] for e in group), reverse=True) for group in groups]
    value = [values[0] if group_score == "max" else sum(values[:2]) for values in best]
    kept = sorted(range(num_groups), key=lambda g: -value[g])[:groups_kept]
    return sorted((e for g in sorted(kept) for e in groups[g]), key=lambda e: -choice[e])[:K]


def route_by_hand(logits, K, options):
    """Weights, choice, counts and losses from their formulas; differentiable in the logits."""
    options = {
        "score": "softmax",
        "gate": "renorm",
        "scale": 1.0,
        "bias_E": None,
        "token_mask_T": None,
        "num_sequences": 1,
    } | options
    T, E = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    s = logits.softmax(1) if options["score"] == "softmax" else logits.sigmoid()
    p = s / s.sum(1, keepdim=True)
    bias = [0.0] * E if options["bias_E"] is None else options["bias_E"].to(s.dtype).tolist()
    groups = (
        options.get("num_groups", 1),
        options.get("groups_kept", 1),
        options.get("group_score", "top2_sum"),
    )
    expert = torch.tensor([choose_by_hand(row, K, bias, *groups) for row in s.tolist()], device=s.device)

    chosen = s.gather(1, expert)
    if options["gate"] == "renorm":
        chosen = chosen / chosen.sum(1, keepdim=True)
    elif options["gate"] == "straight_through":
        chosen = chosen + (1 - chosen).detach()
    mask = options["token_mask_T"]
    tokens = torch.ones(T, dtype=torch.bool, device=s.device) if mask is None else mask
    count = torch.stack([(expert[tokens] == e).sum() for e in range(E)])
    balances = []
    for rows in torch.arange(T, device=s.device).chunk(options["num_sequences"]):
        rows = rows[tokens[rows]]
        if len(rows):
            share = torch.stack([(expert[rows] == e).sum() for e in range(E)]).to(p.dtype) / (len(rows) * K)
            balances.append(E * (share * p[rows].mean(0)).sum())
    balance = torch.stack(balances).mean()
    z = logits[tokens].logsumexp(1).square().mean()
    return options["scale"] * chosen, expert, count, balance, z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "K", "options"), CASES)
def test_route_matches_the_definition(T, E, K, options, dtype):
    logits, options = make_case(T, E, K, options, dtype)
    actual, expected = route_topk(logits, K, **options), route_by_hand(logits, K, options)
    assert torch.equal(actual.expert_TK, expected[1])
    assert torch.equal(actual.count_E, expected[2])
    assert actual.expert_TK.dtype == actual.count_E.dtype == torch.int32

    def fn(logits):
        return joined(*route_topk(logits, K, **options))

    def make(draw):
        logits = make_case(T, E, K, {}, dtype, draw)[0]
        return {"logits": logits}, normal(T * K + 2, seed=100 + draw)

    assert_matches(fn, lambda logits: joined(*route_by_hand(logits, K, options)), make, T)
    assert_same_bits(fn, *make(0))


@pytest.mark.parametrize(("T", "E", "K", "options"), CASES)
def test_route_without_autograd_gives_the_same_bits(T, E, K, options):
    logits, options = make_case(T, E, K, options, torch.float32)
    expected = route_topk(logits.requires_grad_(), K, **options)
    with torch.no_grad():
        actual = route_topk(logits, K, **options)
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(actual, name), value), name


@pytest.mark.parametrize(("T", "E", "K", "options"), CASES)
def test_route_gradients_in_double_precision(T, E, K, options):
    logits, options = make_case(min(T, 4), E, K, options, torch.float64)
    if "token_mask_T" in options:
        options["token_mask_T"] = options["token_mask_T"][:4]
    if "num_sequences" in options:
        options["num_sequences"] = min(T, 4) // 2
    # the value of a straight-through gate is constant: only the losses can be differentiated numerically
    first = 3 if options.get("gate") == "straight_through" else 0

    def fn(logits):
        result = route_topk(logits, K, **options)
        return tuple(x for x in result[first:] if x.is_floating_point())

    torch.autograd.gradcheck(fn, logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("E", "K"), [(1, 1), (8, 2), (61, 7), (512, 10)])
def test_statistics_of_one_token_have_the_bits_of_those_of_many(E, K, dtype):
    logits = normal(1, E, dtype=dtype).cpu()
    prob, expert = logits.softmax(1), logits.topk(K).indices
    actual = route._statistics_of_one(logits, prob, expert)
    expected = route._statistics(logits, prob, expert, None, 1)
    for one, many in zip(actual, expected, strict=True):
        assert one.dtype == many.dtype
        assert torch.equal(one, many)


@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "gate": "raw", "scale": 2.5, "biased": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_choice_is_the_same_without_statistics(T, options, dtype):
    logits, options = make_case(T, 8, 3, options, dtype)
    for trains in (True, False):
        leaf = logits.clone().requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            expected, actual = (route_topk(leaf, 3, **options, statistics=wanted) for wanted in (True, False))
        assert actual[2:] == (None, None, None)
        for one, other in zip(actual[:2], expected[:2], strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        if trains:
            grad = torch.ones_like(actual.weight_TK)
            gradients = [torch.autograd.grad(r.weight_TK, leaf, grad)[0] for r in (actual, expected)]
            assert torch.equal(*gradients)


def test_a_mask_that_hides_nothing_changes_no_bit():
    for T in (1, 6):
        logits = normal(T, 8)
        masked = route_topk(logits, 2, token_mask_T=torch.ones(T, dtype=torch.bool, device=DEVICE))
        for value, expected in zip(masked, route_topk(logits, 2), strict=True):
            assert torch.equal(value, expected)
    hidden = route_topk(normal(1, 8), 2, token_mask_T=torch.zeros(1, dtype=torch.bool, device=DEVICE))
    assert hidden.count_E.sum() == hidden.z_loss == hidden.balance_loss == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_straight_through_is_one_forward_and_the_score_backward(score, scale):
    logits = normal(50, 5).requires_grad_()
    result = route_topk(logits, 1, score=score, gate="straight_through", scale=scale)
    assert torch.equal(result.weight_TK, torch.full_like(result.weight_TK, scale))
    raw = route_topk(logits, 1, score=score, gate="raw", scale=scale)
    grad = normal(50, 1, seed=1)
    gradients = [torch.autograd.grad(r.weight_TK, logits, grad)[0] for r in (result, raw)]
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_renormalised_gates_of_one_choice_are_one_without_gradient(score):
    logits = normal(20, 5).requires_grad_()
    weight_TK = route_topk(logits, 1, score=score).weight_TK
    assert torch.equal(weight_TK, torch.ones_like(weight_TK))
    (dlogits,) = torch.autograd.grad(weight_TK, logits, normal(20, 1, seed=1))
    assert dlogits.abs().max() < 1e-6


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("T", "E"), [(5, 9), (7, 61), (129, 129), (1, 65)])
def test_ties_go_to_the_lowest_index(T, E, score):
    """Sizes at which vector and scalar exponentials meet in one tensor."""
    # at the first value torch.sigmoid's two kinds differ; at about 1 of 40 others too
    for value in (1.7052937746047974, *normal(20).tolist()):
        logits = torch.full((T, E), value, device=DEVICE)
        expert_TK = route_topk(logits, 3, score=score).expert_TK
        assert expert_TK.tolist() == [[0, 1, 2]] * T
    grouped = route_topk(logits[:, : E - E % 3], 2, score=score, num_groups=E // 3, groups_kept=2)
    assert grouped.expert_TK.tolist() == [[0, 1]] * T


def test_the_bias_moves_the_choice_and_not_the_gate():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=DEVICE)
    bias_E = torch.tensor([-1.0, 0.0, 0.0, 1.0], device=DEVICE, requires_grad=True)
    result = route_topk(logits, 2, score="sigmoid", gate="raw", bias_E=bias_E)
    assert result.expert_TK.tolist() == [[3, 1]]
    expected = 1 / (1 + torch.exp(-torch.tensor([[0.0, 2.0]], device=DEVICE)))
    assert torch.equal(result.weight_TK, expected)
    assert not result.weight_TK.requires_grad


def test_known_values_of_the_losses():
    E = 8
    uniform = torch.zeros(E, E, device=DEVICE)
    result = route_topk(uniform + 1e-6 * torch.eye(E, device=DEVICE), 1)
    assert result.count_E.tolist() == [1] * E
    assert result.balance_loss.item() == pytest.approx(1, abs=1e-6)
    collapsed = torch.full((9, E), -torch.inf, device=DEVICE)
    collapsed[:, 3] = 0
    result = route_topk(collapsed, 1)
    assert result.balance_loss.item() == E
    assert result.z_loss.item() == 0
    assert route_topk(uniform, 2).z_loss.item() == pytest.approx(math.log(E) ** 2, rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_route_properties(data):
    T, E = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 10))
    K = data.draw(st.integers(1, E))
    score = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    gate = data.draw(st.sampled_from(["raw", "renorm"]))
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    # sigmoid scores below 1e-20 are cut off by their denominator
    spread = data.draw(st.sampled_from([0.0, 1.0, 30.0 if score == "softmax" else 5.0]))
    logits = spread * normal(T, E, seed=data.draw(st.integers(0, 1000)))
    result = route_topk(logits, K, score=score, gate=gate, scale=scale)
    # distinct experts, counted right, with falling gates that sum to what the gate promises
    assert all(len(set(row)) == K for row in result.expert_TK.tolist())
    counted = torch.bincount(result.expert_TK.flatten().long(), minlength=E)
    assert torch.equal(result.count_E, counted.int())
    assert (result.weight_TK[:, :-1] >= result.weight_TK[:, 1:]).all()
    total = result.weight_TK.sum(1)
    if gate == "renorm":
        assert (total - scale).abs().max() <= 1e-6 * scale
    elif score == "softmax":
        assert (total <= scale * (1 + 1e-6)).all()
        assert K < E or (total - scale).abs().max() <= 1e-6 * scale
    assert 0 <= result.balance_loss <= E * (1 + 1e-6)


def test_renormalisation_survives_scores_that_underflow():
    """The bias chooses experts whose softmax is 0 in float32; the logits still tell them apart."""
    logits = torch.tensor([[300.0, 1.0, 0.0]], device=DEVICE, requires_grad=True)
    bias_E = torch.tensor([-2.0, 0.0, 0.0], device=DEVICE)
    weight_TK = route_topk(logits, 2, bias_E=bias_E).weight_TK
    expected = torch.tensor([[1.0, 0.0]], device=DEVICE).softmax(1)
    assert torch.equal(weight_TK, expected)
    (dlogits,) = torch.autograd.grad(weight_TK[0, 0], logits)
    assert torch.isfinite(dlogits).all()
    sigmoid = route_topk(torch.full((1, 3), -300.0, device=DEVICE), 2, score="sigmoid")
    assert torch.equal(sigmoid.weight_TK, torch.zeros(1, 2, device=DEVICE))
    assert sigmoid.balance_loss.item() == 0


def test_masked_tokens_are_routed_and_not_counted():
    logits = normal(12, 5)
    logits[::3] = torch.nan  # whatever padding holds must not reach the losses
    mask = torch.ones(12, dtype=torch.bool, device=DEVICE)
    mask[::3] = False
    masked, alone = route_topk(logits, 2, token_mask_T=mask), route_topk(logits[mask], 2)
    assert masked.expert_TK.shape == (12, 2)
    assert torch.equal(masked.expert_TK[mask], alone.expert_TK)
    assert torch.equal(masked.weight_TK[mask], alone.weight_TK)
    assert torch.equal(masked.count_E, alone.count_E)
    assert masked.balance_loss.item() == pytest.approx(alone.balance_loss.item(), rel=1e-6)
    assert masked.z_loss.item() == pytest.approx(alone.z_loss.item(), rel=1e-6)


def test_sequences_are_balanced_one_by_one():
    """One of the three has no token that counts and is left out of the mean."""
    logits, mask = normal(18, 5), torch.ones(18, dtype=torch.bool, device=DEVICE)
    mask[6:12] = mask[1] = False
    result = route_topk(logits, 2, token_mask_T=mask, num_sequences=3)
    alone = [route_topk(logits[rows][mask[rows]], 2) for rows in (slice(0, 6), slice(12, 18))]
    mean = (alone[0].balance_loss + alone[1].balance_loss) / 2
    assert result.balance_loss.item() == pytest.approx(mean.item(), rel=1e-6)
    together = route_topk(logits, 2, token_mask_T=mask)
    assert torch.equal(result.count_E, together.count_E)
    assert result.z_loss.item() == pytest.approx(together.z_loss.item(), rel=1e-6)
    assert abs(result.balance_loss - together.balance_loss) > 1e-3


@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("T", [0, 4])
def test_losses_over_no_tokens_are_zero(T, num_sequences):
    logits = normal(T, 5).requires_grad_()
    mask = torch.zeros(T, dtype=torch.bool, device=DEVICE)
    result = route_topk(logits, 2, token_mask_T=mask, num_sequences=num_sequences)
    assert result.weight_TK.shape == result.expert_TK.shape == (T, 2)
    assert result.count_E.tolist() == [0] * 5
    assert result.balance_loss.item() == result.z_loss.item() == 0
    (dlogits,) = torch.autograd.grad(result.balance_loss + result.z_loss, logits)
    assert torch.equal(dlogits, torch.zeros(T, 5, device=DEVICE))


def test_route_dtypes():
    for dtype, result_dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logits = normal(6, 4).to(dtype).requires_grad_()
        result = route_topk(logits, 2)
        assert result.weight_TK.dtype == result.balance_loss.dtype == result.z_loss.dtype == result_dtype
        assert torch.autograd.grad(result.z_loss, logits)[0].dtype == dtype


def test_strided_logits_are_copied():
    logits = normal(6, 40).t()
    for strided, plain in zip(route_topk(logits, 2), route_topk(logits.contiguous(), 2), strict=True):
        assert torch.equal(strided, plain)


@pytest.mark.parametrize(
    ("message", "experts_per_token", "options"),
    [
        ("experts_per_token must be between 1 and E = 6, got 7", 7, {}),
        ("experts_per_token must be between 1 and E = 6, got 0", 0, {}),
        ("score must be one of 'softmax', 'sigmoid', got 'tanh'", 2, {"score": "tanh"}),
        ("gate must be one of 'raw', 'renorm', 'straight_through', got 'top'", 2, {"gate": "top"}),
        ("gate 'straight_through' needs experts_per_token = 1, got 2", 2, {"gate": "straight_through"}),
        ("num_groups must divide E = 6, got 4", 2, {"num_groups": 4}),
        ("groups_kept must be between 1 and num_groups = 3, got 4", 2, {"num_groups": 3, "groups_kept": 4}),
        (
            "groups_kept must leave at least experts_per_token = 3 experts, got 1 groups of 2",
            3,
            {"num_groups": 3},
        ),
        ("group_score must be one of 'top2_sum', 'max', got 'mean'", 2, {"group_score": "mean"}),
        (r"bias must have shape \(E,\) = \(6,\), got \(5,\)", 2, {"bias_E": torch.zeros(5)}),
        (r"bias must be bfloat16 .* got int64", 2, {"bias_E": torch.zeros(6).long()}),
        (
            r"token_mask must have shape \(T,\) = \(4,\), got \(4, 1\)",
            2,
            {"token_mask_T": torch.ones(4, 1).bool()},
        ),
        ("token_mask must be bool, got float32", 2, {"token_mask_T": torch.ones(4)}),
        ("num_sequences must divide T = 4, got 3", 2, {"num_sequences": 3}),
        ("scale must be a finite number, got nan", 2, {"scale": float("nan")}),
        ("scale must be a finite number, got '2'", 2, {"scale": "2"}),
        ("num_sequences must divide T = 4, got 0", 2, {"num_sequences": 0}),
    ],
)
def test_route_refuses_bad_options(message, experts_per_token, options):
    with pytest.raises(ValueError, match=f"route_topk: {message}"):
        route_topk(torch.randn(4, 6), experts_per_token, **options)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_still_give_distinct_experts(value, score):
    logits = normal(4, 6)
    logits[1, 4] = logits[2] = value
    result = route_topk(logits, 3, score=score)
    for row in result.expert_TK.tolist():
        assert len(set(row)) == 3
        assert set(row) <= set(range(6))
    assert result.count_E.sum() == 12
    if value is torch.nan:
        assert result.z_loss.isnan()
        assert result.expert_TK[1, 0] == (0 if score == "softmax" else 4)


def test_check_finite_names_the_first_bad_logit():
    logits = normal(5, 6)
    mask = torch.ones(5, dtype=torch.bool, device=DEVICE)
    route_topk(logits, 2, check_finite=True)
    logits[3, 2] = logits[4] = -torch.inf
    with pytest.raises(
        ValueError, match="logits must be finite with check_finite, got -inf for token 3 and expert 2"
    ):
        route_topk(logits, 2, check_finite=True)
    mask[3:] = False  # padding may hold anything
    route_topk(logits, 2, token_mask_T=mask, check_finite=True)


def test_route_refuses_bad_logits():
    with pytest.raises(ValueError, match=r"route_topk: logits must have 2 axes \(T, E\), got shape \(6,\)"):
        route_topk(torch.randn(6), 1)
    with pytest.raises(
        ValueError, match=r"route_topk: logits must have at least 1 expert, got shape \(4, 0\)"
    ):
        route_topk(torch.randn(4, 0), 1)
    with pytest.raises(ValueError, match=r"route_topk: logits must be bfloat16 .* float64, got int64"):
        route_topk(torch.ones(4, 6).long(), 1)


@pytest.mark.parametrize(("T", "E", "K", "options"), [*CASES[:7], CASES[-2]])
def test_route_registration(T, E, K, options):
    logits, options = make_case(T, E, K, options)
    options = {
        "score": "softmax",
        "gate": "renorm",
        "scale": 1.0,
        "num_groups": 1,
        "groups_kept": 1,
        "num_sequences": 1,
    } | options
    bias, mask = options.get("bias_E"), options.get("token_mask_T")
    bias, mask = (None if x is None else x.cpu() for x in (bias, mask))
    names = ("score", "gate", "scale", "num_groups", "groups_kept")
    choice = (*(options[name] for name in names), "top2_sum", options["num_sequences"])
    args = (logits.cpu(), bias, mask, K, *choice)
    forward, backward = torch.ops.moe_runtime.route_topk, torch.ops.moe_runtime.route_topk_backward
    torch.library.opcheck(forward.default, args)
    weight, expert, _, *counts, balance, z = forward(*args)
    dweight = torch.randn_like(weight)
    args = (dweight, balance, z, logits.cpu(), expert, *counts, mask, *(options[name] for name in names[:3]))
    torch.library.opcheck(backward.default, args)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_compiles_in_one_graph(score):
    bias_E = normal(6, scale=0.1)

    def fn(logits, mask):
        options = {"score": score, "bias_E": bias_E, "num_groups": 3, "groups_kept": 2}
        options["num_sequences"] = logits.shape[0]
        return joined(*route_topk(logits, 2, token_mask_T=mask, **options))

    def make(T):
        mask = (torch.arange(T) % 3 > 0).to(DEVICE)
        return {"logits": normal(T, 6), "mask": mask}, normal(T * 2 + 2, seed=1)

    assert_compiles_once(fn, make)


ODD_VALUES = [0.0, -0.0, 1.0, 1.0, -1.0, -1.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan, -torch.nan]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_ranking_by_keys_is_a_stable_sort(data):
    """Also of equal, infinite and undefined numbers, both zeros, and the smallest of both signs."""
    T, E = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 600))
    K = data.draw(st.integers(1, E))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    value = torch.randn(T, E, generator=generator) * data.draw(st.sampled_from([1e-38, 1.0, 1e38]))
    kind = data.draw(st.sampled_from(["normal", "rounded", "odd"]))
    if kind == "rounded":
        value = value.bfloat16().float()
    elif kind == "odd":
        odd = torch.tensor(ODD_VALUES)[torch.randint(len(ODD_VALUES), (T, E), generator=generator)]
        value = torch.where(torch.rand(T, E, generator=generator) < 0.5, odd, value)
    expected = value.sort(stable=True, dim=1, descending=True).indices[:, :K]
    assert torch.equal(route._top_keys(value, K), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"score": "sigmoid", "biased": True}, {"num_groups": 16, "groups_kept": 4, "score": "sigmoid"}],
    ids=["softmax", "biased", "groups"],
)
def test_many_values_are_ranked_as_few(monkeypatch, dtype, options):
    """Of logits with many ties, in parts that are not all of one size, against all of them sorted."""
    logits, options = make_case(701, 256, 8, options)
    logits = (4 * logits).round().to(dtype) / 4
    logits[3] = 0.0
    logits[5, 7:9] = torch.nan
    actual = route_topk(logits, 8, **options)
    assert logits.numel() > max(route.MOST_SORTED, route.KEYS_AT_A_TIME)
    monkeypatch.setattr(route, "MOST_SORTED", logits.numel())
    expected = route_topk(logits, 8, **options)
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(actual, name).nan_to_num(), value.nan_to_num()), name
