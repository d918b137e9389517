"""One token through its experts on a CPU without a plan: the bits of expert_ffn, and only where it may."""

import sys

import pytest
import torch
from close import assert_close_to_exact
from expert_layers import ACTIVATIONS, dense_experts, layer, make_inputs
from inputs import DTYPES, Routing, choose
from moe_runtime_kernels import make_plan
from moe_runtime_kernels._cpu_one_token import one_planned_token, one_token_ffn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

OPTIONAL = ("gate_up_bias", "down_bias", "residual")
ROUTING = Routing(1, 3, 8)
EXPERT_TK = torch.tensor([[6, 0, 3]], dtype=torch.int32)


@pytest.fixture(autouse=True)
def layers_run_the_operation(monkeypatch):
    """`expert_ffn` of one token would take the same way as what is compared with it."""
    monkeypatch.setattr(sys.modules["moe_runtime_kernels.expert_ffn"], "one_planned_token", lambda *_: None)


def on_cpu(routing=ROUTING, dtype=torch.float32, **options):
    inputs, _ = make_inputs(routing, dtype, **options)
    return {name: tensor.cpu() for name, tensor in inputs.items()}


def one_token(expert_TK, activation="silu", **inputs):
    inputs["residual_TD"] = inputs.pop("residual", None)
    operands = [inputs.pop(name) for name in ("x", "gate_up", "down", "weight")]
    return one_token_ffn(*operands, expert_TK, activation=activation, **inputs)


@pytest.mark.parametrize("optional", [(), OPTIONAL], ids=["plain", "biases-and-residual"])
@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param(torch.float64, id="fp64")])
@pytest.mark.parametrize(
    "chosen",
    [[6, 0, 3], [2, 3, 4], [8, 5, -1], [8, -1, 9]],
    ids=["apart", "neighbours", "two-dropped", "all-dropped"],
)
def test_bits_of_expert_ffn(chosen, dtype, optional):
    expert_TK = torch.tensor([chosen], dtype=torch.int64)
    inputs = on_cpu(dtype=dtype, optional=optional, D=80, F=144)
    expected = layer(make_plan(expert_TK, 8))(**inputs)
    actual = one_token(expert_TK, **inputs)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gated):
    inputs = on_cpu(dtype=torch.bfloat16, gated=gated)
    expected = layer(make_plan(EXPERT_TK, 8), activation)(**inputs)
    assert torch.equal(one_token(EXPERT_TK, activation, **inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_begin_anywhere(dtype):
    """Of 72 and 50 numbers; pooled, because the error of a few numbers is a matter of luck."""
    pools = ([], [], [])
    for draw in range(16):
        routing = Routing(1, 3, 8 + draw)
        expert_TK = choose(routing, "cpu")
        inputs = on_cpu(routing, dtype, draw=draw, optional=OPTIONAL)
        exact = {name: tensor.double() for name, tensor in inputs.items()}
        pools[0].append(one_token(expert_TK, **inputs))
        for pool, operands in zip(pools[1:], (inputs, exact), strict=True):
            pool.append(dense_experts(expert_TK, "silu", **operands))
    assert_close_to_exact("y", *(torch.cat(pool) for pool in pools))


def test_a_fused_residual_keeps_its_dtype():
    inputs = on_cpu(dtype=torch.bfloat16, optional=("residual",))
    inputs["residual"] = inputs["residual"].float()
    expected = layer(make_plan(EXPERT_TK, 8))(**inputs)
    actual = one_token(EXPERT_TK, **inputs)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("chosen", [[6, 0, 3], [8, 5, -1], [8, -1, 9]], ids=str)
def test_a_planned_token_takes_the_same_way(chosen, monkeypatch):
    expert_TK, inputs, calls = torch.tensor([chosen]), on_cpu(optional=OPTIONAL), []
    expected = one_token(expert_TK, **inputs)

    def spy(*arguments):
        calls.append(one_planned_token(*arguments))
        return calls[-1]

    monkeypatch.setattr(sys.modules["moe_runtime_kernels.expert_ffn"], "one_planned_token", spy)
    actual = layer(make_plan(expert_TK, 8))(**inputs)
    assert actual is calls[0]
    assert torch.equal(actual, expected)
    layer(make_plan(expert_TK, 8))(**{name: tensor.requires_grad_() for name, tensor in inputs.items()})
    assert len(calls) == 1


def test_inputs_are_left_as_they_are():
    inputs = on_cpu(optional=OPTIONAL)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    one_token(EXPERT_TK, **inputs)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


def test_other_calls_are_left_to_expert_ffn():
    inputs = on_cpu(optional=OPTIONAL)
    assert one_token(EXPERT_TK, **inputs) is not None
    two = on_cpu(Routing(2, 3, 8))
    assert one_token(choose(Routing(2, 3, 8), "cpu"), **two) is None
    assert one_token(EXPERT_TK, "tanh", **inputs) is None
    assert one_token(EXPERT_TK.float(), **inputs) is None
    assert one_token(EXPERT_TK[:, :2], **inputs) is None
    assert one_token(EXPERT_TK.expand(2, 3), **inputs) is None
    assert one_token(EXPERT_TK[0], **inputs) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert one_token(EXPERT_TK, **inputs) is None
    for name, tensor in inputs.items():
        assert one_token(EXPERT_TK, **inputs | {name: tensor[..., :-1]}) is None, name
        assert one_token(EXPERT_TK, **inputs | {name: tensor.to("meta")}) is None, name
        assert one_token(EXPERT_TK, **inputs | {name: tensor.int()}) is None, name
        narrow = one_token(EXPERT_TK, **inputs | {name: tensor.bfloat16()})
        assert (narrow is None) == (name not in ("weight", "residual")), name
        trained = inputs | {name: tensor.clone().requires_grad_()}
        assert one_token(EXPERT_TK, **trained) is None, name
        with torch.no_grad():
            assert not one_token(EXPERT_TK, **trained).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_traced_and_transformed_calls_are_left_to_expert_ffn():
    """They would keep the experts of the token that they saw, or lose what belongs to their tensors."""
    inputs = on_cpu()
    served = []

    def call(x):
        served.append(one_token(EXPERT_TK, **inputs | {"x": x}))
        return x

    with torch.no_grad():
        torch.jit.trace(call, inputs["x"], check_trace=False)
        make_fx(call)(inputs["x"])
        torch.vmap(call)(inputs["x"][None])
        with forward_ad.dual_level():
            call(forward_ad.make_dual(inputs["x"], inputs["x"]))
        with FlopCounterMode(display=False):
            call(inputs["x"])
        assert served == [None] * 5
        call(inputs["x"])
        assert served[5] is not None


@pytest.mark.parametrize("E", [0, 1025])
def test_numbers_of_experts_that_no_plan_takes_are_left_to_it(E):
    experts = {"gate_up": torch.zeros(E, 4, 4), "down": torch.zeros(E, 4, 2)}
    x, weight = torch.zeros(1, 4), torch.ones(1, 1)
    assert one_token(torch.tensor([[0]]), x=x, weight=weight, **experts) is None


def test_fake_tensors_are_left_to_expert_ffn():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {name: mode.from_tensor(tensor) for name, tensor in on_cpu().items()}
        assert one_token(mode.from_tensor(EXPERT_TK), **inputs) is None
