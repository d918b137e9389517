"""The Triton kernels of route_topk, run by the interpreter behind the public function."""

import json
import os
import subprocess
import sys

import pytest
import torch
from close import assert_close_to_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import assert_same_bits, normal, run
from interpreter import interpreted, kernels_on_cpu, needs_interpreter  # noqa: F401 - a fixture
from moe_runtime_kernels import route_topk
from route_cases import CASES, joined, make_case

pytestmark = needs_interpreter

# T is what it says; elsewhere it is raised to 64, from where a program routes several tokens
ODD_CASES = [
    pytest.param(3, 37, 37, {"gate": "raw"}, id="all-of-many-experts"),
    pytest.param(9, 129, 7, {"score": "sigmoid", "biased": True, "masked": True}, id="past-a-power-of-two"),
    pytest.param(7, 5, 1, {"gate": "straight_through", "scale": 1 / 3}, id="one-token-a-program"),
    pytest.param(80, 3, 1, {"gate": "raw", "num_sequences": 20}, id="short-sequences"),
    pytest.param(70, 15, 4, {"num_groups": 5, "groups_kept": 3, "group_score": "max"}, id="odd-groups"),
]


def assert_kernels_match(T, E, K, options, dtype):
    logits, options = make_case(T, E, K, options, dtype)
    inputs, grad = {"logits": logits}, normal(T * K + 2, seed=100)

    def fn(logits):
        return joined(*route_topk(logits, K, **options))

    same, exact = run(fn, inputs, grad), run(fn, inputs, grad, torch.float64)
    expected = route_topk(logits, K, **options)
    with interpreted("route_topk", "route_topk_backward"):
        actual, result = run(fn, inputs, grad), route_topk(logits, K, **options)
    assert torch.equal(result.expert_TK, expected.expert_TK)
    assert torch.equal(result.count_E, expected.count_E)
    for name in actual:
        assert_close_to_exact(name, actual[name], same[name], exact[name])


@pytest.mark.parametrize(("T", "E", "K", "options"), CASES)
def test_route_kernels_match_the_reference(T, E, K, options):
    assert_kernels_match(T * -(-64 // T), E, K, options, torch.float32)


@pytest.mark.parametrize(("T", "E", "K", "options"), ODD_CASES)
def test_route_kernels_match_the_reference_in_odd_sizes(T, E, K, options):
    assert_kernels_match(T, E, K, options, torch.float32)


@pytest.mark.parametrize(("T", "E", "K", "options"), [CASES[6], CASES[-1]])
def test_route_kernels_match_the_reference_in_fp16(T, E, K, options):
    assert_kernels_match(T * 2, E, K, options, torch.float16)


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize(
    "options", [{"scale": 1 / 3}, {"score": "sigmoid", "gate": "raw", "num_sequences": 2}]
)
def test_route_kernels_in_double_precision(options):
    def fn(logits):
        return tuple(x for x in route_topk(logits, 2, **options) if x.is_floating_point())

    torch.autograd.gradcheck(fn, normal(2, 3).double().requires_grad_())


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize(("T", "E", "K", "options"), [CASES[6], CASES[-2]])
def test_route_kernels_repeat_bit_by_bit(T, E, K, options):
    T *= 2
    logits, made = make_case(T, E, K, options)
    grad = normal(T * K + 2, seed=1)
    assert_same_bits(lambda logits: joined(*route_topk(logits, K, **made)), {"logits": logits}, grad)


@pytest.mark.parametrize("tiles", [2, 5])
def test_programs_go_through_several_tiles(tiles, monkeypatch):
    """Large T, where a program routes more than one tile, and many experts, where the sums are split."""
    from dataclasses import replace

    from moe_runtime_kernels._triton import route as kernels

    choose = kernels.choose_launch

    def few_programs(T, *sizes):
        launch = choose(T, *sizes)
        rows_per_program = tiles * launch.rows
        programs = -(-(T // sizes[0]) // rows_per_program)
        small = {"reduce_rows": 2, "reduce_block": 4, "finish_rows": 1}
        return replace(launch, programs=programs, rows_per_program=rows_per_program, **small)

    monkeypatch.setattr(kernels, "choose_launch", few_programs)
    logits, mask = normal(90, 13), torch.arange(90) % 4 != 1
    options = {"token_mask_T": mask, "num_sequences": 3}
    expected = route_topk(logits, 3, **options)
    with interpreted("route_topk"):
        actual = route_topk(logits, 3, **options)
        again = route_topk(logits[:30], 3)
    assert torch.equal(again.expert_TK, expected.expert_TK[:30])
    assert torch.equal(actual.expert_TK, expected.expert_TK)
    assert torch.equal(actual.count_E, expected.count_E)
    for name in ("weight_TK", "balance_loss", "z_loss"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ties_and_zeros_of_either_sign_go_to_the_lowest_index(score):
    logits = torch.full((3, 37), 0.25)
    assert route_topk(logits, 7, score=score).expert_TK.tolist() == [list(range(7))] * 3
    grouped = route_topk(logits[:, :36], 4, score=score, num_groups=12, groups_kept=2)
    assert grouped.expert_TK.tolist() == [[0, 1, 2, 3]] * 3
    # a bias that takes the score away leaves zeros of both signs
    score_E = 1 / (1 + torch.exp(-torch.zeros(4))) if score == "sigmoid" else torch.full((4,), 0.25)
    bias_E = -score_E
    bias_E[3] = -1
    assert route_topk(torch.zeros(1, 4), 3, score=score, bias_E=bias_E).expert_TK.tolist() == [[0, 1, 2]]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_choose_like_the_reference(value, score):
    logits = normal(4, 6)
    logits[1, 4] = logits[2] = value
    mask = torch.tensor([True, False, False, True])
    for options in ({}, {"num_groups": 3, "groups_kept": 2}, {"gate": "raw", "token_mask_T": mask}):
        expected = route_topk(logits, 3, score=score, **options)
        with interpreted("route_topk"):
            actual = route_topk(logits, 3, score=score, **options)
        assert torch.equal(actual.expert_TK, expected.expert_TK)
        assert torch.equal(actual.count_E, expected.count_E)
        assert torch.equal(actual.weight_TK.isnan(), expected.weight_TK.isnan())
        assert actual.z_loss.isfinite() or "token_mask_T" not in options


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("T", [0, 4])
def test_losses_over_no_tokens_are_zero(T, num_sequences):
    logits = normal(T, 5).requires_grad_()
    mask = torch.zeros(T, dtype=torch.bool)
    result = route_topk(logits, 2, token_mask_T=mask, num_sequences=num_sequences)
    assert result.weight_TK.shape == result.expert_TK.shape == (T, 2)
    assert result.count_E.tolist() == [0] * 5
    assert result.balance_loss.item() == result.z_loss.item() == 0
    (dlogits,) = torch.autograd.grad(result.balance_loss + result.z_loss, logits)
    assert torch.equal(dlogits, torch.zeros(T, 5))


@pytest.mark.usefixtures("kernels_on_cpu")
def test_renormalisation_survives_scores_that_underflow():
    logits = torch.tensor([[300.0, 1.0, 0.0]], requires_grad=True)
    weight_TK = route_topk(logits, 2, bias_E=torch.tensor([-2.0, 0.0, 0.0])).weight_TK
    torch.testing.assert_close(weight_TK, torch.tensor([[1.0, 0.0]]).softmax(1))
    (dlogits,) = torch.autograd.grad(weight_TK[0, 0], logits)
    assert torch.isfinite(dlogits).all()
    assert dlogits.any()


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_route_kernel_properties(data):
    T, E = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 10))
    K, repeats = data.draw(st.integers(1, E)), data.draw(st.integers(1, 2))
    score = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    # few different values: ties everywhere
    logits = (normal(T, E, seed=data.draw(st.integers(0, 1000))) * 2).round() / 2
    logits = logits.repeat(repeats, 1)
    with interpreted("route_topk"):
        result = route_topk(logits, K, score=score, scale=2.5, num_sequences=repeats)
    assert torch.equal(result.expert_TK, route_topk(logits, K, score=score).expert_TK)
    assert result.count_E.sum() == repeats * T * K
    assert (result.weight_TK.sum(1) - 2.5).abs().max() <= 1e-5
    prob_TE = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    prob_TE = prob_TE / prob_TE.sum(1, keepdim=True)
    # equal sequences are balanced like one of them
    balance = E * (result.count_E / result.count_E.sum() * prob_TE.mean(0)).sum()
    assert result.balance_loss.item() == pytest.approx(balance.item(), rel=1e-5)
    assert result.z_loss.item() == pytest.approx(logits.logsumexp(1).square().mean().item(), rel=1e-5)


def test_launches_are_sane():
    from moe_runtime_kernels._triton.route import choose_backward_launch, choose_launch

    for E in (1, 2, 5, 60, 64, 128, 129, 256, 512, 1000, 1024):
        for T in (0, 1, 3, 64, 512, 4096, 4097, 32768, 1 << 20):
            for B in {1, *(b for b in (2, 8, 512) if T % b == 0)}:
                launch = choose_launch(T, B, E)
                assert launch == choose_launch(T, B, E)
                L = T // B
                assert launch.groups * launch.size >= max(E, 2)
                assert launch.rows_per_program % launch.rows == 0
                # every token has one program and every program has a token
                assert (
                    launch.programs * launch.rows_per_program
                    >= L
                    > (launch.programs - 1) * launch.rows_per_program - (L == 0)
                )
                assert launch.programs * B <= max(256, B)
                # at most 16 values of a tile for each thread
                for tile, options in (
                    (launch.rows * launch.groups * launch.size, launch.options),
                    (launch.reduce_rows * launch.reduce_block, launch.reduce_options),
                    (launch.finish_rows * launch.finish_block, launch.finish_options),
                ):
                    assert tile <= 512 * options.num_warps
                backward = choose_backward_launch(T, E)
                assert backward.rows * backward.block <= 256 * backward.options.num_warps
    # few tokens: enough programs to fill a GPU, few enough for one program to add up their sums
    assert 32 <= choose_launch(512, 1, 128).programs <= 128
    assert choose_launch(512, 1, 128).reduce_block == 128


def test_groups_are_padded_one_by_one():
    from moe_runtime_kernels._triton.route import choose_launch

    launch = choose_launch(64, 1, 60, 12)
    assert (launch.groups, launch.size) == (16, 8)


@pytest.mark.usefixtures("kernels_on_cpu")
def test_more_than_1024_experts_are_refused():
    with pytest.raises(
        ValueError, match="route_topk: logits must have at most 1024 experts on a GPU, got 1025"
    ):
        route_topk(torch.zeros(2, 1025), 2)


ADDRESSES = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from moe_runtime_kernels._triton.route import compilations
found = {}
for made in compilations():
    name = made.kernel.__name__
    if name in found or made.constexprs.get("NUM_GROUPS", 1) > 1:
        continue
    constexprs = {**made.constexprs, "PDL": False}
    signature = {n: made.signature.get(n, "constexpr") for n in made.kernel.arg_names}
    source = ASTSource(fn=made.kernel, signature=signature, constexprs=constexprs)
    ttir = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    products = [line.rsplit("loc", 1)[0] for line in ttir.splitlines() if "arith.muli" in line]
    found[name] = [sum("i64" in line for line in products), [line for line in products if "i64" not in line]]
print(json.dumps(found))
"""


def test_products_of_sizes_are_64_bit():
    """Compiled without a GPU; the interpreter of this process cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", ADDRESSES], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 4
    for name, (wide, narrow) in found.items():
        assert wide >= 2, name
        assert narrow == [], name
