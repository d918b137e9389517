import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DEVICE, assert_compiles_once, normal
from moe_runtime_kernels import expert_ffn, make_plan, route_expert_choice


def choose(logits, C, **options):
    return route_expert_choice(logits, C, allow_future_leak=True, **options)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_every_expert_takes_its_best_tokens(data):
    T, E = data.draw(st.integers(0, 9) | st.just(70)), data.draw(st.integers(1, 5))
    C, score = data.draw(st.integers(1, 10)), data.draw(st.sampled_from(["softmax", "sigmoid"]))
    # few different values: ties everywhere
    logits = normal(T, E, seed=data.draw(st.integers(0, 1000))).round()
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)), dtype=torch.bool)
    result = choose(logits, C, score=score, token_mask_T=mask.to(DEVICE))
    score_TE = logits.softmax(1) if score == "softmax" else 1 / (1 + torch.exp(-logits))
    kept = [t for t in range(T) if mask[t]]
    expected = torch.full((T, E), E, dtype=torch.int32)
    for e in range(E):
        for t in sorted(kept, key=lambda t: -score_TE[t, e].item())[:C]:
            expected[t, e] = e
    assert torch.equal(result.expert_TE.cpu(), expected)
    assert torch.equal(result.weight_TE, torch.where(result.expert_TE < E, score_TE, 0))
    assert result.count_E.tolist() == [min(C, len(kept))] * E
    assert result.expert_TE.dtype == result.count_E.dtype == torch.int32


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [0.0, 1.7052937746047974])
def test_ties_go_to_the_lowest_token(value, score):
    """Sizes at which vector and scalar sigmoids meet in one tensor, and unstable sorts reorder."""
    result = choose(torch.full((70, 1), value, device=DEVICE), 3, score=score)
    assert result.expert_TE.flatten().tolist() == [0] * 3 + [1] * 67


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_short_logits_are_float32(dtype):
    logits = normal(40, 3).to(dtype)
    result, wide = choose(logits, 9), choose(logits.float(), 9)
    assert result.weight_TE.dtype == torch.float32
    assert torch.equal(result.weight_TE, wide.weight_TE)
    assert torch.equal(result.expert_TE, wide.expert_TE)


def test_the_layer_is_the_sum_over_the_experts_that_took_a_token():
    T, E, D, F, C = 12, 3, 8, 5, 4
    x, up, down = normal(T, D), normal(E, F, D), normal(E, D, F)
    logits = normal(T, E).requires_grad_()
    routing = choose(logits, C)
    y = expert_ffn(x, up, down, routing.weight_TE, make_plan(routing.expert_TE, E), activation="relu")
    outputs = torch.stack([(x @ up[e].T).relu() @ down[e].T for e in range(E)], 1)
    taken = routing.expert_TE < E
    expected = ((logits.softmax(1) * taken)[..., None] * outputs).sum(1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = normal(T, D, seed=1)
    actual, wanted = (torch.autograd.grad(out, logits, grad)[0] for out in (y, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_padding_of_any_value_is_never_taken():
    logits, mask = normal(6, 3), torch.tensor([True, False, True, True, False, True], device=DEVICE)
    alone = choose(logits[mask], 2)
    logits[~mask] = torch.nan
    padded = choose(logits, 2, token_mask_T=mask)
    assert torch.equal(padded.expert_TE[mask], alone.expert_TE)
    assert torch.equal(padded.weight_TE[mask], alone.weight_TE)
    assert (padded.expert_TE[~mask] == 3).all()
    assert not padded.weight_TE[~mask].any()


def test_expert_choice_compiles_in_one_graph():
    def fn(logits):
        return choose(logits, 3).weight_TE

    assert_compiles_once(fn, lambda T: ({"logits": normal(T, 4)}, normal(T, 4, seed=1)))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("tokens_per_expert must be at least 1, got 0", {"tokens_per_expert": 0}),
        (
            "allow_future_leak must be True, because the choice depends on later tokens, which a causal "
            "language model must not see; got False",
            {"allow_future_leak": False},
        ),
        ("score must be one of 'softmax', 'sigmoid', got 'tanh'", {"score": "tanh"}),
        (r"logits must have at least 1 expert, got shape \(4, 0\)", {"logits_TE": torch.ones(4, 0)}),
        (r"logits must have 2 axes \(T, E\), got shape \(4,\)", {"logits_TE": torch.ones(4)}),
        ("logits must be bfloat16 .* got int64", {"logits_TE": torch.ones(4, 6).long()}),
        (r"token_mask must have shape \(T,\) = \(4,\), got \(6,\)", {"token_mask_T": torch.ones(6).bool()}),
        ("token_mask must be bool, got float32", {"token_mask_T": torch.ones(4)}),
    ],
)
def test_expert_choice_refuses_bad_options(message, options):
    given = {"logits_TE": torch.randn(4, 6), "tokens_per_expert": 2, "allow_future_leak": True} | options
    with pytest.raises(ValueError, match=f"route_expert_choice: {message}"):
        route_expert_choice(**given)
