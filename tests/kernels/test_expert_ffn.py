import shutil

import pytest
import torch
import torch.nn.functional as functional
from expert_layers import ACTIVATIONS, NAMES, D, F, dense_experts, layer, make_inputs
from inputs import (
    DEVICE,
    DTYPES,
    PATTERNS,
    SMALL,
    Routing,
    assert_compiles_once,
    assert_matches,
    assert_same_bits,
    choose,
    normal,
    run,
)
from moe_runtime_kernels import combine, expert_ffn, gathered_grouped_gemm, grouped_gemm, make_plan
from moe_runtime_kernels.plan import TILE_HEIGHTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


def assert_layer_matches(routing, dtype, activation="silu", gated=True, optional=()):
    expert_TK = choose(routing)
    plan = make_plan(expert_TK, routing.E)
    fn = layer(plan, activation)

    def make(draw):
        return make_inputs(routing, dtype, gated, optional, draw)

    assert_matches(fn, lambda **i: dense_experts(expert_TK, activation, **i), make, routing.T * routing.K)
    assert_same_bits(fn, *make(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_expert_ffn_matches_dense_experts(routing, dtype):
    assert_layer_matches(routing, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_every_option(activation, gated, dtype):
    # many tokens: the largest error of relu2's heavy tails is a matter of luck among few
    assert_layer_matches(Routing(200, 2, 5, "sentinels"), dtype, activation, gated, NAMES[4:])


def test_a_float32_residual_keeps_its_dtype():
    routing = PATTERNS[0].values[0]
    expert_TK = choose(routing)

    def make(draw):
        inputs, grad = make_inputs(routing, torch.bfloat16, draw=draw)
        return inputs | {"residual": normal(routing.T, D, seed=600 + draw)}, grad.float()

    fn = layer(make_plan(expert_TK, routing.E))
    assert_matches(fn, lambda **i: dense_experts(expert_TK, "silu", **i), make, 128)


def test_gates_are_multiplied_in_float32_forwards_and_backwards():
    """Rounded to bfloat16 before the product, this gate would be 1."""
    plan = make_plan(torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), 1)
    x = torch.full((1, 1), 200.0, dtype=torch.bfloat16, device=DEVICE)
    gate_up, down = (torch.ones(1, 1, 1, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    gate = torch.full((1, 1), 1.0035, device=DEVICE)
    y = expert_ffn(x, gate_up, down.requires_grad_(), gate, plan, activation="relu")
    y.backward()
    assert y.item() == down.grad.item() == 201


def test_it_is_the_unfused_path_bit_for_bit():
    routing = PATTERNS[1].values[0]
    plan = make_plan(choose(routing), routing.E)
    inputs, _ = make_inputs(routing, torch.bfloat16, optional=("residual",))
    x, gate_up, down, weight, residual = inputs.values()
    h_NG = gathered_grouped_gemm(x, gate_up, plan).float()
    a_NF = (functional.silu(h_NG[:, :F]) * h_NG[:, F:]).bfloat16()
    unfused = combine(grouped_gemm(a_NF, down, plan), weight, plan, residual)
    assert torch.equal(expert_ffn(x, gate_up, down, weight, plan, residual_TD=residual), unfused)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_expert_ffn_gradients_in_double_precision(activation):
    small = {"x": (7, 3), "gate_up": (3, 4, 3), "down": (3, 3, 2), "weight": (7, 2)}
    small |= {"gate_up_bias": (3, 4), "down_bias": (3, 3), "residual": (7, 3)}
    tensors = tuple(normal(*small[name], dtype=torch.float64, seed=i) for i, name in enumerate(NAMES))
    fn = layer(make_plan(choose(SMALL), SMALL.E), activation)
    torch.autograd.gradcheck(fn, tuple(x.requires_grad_() for x in tensors))


def test_no_tokens_and_every_choice_dropped():
    for T, kind in ((0, "uniform"), (3, "dropped")):
        inputs, _ = make_inputs(Routing(T, 2, 4), torch.float32, optional=NAMES[4:])
        expert_TK = torch.full((T, 2), 4, dtype=torch.int32, device=DEVICE)
        result = run(layer(make_plan(expert_TK, 4)), inputs, torch.ones(T, D, device=DEVICE))
        assert torch.equal(result.pop("out"), inputs["residual"]), kind
        assert torch.equal(result.pop("dresidual"), torch.ones(T, D, device=DEVICE)), kind
        for name, grad in result.items():
            assert torch.equal(grad, torch.zeros_like(inputs[name.removeprefix("d")])), (kind, name)


def test_memory_saved_for_backward():
    T, K, E = 48, 2, 4
    plan = make_plan(choose(Routing(T, K, E)), E)
    inputs, _ = make_inputs(Routing(T, K, E), torch.bfloat16, optional=("residual",))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    parameters = {leaves["gate_up"].data_ptr(), leaves["down"].data_ptr()}
    saved = {}

    def pack(x):
        if x.data_ptr() not in parameters:
            saved[x.data_ptr()] = (tuple(x.shape), x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(plan)(**leaves)
    gates = 4 * T * K
    integers = 4 * (3 * T * K + E + len(TILE_HEIGHTS) * E)
    assert sum(nbytes for _, nbytes in saved.values()) == 2 * T * D + 4 * T * K * F + gates + integers
    assert (T * K, D) not in [shape for shape, _ in saved.values()]


class Calls(TorchDispatchMode):
    """The registered operations that ran, with their arguments."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.name()] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [("x",), ("x", "weight"), ("gate_up", "down"), ("down_bias",), NAMES[:6]])
def test_gradients_that_nobody_wants_are_not_computed(wanted):
    routing = PATTERNS[0].values[0]
    plan = make_plan(choose(routing), routing.E)
    inputs, grad = make_inputs(routing, torch.float32, optional=NAMES[4:])
    expected = run(layer(plan), inputs, grad)
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    with Calls() as calls:
        actual = torch.autograd.grad(layer(plan)(**leaves), [leaves[name] for name in wanted], grad)
    for name, dx in zip(wanted, actual, strict=True):
        assert torch.equal(dx, expected[f"d{name}"]), name
    # the operation is told, and returns empty tensors for the rest
    args = calls.of["moe_runtime::expert_ffn_backward"]
    order = ("x", "gate_up", "down", "gate_up_bias", "down_bias", "weight")
    assert args[-1] == [name in wanted for name in order]
    grads = torch.ops.moe_runtime.expert_ffn_backward(*args)
    assert [dx.numel() > 0 for dx in grads] == args[-1]


def test_the_hidden_activations_are_kept_only_for_a_backward_that_reads_them():
    routing = PATTERNS[0].values[0]
    plan = make_plan(choose(routing), routing.E)
    inputs, _ = make_inputs(routing, torch.float32, optional=("residual",))

    def keeps(**leaves):
        with Calls() as calls:
            y = layer(plan)(**leaves)
        return calls.of["moe_runtime::expert_ffn"][-1], y

    kept, y = keeps(**inputs)
    assert not kept
    assert not y.requires_grad
    with torch.no_grad():
        assert not keeps(**inputs | {"x": inputs["x"].clone().requires_grad_()})[0]
    assert keeps(**inputs | {"x": inputs["x"].clone().requires_grad_()})[0]
    residual = inputs["residual"].clone().requires_grad_()
    kept, y = keeps(**inputs | {"residual": residual})
    assert not kept
    assert torch.equal(torch.autograd.grad(y, residual, y.detach())[0], y)


def test_activation_checkpointing_gives_the_same_gradients():
    routing = PATTERNS[1].values[0]
    plan = make_plan(choose(routing), routing.E)
    inputs, grad = make_inputs(routing, torch.float32)
    plain = run(layer(plan), inputs, grad)
    again = run(lambda **i: checkpoint(layer(plan), use_reentrant=False, **i), inputs, grad)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


def test_strided_input_is_copied():
    routing = PATTERNS[0].values[0]
    plan = make_plan(choose(routing), routing.E)
    inputs, _ = make_inputs(routing, torch.float32)
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    assert torch.equal(layer(plan)(**strided), layer(plan)(**inputs))


def test_expert_ffn_refuses_bad_input():
    plan = make_plan(torch.zeros(4, 2, dtype=torch.int32), 3)
    x, up, down, weight = normal(4, 8), normal(3, 10, 8), normal(3, 8, 5), normal(4, 2)
    shape = r"\(E, 2F, D\) = \(3, 10, 8\), or \(E, F, D\) .*, as down_proj \(E, D, F\) = \(3, 8, 5\) says"
    for wrong in (normal(3, 15, 8), normal(3, 10, 7), normal(2, 10, 8)):
        with pytest.raises(
            ValueError, match=rf"expert_ffn: gate_up_proj must have shape {shape}, got \(\d, 1"
        ):
            expert_ffn(x, wrong, down, weight, plan)
    with pytest.raises(ValueError, match=r"expert_ffn: x must have shape \(T, D\) = \(4, 8\), got \(5, 8\)"):
        expert_ffn(normal(5, 8), up, down, weight, plan)
    with pytest.raises(ValueError, match=r"expert_ffn: x must have 2 axes \(T, D\), got shape \(1, 4, 8\)"):
        expert_ffn(x[None], up, down, weight, plan)
    with pytest.raises(
        ValueError, match=r"expert_ffn: weight must have shape \(T, K\) = \(4, 2\), got \(4, 1\)"
    ):
        expert_ffn(x, up, down, weight[:, :1], plan)
    with pytest.raises(
        ValueError, match=r"expert_ffn: down_proj must have 3 axes \(E, D, F\), got shape \(8, 5\)"
    ):
        expert_ffn(x, up, down[0], weight, plan)
    with pytest.raises(
        ValueError, match="expert_ffn: down_proj must have the dtype of x, float32, got bfloat16"
    ):
        expert_ffn(x, up, down.bfloat16(), weight, plan)
    with pytest.raises(ValueError, match=r"expert_ffn: x must be bfloat16 .* or float64, got int64"):
        expert_ffn(x.long(), up.long(), down.long(), weight, plan)
    with pytest.raises(
        ValueError, match=r"expert_ffn: plan.offset_E must have shape \(E,\) = \(3,\), got \(4,\)"
    ):
        expert_ffn(x, up, down, weight, make_plan(torch.zeros(4, 2, dtype=torch.int32), 4))
    with pytest.raises(ValueError, match=r"activation must be one of 'silu', .*'relu2', got 'swish'"):
        expert_ffn(x, up, down, weight, plan, activation="swish")
    with pytest.raises(ValueError, match=r"gate_up_bias must have shape \(E, G\) = \(3, 10\), got \(3, 5\)"):
        expert_ffn(x, up, down, weight, plan, gate_up_bias=normal(3, 5))
    with pytest.raises(ValueError, match=r"down_bias must have shape \(E, D\) = \(3, 8\), got \(8,\)"):
        expert_ffn(x, up, down, weight, plan, down_bias=normal(8))
    with pytest.raises(ValueError, match=r"residual must have shape \(T, D\) = \(4, 8\), got \(4, 5\)"):
        expert_ffn(x, up, down, weight, plan, residual_TD=normal(4, 5))


def test_expert_ffn_registration():
    plan = make_plan(choose(SMALL, "cpu"), 3)
    inputs, grad = make_inputs(SMALL, torch.float32, optional=NAMES[4:])
    x, up, down, weight, up_bias, down_bias, residual = (value.cpu() for value in inputs.values())
    forward, backward = torch.ops.moe_runtime.expert_ffn, torch.ops.moe_runtime.expert_ffn_backward
    for keep_h in (True, False):
        args = (x, up, down, up_bias, down_bias, weight, residual, *plan, "silu", keep_h)
        torch.library.opcheck(forward.default, args)
    torch.library.opcheck(forward.default, (x, up, down, None, None, weight, None, *plan, "silu", True))
    _, h = forward(*args[:-1], True)
    for needs in ([True] * 6, [True, False, False, False, False, True]):
        args = (grad.cpu(), x, up, down, up_bias, down_bias, weight, *plan, h, "silu", needs)
        torch.library.opcheck(backward.default, args)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen-experts"])
def test_expert_ffn_compiles_in_one_graph(trained):
    frozen, _ = make_inputs(Routing(8, 2, 5), torch.float32, optional=NAMES[4:6])
    parameters = {name: frozen[name] for name in ("gate_up", "down", "gate_up_bias", "down_bias")}

    def fn(x, weight, residual, expert, **trained_parameters):
        plan = make_plan(expert, 5)
        options = parameters | trained_parameters
        return layer(plan)(x, weight=weight, residual=residual, **options)

    def make(T):
        inputs = {"x": normal(T, D), "weight": normal(T, 2), "residual": normal(T, D, seed=1)}
        inputs["expert"] = choose(Routing(T, 2, 5, "sentinels"))
        return inputs | (parameters if trained else {}), normal(T, D, seed=2)

    assert_compiles_once(fn, make)


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch
def test_expert_ffn_under_inductor():
    routing = PATTERNS[1].values[0]
    expert_TK, (inputs, grad) = choose(routing), make_inputs(routing, torch.float32)

    def fn(**i):
        return layer(make_plan(expert_TK, routing.E))(**i)

    torch._dynamo.reset()
    compiled = run(torch.compile(fn, fullgraph=True), inputs, grad)
    for name, value in run(fn, inputs, grad).items():
        assert torch.equal(value, compiled[name]), name
