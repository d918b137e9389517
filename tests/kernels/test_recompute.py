"""expert_ffn without its hidden activations: kept are the tokens and the plan, and no bit changes."""

import pytest
import torch
from expert_layers import NAMES, D, F, make_inputs
from inputs import DTYPES, PATTERNS, SMALL, Routing, assert_compiles_once, choose, normal, run
from interpreter import as_kernels, interpreted, needs_interpreter, needs_kernels
from moe_runtime_kernels import expert_ffn, make_plan
from moe_runtime_kernels.flop_formulas import register_flop_formulas
from moe_runtime_kernels.plan import TILE_HEIGHTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

ROUTING = Routing(33, 2, 5, "sentinels")
SUBSETS = [
    ("x",),
    ("weight",),
    ("down",),
    ("down_bias",),
    ("gate_up_bias",),
    ("gate_up", "weight"),
    NAMES[:6],
]


def layer(plan, recompute, activation="silu"):
    def fn(x, gate_up, down, weight, gate_up_bias=None, down_bias=None, residual=None):
        return expert_ffn(
            x,
            gate_up,
            down,
            weight,
            plan,
            activation=activation,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            residual_TD=residual,
            recompute=recompute,
        )

    return fn


def assert_no_bit_changes(routing, dtype, activation="silu", **sizes):
    plan = make_plan(choose(routing), routing.E)
    inputs, grad = make_inputs(routing, dtype, **sizes)
    expected = run(layer(plan, False, activation), inputs, grad)
    actual = run(layer(plan, True, activation), inputs, grad)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("optional", [(), NAMES[4:]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_no_bit_of_output_and_gradients_changes(routing, dtype, optional):
    assert_no_bit_changes(routing, dtype, optional=optional)


@needs_kernels
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(("D", "F"), [(80, 48), (17, 40)], ids=["aligned", "odd"])
@pytest.mark.parametrize("T", [33, 150], ids=["low-tiles", "high-tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_no_bit_changes_in_the_kernels(dtype, T, D, F, gated):
    """h comes a second time from the kernel, the tile and the order of sums that made it first."""
    with as_kernels("expert_ffn", "expert_ffn_backward"):
        routing = ROUTING._replace(T=T)
        assert_no_bit_changes(routing, dtype, "gelu", optional=NAMES[4:], D=D, F=F, gated=gated)


@needs_interpreter
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_gradients_alone_are_those_of_all_together(wanted, kernels):
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, torch.float32, optional=NAMES[4:], D=24, F=16)
    with interpreted(*(("expert_ffn", "expert_ffn_backward") if kernels else ("make_plan",))):
        expected = run(layer(plan, False), inputs, grad)
        leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
        y = layer(plan, True)(**leaves)
        actual = torch.autograd.grad(y, [leaves[name] for name in wanted], grad)
    for name, dx in zip(wanted, actual, strict=True):
        assert torch.equal(dx, expected[f"d{name}"]), name


def saved_bytes(recompute, **leaves):
    """Of all that is kept for backward and is not one of the parameters."""
    parameters = {x.data_ptr() for name, x in leaves.items() if name not in ("x", "weight", "residual")}
    saved = {}

    def pack(x):
        if x.data_ptr() not in parameters:
            saved[x.data_ptr()] = x.nbytes
        return x

    plan = make_plan(choose(ROUTING), ROUTING.E)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(plan, recompute)(**leaves)
    return sum(saved.values())


class Forward(TorchDispatchMode):
    """The arguments of expert_ffn's forward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "moe_runtime::expert_ffn":
            self.arguments = args
        return func(*args, **(kwargs or {}))


def test_the_forward_does_not_store_what_is_not_kept():
    inputs, _ = make_inputs(ROUTING, torch.float32)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    for recompute in (False, True):
        with Forward() as forward:
            layer(make_plan(choose(ROUTING), ROUTING.E), recompute)(**leaves)
        assert forward.arguments[-1] is not recompute


@pytest.mark.parametrize("optional", [("residual",), NAMES[4:]], ids=["plain", "bias"])
def test_tokens_gates_and_plan_are_all_that_is_kept(optional):
    T, K, E, _ = ROUTING
    inputs, _ = make_inputs(ROUTING, torch.bfloat16, optional=optional)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    gates, integers = 4 * T * K, 4 * (3 * T * K + E + len(TILE_HEIGHTS) * E)
    assert saved_bytes(True, **leaves) == 2 * T * D + gates + integers
    assert saved_bytes(False, **leaves) == 2 * T * D + gates + integers + 2 * T * K * 2 * F


def test_nothing_is_kept_where_nothing_is_differentiated():
    inputs, _ = make_inputs(ROUTING, torch.float32, optional=("residual",))
    assert saved_bytes(True, **inputs) == 0
    assert saved_bytes(True, **inputs | {"residual": inputs["residual"].requires_grad_()}) == 0


def test_no_tokens():
    plan = make_plan(torch.empty(0, 2, dtype=torch.int32), 4)
    inputs, grad = make_inputs(Routing(0, 2, 4), torch.float32, optional=NAMES[4:])
    for name, value in run(layer(plan, True), inputs, grad).items():
        assert not value.any(), name


def test_under_checkpointing():
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, torch.float32)
    plain = run(layer(plan, False), inputs, grad)
    again = run(lambda **i: checkpoint(layer(plan, True), use_reentrant=False, **i), inputs, grad)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


def test_backward_inside_autocast_of_a_forward_outside_keeps_its_bits():
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, torch.float32, optional=NAMES[4:])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    expected = run(layer(plan, False), inputs, grad)
    y = layer(plan, True)(**leaves)
    with torch.autocast(y.device.type, dtype=torch.bfloat16):
        actual = torch.autograd.grad(y, tuple(leaves.values()), grad)
    for name, value in zip(leaves, actual, strict=True):
        assert torch.equal(value, expected[f"d{name}"]), name


def test_it_compiles_in_one_graph():
    parameters, _ = make_inputs(Routing(8, 2, 5), torch.float32, optional=NAMES[4:6])
    parameters = {name: parameters[name] for name in ("gate_up", "down", "gate_up_bias", "down_bias")}

    def fn(x, weight, residual, expert, **parameters):
        return layer(make_plan(expert, 5), True)(x, weight=weight, residual=residual, **parameters)

    def make(T):
        inputs = {"x": normal(T, D), "weight": normal(T, 2), "residual": normal(T, D, seed=1)}
        inputs["expert"] = choose(Routing(T, 2, 5, "sentinels"))
        return inputs | parameters, normal(T, D, seed=2)

    assert_compiles_once(fn, make)


@pytest.mark.parametrize("needs", [[True] * 6, [False] * 4 + [True, False]], ids=["all", "no-h"])
def test_registration(needs):
    plan = make_plan(choose(SMALL, "cpu"), SMALL.E)
    inputs, grad = make_inputs(SMALL, torch.float32, optional=NAMES[4:])
    x, up, down, weight, up_bias, down_bias, _ = (value.cpu() for value in inputs.values())
    arguments = (grad.cpu(), x, up, down, up_bias, down_bias, weight, *plan, None, "silu", needs)
    torch.library.opcheck(torch.ops.moe_runtime.expert_ffn_backward.default, arguments)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_flops_count_the_product_that_is_made_again(frozen, gated):
    register_flop_formulas()
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, torch.float32, gated)
    leaves = {name: x.requires_grad_(name == "x" or not frozen) for name, x in inputs.items()}
    backward = {}
    for recompute in (False, True):
        y = layer(plan, recompute)(**leaves)
        with FlopCounterMode(display=False) as counter:
            y.backward(grad)
        backward[recompute] = counter.get_total_flops()
    again = 2 * ROUTING.T * ROUTING.K * D * leaves["gate_up"].shape[1]
    assert backward[True] - backward[False] == again
