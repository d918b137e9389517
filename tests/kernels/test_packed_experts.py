"""Experts packed for inference compute what expert_ffn computes, and refuse what they cannot hold."""

import pytest
import torch
from close import assert_close_to_exact
from expert_layers import ACTIVATIONS, NAMES, dense_experts, make_inputs
from inputs import PATTERNS, Routing, choose
from moe_runtime_kernels import PackedExperts, expert_ffn, make_plan
from moe_runtime_kernels.packed_experts import can_pack

CHOICES = [
    pytest.param(
        dtype, id=name, marks=pytest.mark.skipif(not can_pack(dtype), reason=f"needs oneDNN with {name}")
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
]


def pack(inputs, activation="silu"):
    biases = {f"{name}_{letters}": inputs.get(name) for name, letters in BIASES}
    return PackedExperts(inputs["gate_up"], inputs["down"], activation=activation, **biases)


BIASES = (("gate_up_bias", "EG"), ("down_bias", "ED"))


def assert_is_the_layer(routing, dtype, activation="silu", gated=True, optional=NAMES[4:]):
    expert_TK = choose(routing, "cpu")
    inputs, _ = make_inputs(routing, dtype, gated=gated, optional=optional)
    inputs = {name: value.cpu() for name, value in inputs.items()}
    actual = pack(inputs, activation)(inputs["x"], expert_TK, inputs["weight"], inputs.get("residual"))

    def layer(wanted):
        values = {name: value.to(wanted) for name, value in inputs.items()}
        if wanted != torch.float64:
            values["weight"] = inputs["weight"]
        return dense_experts(expert_TK, activation, **values)

    assert_close_to_exact("y", actual, layer(dtype), layer(torch.float64))


@pytest.mark.parametrize("dtype", CHOICES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_packed_experts_are_the_layer(routing, dtype):
    assert_is_the_layer(routing, dtype)


@pytest.mark.parametrize("dtype", CHOICES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_the_layers(activation, gated, dtype):
    assert_is_the_layer(Routing(11, 2, 4), dtype, activation, gated, optional=())


@pytest.mark.parametrize("dtype", CHOICES)
@pytest.mark.parametrize("T", [0, 1, 5])
def test_nothing_kept_leaves_the_residual(T, dtype):
    inputs, _ = make_inputs(Routing(5, 2, 3), dtype, optional=NAMES[4:])
    inputs = {name: value.cpu() for name, value in inputs.items()}
    expert_TK = torch.tensor([[3, -1]] * 5)[:T]
    y_TD = pack(inputs)(inputs["x"][:T], expert_TK, inputs["weight"][:T], inputs["residual"][:T])
    assert torch.equal(y_TD, inputs["residual"][:T])
    zeros = pack(inputs)(inputs["x"][:T], expert_TK, inputs["weight"][:T])
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_rows_and_weights_of_any_strides():
    g = torch.Generator().manual_seed(0)
    x_TD = torch.randn(6, 24, generator=g).t()[:, :6]
    gate_up, down = torch.randn(2, 6, 10, generator=g).transpose(1, 2), torch.randn(2, 6, 5, generator=g)
    expert_TK, weight_TK = torch.arange(24).view(24, 1) % 2, torch.rand(24, 1, generator=g)
    packed = PackedExperts(gate_up, down)
    expected = expert_ffn(x_TD, gate_up, down, weight_TK, make_plan(expert_TK, 2))
    torch.testing.assert_close(packed(x_TD, expert_TK, weight_TK), expected)
    one = packed(x_TD[3:4], expert_TK[3:4], weight_TK[3:4])
    torch.testing.assert_close(one, expected[3:4])


GATE_UP, DOWN = torch.zeros(2, 8, 4), torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GATE_UP[0], DOWN), {}, r"gate_up must have 3 axes \(E, G, D\), got shape \(8, 4\)"),
        ((GATE_UP, DOWN[:, :, :3]), {}, r"gate_up must have shape \(E, 2F or F, D\) = \(2, 3, 4\), got"),
        ((GATE_UP, DOWN.double()), {}, "down must have the dtype of gate_up, float32, got float64"),
        ((GATE_UP.double(), DOWN.double()), {}, "gate_up must be of a dtype that .* got float64"),
        ((GATE_UP, DOWN), {"activation": "tanh"}, "activation must be one of 'silu', .* got 'tanh'"),
        (
            (GATE_UP, DOWN),
            {"gate_up_bias_EG": torch.zeros(2, 4)},
            r"gate_up_bias must have shape \(E, width\) = \(2, 8\), got \(2, 4\)",
        ),
    ],
)
def test_weights_that_cannot_be_packed_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        PackedExperts(*arguments, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x must have shape \(T, D\) = \(3, 4\), got \(3, 5\)"),
        ({"x": torch.zeros(3, 4).double()}, "x must be float32, got float64"),
        ({"expert": torch.zeros(3, 2)}, "expert must be int32 or int64, got float32"),
        ({"weight": torch.zeros(3, 1)}, r"weight must have shape \(T, K\) = \(3, 2\), got \(3, 1\)"),
        (
            {"expert": torch.zeros(3, 0).int(), "weight": torch.zeros(3, 0)},
            r"expert must have at least 1 choice per token, got shape \(3, 0\)",
        ),
        ({"residual": torch.zeros(3, 4).int()}, "residual must be bfloat16 .* got int32"),
        ({"residual": torch.zeros(3, 4, device="meta")}, "residual must be on cpu .* got meta"),
        ({"residual": torch.zeros(3, 1)}, r"residual must have shape \(T, D\) = \(3, 4\), got \(3, 1\)"),
    ],
)
def test_rows_that_do_not_fit_are_named(changes, message):
    inputs = {"x": torch.zeros(3, 4), "expert": torch.zeros(3, 2).int(), "weight": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=message):
        PackedExperts(GATE_UP, DOWN)(*({**inputs, **changes}).values())
