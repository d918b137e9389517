"""Widths that are multiples of 16, which have kernels of their own, and tensors that start at odd addresses.

No tile and no step divides the widths. Without a GPU, the first tests compare references only.
"""

import pytest
import torch
from expert_layers import ACTIVATIONS, ALIGNED, NAMES, dense_experts, gemm_by_hand, layer
from expert_layers import make_inputs as make_layer_inputs
from inputs import Routing, assert_matches, assert_same_bits, choose, normal
from interpreter import as_kernels, needs_kernels
from moe_runtime_kernels import gathered_grouped_gemm, grouped_gemm, make_plan

# 16, 27, 53 and 107 rows for an expert, which is tiles of every height; one expert has none
TOKENS = [24, 40, 80, 160]
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# a kernel takes seconds to compile: the other dtypes in the highest tiles only
CASES = [*((BFLOAT16, T) for T in TOKENS), (FLOAT16, TOKENS[-1]), (FLOAT32, TOKENS[-1])]


def make_product_inputs(routing, O, I, dtype, gathered, with_bias, draw=0):
    T, K, E, _ = routing
    inputs = {
        "x": normal(T if gathered else T * K, I, dtype=dtype, seed=draw),
        "weight": normal(E, O, I, dtype=dtype, scale=I**-0.5, seed=100 + draw),
    }
    if with_bias:
        inputs["bias"] = normal(E, O, dtype=dtype, seed=200 + draw)
    return inputs, normal(T * K, O, dtype=dtype, seed=300 + draw)


def assert_layer_matches(routing, dtype, activation="silu", gated=True, optional=(), **sizes):
    expert_TK = choose(routing)
    fn = layer(make_plan(expert_TK, routing.E), activation)

    def make(draw):
        return make_layer_inputs(routing, dtype, gated, optional, draw, **sizes)

    assert_matches(fn, lambda **i: dense_experts(expert_TK, activation, **i), make, routing.T * routing.K)
    assert_same_bits(fn, *make(0))


@pytest.mark.parametrize(("gathered", "with_bias"), [(False, False), (True, True)], ids=["rows", "gathered"])
@pytest.mark.parametrize(("dtype", "T"), CASES, ids=str)
@pytest.mark.parametrize(("O", "I"), [ALIGNED[0], ALIGNED[0][::-1], ALIGNED[1]], ids=str)
def test_grouped_products(O, I, dtype, T, gathered, with_bias):
    routing = Routing(T, 2, 3, "empty")
    plan, product = make_plan(choose(routing), routing.E), gathered_grouped_gemm if gathered else grouped_gemm

    def make(draw):
        return make_product_inputs(routing, O, I, dtype, gathered, with_bias, draw)

    def fn(x, weight, bias=None):
        return product(x, weight, plan, bias)

    def definition(x, weight, bias=None):
        return gemm_by_hand(plan, x[plan.token_N.long()] if gathered else x, weight, bias)

    assert_matches(fn, definition, make, T * routing.K)
    assert_same_bits(fn, *make(0))


@pytest.mark.parametrize(("dtype", "T"), CASES, ids=str)
@pytest.mark.parametrize(("D", "F"), ALIGNED, ids=str)
def test_expert_layers(D, F, dtype, T):
    assert_layer_matches(Routing(T, 2, 3, "empty"), dtype, D=D, F=F)


@pytest.mark.parametrize("T", TOKENS)
def test_expert_layers_without_gate(T):
    assert_layer_matches(Routing(T, 2, 3, "empty"), BFLOAT16, gated=False, D=80, F=144)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_every_option(activation, gated):
    routing = Routing(200, 2, 5, "sentinels")
    assert_layer_matches(routing, BFLOAT16, activation, gated, NAMES[4:], D=80, F=144)


# --- tensors that are views into a flat buffer ---

KERNELS = ("grouped_gemm", "grouped_gemm_input_grad", "grouped_gemm_weight_grad", "gathered_grouped_gemm")
KERNELS += ("gathered_grouped_gemm_weight_grad", "expert_ffn", "expert_ffn_backward")
SMALL = Routing(20, 2, 3, "sentinels")


def starting_at(first, x):
    """A copy whose first element is that of a flat buffer with this index."""
    flat = x.new_zeros(first + x.numel())
    view = flat[first:].view(x.shape)
    view.copy_(x)
    assert view.is_contiguous()
    assert view.data_ptr() % 16 == first * x.itemsize % 16
    return view


def record(monkeypatch, module, name):
    """For each launch that is chosen: whether its operands are aligned, and whether it takes descriptors."""
    choose_launch, made = getattr(module, name), []

    def recorded(*sizes, aligned, **more):
        launch = choose_launch(*sizes, aligned=aligned, **more)
        made.append(aligned)
        assert aligned or not getattr(launch, "tma", False)
        return launch

    monkeypatch.setattr(module, name, recorded)
    return made


@needs_kernels
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize(
    ("odd", "forward", "dx", "dweight"),
    [
        (None, True, True, True),
        ("x", False, True, False),
        ("weight", False, False, True),
    ],
)
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gathered"])
def test_products_of_a_view_at_an_odd_address(gathered, odd, forward, dx, dweight, first, monkeypatch):
    from moe_runtime_kernels._triton import grouped_gemm as products
    from moe_runtime_kernels._triton import grouped_wgrad

    made = record(monkeypatch, products, "choose_launch")
    made_for_weights = record(monkeypatch, grouped_wgrad, "choose_launch")
    plan, product = make_plan(choose(SMALL), SMALL.E), gathered_grouped_gemm if gathered else grouped_gemm

    def make(draw):
        inputs, grad = make_product_inputs(SMALL, *ALIGNED[1], FLOAT16, gathered, False, draw)
        return inputs | ({odd: starting_at(first, inputs[odd])} if odd else {}), grad

    def definition(x, weight):
        return gemm_by_hand(plan, x[plan.token_N.clamp(min=0).long()] if gathered else x, weight)

    with as_kernels(*KERNELS):
        assert_matches(lambda x, weight: product(x, weight, plan), definition, make, SMALL.T * SMALL.K)
    assert made == [forward, dx] * (len(made) // 2)
    assert made
    assert set(made_for_weights) == {dweight}


@needs_kernels
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize(
    ("odd", "up", "dh", "products", "dweights"),
    [
        (None, True, True, [True, True], [True, True]),
        ("x", False, True, [True, True], [True, False]),
        ("gate_up", False, True, [True, False], [True, True]),
        ("down", True, False, [False, True], [True, True]),
    ],
)
def test_layers_with_a_view_at_an_odd_address(odd, up, dh, products, dweights, first, monkeypatch):
    from moe_runtime_kernels._triton import expert_ffn, grouped_gemm, grouped_wgrad

    made = {
        "up": record(monkeypatch, expert_ffn, "choose_up_launch"),
        "dh": record(monkeypatch, expert_ffn, "choose_dh_launch"),
        "products": record(monkeypatch, grouped_gemm, "choose_launch"),
        "dweights": record(monkeypatch, grouped_wgrad, "choose_launch"),
    }
    expert_TK, (D, F) = choose(SMALL), ALIGNED[1]

    def make(draw):
        inputs, grad = make_layer_inputs(SMALL, FLOAT16, draw=draw, D=D, F=F)
        return inputs | ({odd: starting_at(first, inputs[odd])} if odd else {}), grad

    fn = layer(make_plan(expert_TK, SMALL.E))
    with as_kernels(*KERNELS):
        assert_matches(fn, lambda **i: dense_experts(expert_TK, "silu", **i), make, 64)
    assert made == {"up": [up], "dh": [dh], "products": products, "dweights": dweights}
