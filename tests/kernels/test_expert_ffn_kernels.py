"""expert_ffn's kernels, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from close import assert_close_to_exact
from expert_layers import ACTIVATIONS, NAMES, dense_experts, layer, make_inputs
from inputs import PATTERNS, SMALL, Routing, assert_matches, assert_same_bits, choose, run
from interpreter import DTYPES, interpreted, needs_interpreter, rows_in_reserved_memory
from moe_runtime_kernels import make_plan
from moe_runtime_kernels.plan import TILE_HEIGHTS

pytestmark = [
    needs_interpreter,
    # raised where the interpreter reads a loop's bound
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

DROPPED = Routing(20, 2, 3, "sentinels")
PARAMETERS = ("x", "gate_up", "down", "gate_up_bias", "down_bias", "weight")  # in the order of `needs`


@pytest.fixture(autouse=True)
def _kernels():
    with interpreted("expert_ffn", "expert_ffn_backward"):
        yield


def assert_layer_matches(routing, dtype, activation="silu", optional=NAMES[4:], rows=64, **sizes):
    expert_TK = choose(routing, "cpu")
    fn = layer(make_plan(expert_TK, routing.E), activation)

    def make(draw):
        return make_inputs(routing, dtype, optional=optional, draw=draw, **sizes)

    def definition(**inputs):
        return dense_experts(expert_TK, activation, **inputs)

    assert_matches(fn, definition, make, rows)


@pytest.mark.parametrize("routing", PATTERNS)
def test_every_routing(routing):
    # of few rows, a few draws
    rows = min(max(routing.T * routing.K, 16), 64)
    assert_layer_matches(routing, torch.float32, rows=rows, D=24, F=33)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gated):
    assert_layer_matches(Routing(64, 1, 2), torch.float32, activation, gated=gated, D=24, F=33)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("height", TILE_HEIGHTS)
def test_every_tile_with_every_loop_twice(height, gated):
    routing = Routing(height, 2, 2, "sentinels")
    assert_layer_matches(routing, torch.float16, D=80, F=144, gated=gated, optional=())


@pytest.mark.parametrize(("D", "F"), [(16, 48), (17, 40)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_give_equal_bits(dtype, D, F):
    plan = make_plan(choose(DROPPED, "cpu"), DROPPED.E)
    assert_same_bits(layer(plan), *make_inputs(DROPPED, dtype, optional=NAMES[4:], D=D, F=F))


def test_finishing_in_slices_changes_no_bit_of_the_hidden_gradient(monkeypatch):
    from moe_runtime_kernels._triton import expert_ffn as kernels

    expert_TK = choose(DROPPED, "cpu")
    plan = make_plan(expert_TK, DROPPED.E)
    inputs, grad = make_inputs(DROPPED, torch.float32, D=16, F=33)
    choose_launch, gradients = kernels.choose_dh_launch, {}
    for slices in (1, 2, 4):

        def in_slices(*sizes, slices=slices, **more):
            return replace(choose_launch(*sizes, **more), slices=slices)

        monkeypatch.setattr(kernels, "choose_dh_launch", in_slices)
        gradients[slices] = run(layer(plan), inputs, grad)
    exact = run(lambda **i: dense_experts(expert_TK, "silu", **i), inputs, grad, torch.float64)
    for slices in (2, 4):
        for name in ("dx", "dgate_up", "ddown"):
            assert torch.equal(gradients[slices][name], gradients[1][name]), (slices, name)
        dweight = [result["dweight"] for result in (gradients[slices], gradients[1], exact)]
        assert_close_to_exact("dweight", *dweight)


def test_residual_and_gates_of_other_dtypes():
    expert_TK = choose(DROPPED, "cpu")

    def make(draw):
        inputs, grad = make_inputs(DROPPED, torch.float16, optional=NAMES[4:], draw=draw, D=24, F=33)
        wider = {"residual": inputs["residual"].float(), "weight": inputs["weight"].half()}
        return inputs | wider, grad.float()

    fn = layer(make_plan(expert_TK, DROPPED.E))
    assert_matches(fn, lambda **inputs: dense_experts(expert_TK, "silu", **inputs), make, 32)


@pytest.mark.parametrize(
    "wanted",
    [("x",), ("weight",), ("down",), ("down_bias",), ("gate_up_bias",), ("x", "weight"), ("gate_up", "down")],
    ids="-".join,
)
def test_gradients_alone_are_those_of_all_together(wanted):
    plan = make_plan(choose(DROPPED, "cpu"), DROPPED.E)
    inputs, grad = make_inputs(DROPPED, torch.float32, optional=NAMES[4:], D=24, F=33)
    expected = run(layer(plan), inputs, grad)
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    y = layer(plan)(**leaves)
    assert torch.equal(y, expected["out"])
    for name, dx in zip(wanted, torch.autograd.grad(y, [leaves[name] for name in wanted], grad), strict=True):
        assert torch.equal(dx, expected[f"d{name}"]), name


def test_what_nobody_wants_is_empty():
    plan = make_plan(choose(SMALL, "cpu"), SMALL.E)
    inputs, grad = make_inputs(SMALL, torch.float32, optional=NAMES[4:], D=16, F=16)
    x, gate_up, down, weight, gate_up_bias, down_bias, residual = inputs.values()
    operands = (x, gate_up, down, gate_up_bias, down_bias, weight, residual, *plan, "silu")
    y, none = torch.ops.moe_runtime.expert_ffn(*operands, False)
    kept, h = torch.ops.moe_runtime.expert_ffn(*operands, True)
    assert none.shape == (0, 32)
    assert torch.equal(y, kept)
    assert not h[plan.offset_E[-1] :].any()
    for i, name in enumerate(PARAMETERS):
        needs = [j == i for j in range(6)]
        backward = (grad, x, gate_up, down, gate_up_bias, down_bias, weight, *plan, h, "silu", needs)
        sizes = [dx.numel() for dx in torch.ops.moe_runtime.expert_ffn_backward(*backward)]
        assert sizes == [inputs[name].numel() if needed else 0 for needed in needs]


def test_no_tokens_and_every_choice_dropped():
    for T in (0, 3):
        inputs, _ = make_inputs(Routing(T, 2, 4), torch.float32, optional=NAMES[4:], D=24, F=33)
        plan = make_plan(torch.full((T, 2), 4, dtype=torch.int32), 4)
        result = run(layer(plan), inputs, torch.ones(T, 24))
        assert torch.equal(result.pop("out"), inputs["residual"])
        assert torch.equal(result.pop("dresidual"), torch.ones(T, 24))
        for name, grad in result.items():
            assert torch.equal(grad, torch.zeros_like(inputs[name.removeprefix("d")])), (T, name)


def test_a_nan_reaches_only_its_own_token():
    plan = make_plan(choose(DROPPED, "cpu"), DROPPED.E)
    inputs, _ = make_inputs(DROPPED, torch.float32, D=24, F=33)
    clean = layer(plan, "relu")(**inputs)
    inputs["x"][3, 5] = torch.nan
    touched = layer(plan, "relu")(**inputs)
    others = torch.arange(DROPPED.T) != 3
    assert (plan.row_TK[3] >= 0).any()
    assert touched[3].isnan().all()
    assert torch.equal(touched[others], clean[others])


def test_offsets_past_32_bits():
    """Of the gathered rows: each kernel computes all its other offsets from 64-bit rows in the same way."""
    from moe_runtime_kernels._triton.expert_ffn import _dh_kernel, _up_kernel

    D, F, last = 2**13, 1, 2**18 + 2  # row 2**18 begins at element 2**31
    x, rows = rows_in_reserved_memory(last + 1, D)
    rows[0], rows[last] = 1.0, 2.0
    matrix = torch.full((D,), 2.0**-13, dtype=torch.float16)
    token, slot, offset, tile_end = (
        torch.tensor(ids, dtype=torch.int32) for ids in ([last, 0], [0, 1], [2], [1])
    )
    sizes = {"ACTIVATION": "relu", "GATED": False, "SWAPPED": False, "BLOCK_M": 16, "BLOCK_F": 16}
    sizes |= {"BLOCK_K": 1024, "GROUP": 8, "EXPERTS": 1, "PDL": False}
    a, h, dh = (torch.empty(2, F, dtype=torch.float16) for _ in range(3))
    plan = (offset, tile_end, 1, 2, D, F, 1)
    _up_kernel[(1,)](x, token, matrix, None, None, h, a, *plan, **sizes)
    assert a.tolist() == h.tolist() == [[2.0], [1.0]]
    weight = torch.tensor([0.5, 3.0])
    _dh_kernel[(1,)](x, token, slot, weight, matrix, None, h, dh, None, None, *plan, SLICES=1, **sizes)
    assert dh.tolist() == [[1.0], [3.0]]


def test_float64_is_refused():
    plan = make_plan(choose(SMALL, "cpu"), SMALL.E)
    inputs, _ = make_inputs(SMALL, torch.float64, D=3, F=2)
    reason = "expert_ffn: on a GPU x must be bfloat16, float16 or float32, got float64"
    with pytest.raises(ValueError, match=reason):
        layer(plan)(**inputs)


def test_registration():
    plan = make_plan(choose(SMALL, "cpu"), SMALL.E)
    inputs, grad = make_inputs(SMALL, torch.float32, optional=NAMES[4:], D=5, F=3)
    x, gate_up, down, weight, gate_up_bias, down_bias, residual = inputs.values()
    forward = (x, gate_up, down, gate_up_bias, down_bias, weight, residual, *plan, "silu", True)
    torch.library.opcheck(torch.ops.moe_runtime.expert_ffn.default, forward)
    _, h = torch.ops.moe_runtime.expert_ffn(*forward)
    backward = (grad, x, gate_up, down, gate_up_bias, down_bias, weight, *plan, h, "silu", [True] * 6)
    torch.library.opcheck(torch.ops.moe_runtime.expert_ffn_backward.default, backward)


@pytest.mark.parametrize("family", ["cuda80", "cuda90", "cuda100", "hip"])
@pytest.mark.parametrize(("N", "E"), [(1, 1), (8, 128), (160, 10), (161, 10), (5000, 64), (2**20, 8)])
def test_launch_choice(N, E, family):
    from moe_runtime_kernels._triton.expert_ffn import choose_dh_launch, choose_up_launch

    for itemsize, aligned, gated in ((2, True, True), (2, True, False), (2, False, True), (4, True, True)):
        up = choose_up_launch(itemsize, N, E, gated=gated, aligned=aligned, family=family)
        dh = choose_dh_launch(itemsize, N, E, aligned=aligned, family=family)
        for launch in (up, dh):
            assert launch.block_m in TILE_HEIGHTS
            # a tile is not less than half full, unless tiles cannot be lower
            assert launch.block_m == 16 or launch.block_m <= 64 or E * launch.block_m // 2 < N
            # tensor cores take 64 rows of the left operand: the matrix's columns where tiles are low
            assert not launch.swapped or launch.block_f * (2 if gated and launch is up else 1) >= 64
            assert launch.swapped == (itemsize == 2 and launch.block_m < 64)
