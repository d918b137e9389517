"""ExpertLoRA: the layer of the merged weights, without the merged weights."""

import pytest
import torch
from expert_layers import D, F, dense_experts, make_inputs
from inputs import (
    DEVICE,
    DTYPES,
    PATTERNS,
    Routing,
    assert_compiles_once,
    assert_matches,
    choose,
    normal,
    run,
)
from interpreter import as_kernels, needs_kernels
from moe_runtime_kernels import combine, gathered_grouped_gemm, grouped_gemm, make_plan
from shape_names import checked_shape_names
from tiny_models import assert_equal_up_to_rounding
from torch.utils.checkpoint import checkpoint

from moe_runtime.config import FeedForwardConfig, RouterConfig
from moe_runtime.expert_lora import TARGETS, ExpertLoRA
from moe_runtime.experts import Experts, activate

R, ALPHA = 3, 6.0
OPTIONAL = ("gate_up_bias", "down_bias", "residual")
FACTORS = ("gate_up_A", "gate_up_B", "down_A", "down_B")


def make_all(routing, dtype, gated=True, optional=(), draw=0):
    """Inputs of the layer and of its adapters, which matter as much as the weights do."""
    inputs, grad = make_inputs(routing, dtype, gated, optional, draw)
    for name, weight, size in (("gate_up", inputs["gate_up"], D), ("down", inputs["down"], F)):
        E, O, I = weight.shape
        scale = (2 * R) ** -0.5
        inputs[f"{name}_A"] = normal(E, R, I, dtype=dtype, scale=size**-0.5, seed=800 + draw)
        inputs[f"{name}_B"] = normal(E, O, R, dtype=dtype, scale=scale, seed=900 + draw)
    return inputs, grad


def adapter(gate_up, down, targets=TARGETS, **options):
    return ExpertLoRA(gate_up, down, r=R, alpha=ALPHA, targets=targets, **options)


def adapted(plan, activation="silu", targets=TARGETS):
    """ExpertLoRA as a function of its parameters, which `functional_call` puts in their places."""

    def fn(x, gate_up, down, weight, gate_up_bias=None, down_bias=None, residual=None, **factors):
        layer = adapter(gate_up.detach(), down.detach(), targets)
        parameters = {
            f"lora_{side}.{target}": factors[f"{target.removesuffix('_proj')}_{side}"]
            for target in targets
            for side in "AB"
        }
        options = {"gate_up_bias": gate_up_bias, "down_bias": down_bias, "residual_TD": residual}
        return torch.func.functional_call(
            layer, parameters, (x, gate_up, down, weight, plan), {"activation": activation, **options}
        )

    return fn


def definition_of(expert_TK, activation="silu", targets=TARGETS):
    """The layer of the merged weights where arithmetic is exact, in float64.

    In the dtype that is tested the yardstick is plain low-rank arithmetic, whose intermediates round as the
    layer's do; merged weights round elsewhere, and how two heavy tails of errors compare is luck.
    """

    def fn(x, gate_up, down, weight, **rest):
        factors = {name: rest.pop(name) for name in FACTORS if name in rest}
        stems = [target.removesuffix("_proj") for target in targets]

        def adapted(y, rows, name, e):
            if name not in stems:
                return y
            return y + ALPHA / R * (rows @ factors[f"{name}_A"][e].t()) @ factors[f"{name}_B"][e].t()

        weights = {"gate_up": gate_up, "down": down}
        if x.dtype != torch.float64:
            return dense_experts(expert_TK, activation, x, *weights.values(), weight, adapted=adapted, **rest)
        for stem in stems:
            weights[stem] = weights[stem] + ALPHA / R * factors[f"{stem}_B"] @ factors[f"{stem}_A"]
        return dense_experts(expert_TK, activation, x, *weights.values(), weight, **rest)

    return fn


def assert_is_the_merged_layer(
    routing, dtype, *, activation="silu", gated=True, optional=(), targets=TARGETS
):
    expert_TK = choose(routing)
    plan = make_plan(expert_TK, routing.E)
    unused = [name for name in FACTORS if f"{name[:-2]}_proj" not in targets]

    def make(draw):
        inputs, grad = make_all(routing, dtype, gated, optional, draw)
        return {name: value for name, value in inputs.items() if name not in unused}, grad

    fn, definition = adapted(plan, activation, targets), definition_of(expert_TK, activation, targets)
    assert_matches(fn, definition, make, routing.T * routing.K)


@pytest.mark.parametrize("routing", PATTERNS)
def test_is_the_layer_of_the_merged_weights(routing):
    assert_is_the_merged_layer(routing, torch.float32, optional=OPTIONAL)


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_target(dtype, targets):
    assert_is_the_merged_layer(Routing(32, 2, 4, "sentinels"), dtype, targets=targets)


@pytest.mark.parametrize(("gated", "activation"), [(True, "gelu"), (False, "relu2"), (False, "gelu_tanh")])
def test_other_activations(gated, activation):
    routing = Routing(32, 2, 3, "empty")
    assert_is_the_merged_layer(routing, torch.float32, activation=activation, gated=gated, optional=OPTIONAL)


@needs_kernels
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_its_products_run_on_the_kernels():
    with as_kernels():
        assert_is_the_merged_layer(Routing(32, 2, 3, "sentinels"), torch.float32, optional=OPTIONAL)


def layer_and_inputs(dtype=torch.float32, routing=None, **options):
    """A layer with adapters that are not zero, its frozen weights, the rest of a call."""
    routing = routing or Routing(23, 2, 5)
    inputs, grad = make_inputs(routing, dtype)
    layer = adapter(inputs["gate_up"], inputs["down"], **options)
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, dtype=parameter.dtype, scale=0.2, seed=number)
    return layer, inputs, make_plan(choose(routing), routing.E), grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_adapters_change_nothing(dtype):
    _, inputs, plan, _ = layer_and_inputs(dtype)
    layer = adapter(inputs["gate_up"], inputs["down"])
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    hidden_NF = activate(gathered_grouped_gemm(inputs["x"], inputs["gate_up"], plan), "silu", gated=True)
    y_TD = combine(grouped_gemm(hidden_NF, inputs["down"], plan), inputs["weight"], plan)
    assert torch.equal(layer(*inputs.values(), plan), y_TD)


def test_a_is_drawn_as_a_linear_layer_draws_it():
    layer = ExpertLoRA(torch.empty(64, 24, 100), torch.empty(64, 100, 12), r=16)
    A_ERI = layer.lora_A["gate_up_proj"].detach()
    assert A_ERI.abs().max().item() == pytest.approx(0.1, rel=1e-3)
    assert A_ERI.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)


def test_scaling():
    weights = torch.empty(2, 6, 4), torch.empty(2, 4, 3)
    assert ExpertLoRA(*weights, r=4, alpha=6).scaling == 1.5
    assert ExpertLoRA(*weights, r=4, alpha=6, use_rslora=True).scaling == 3.0


def test_frozen_weights_get_no_gradient_and_none_is_computed():
    layer, inputs, plan, grad = layer_and_inputs()
    weight_grads = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "weight_grad" in str(func):
                weight_grads.append(args[1].shape[1])
            return func(*args, **(kwargs or {}))

    with Watch():
        layer(*inputs.values(), plan).backward(grad)
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert all(value.grad is None for value in inputs.values())
    assert len(weight_grads) == 4  # two products of rank R for each target, and none of the base


def test_no_tokens():
    layer, inputs, plan, grad = layer_and_inputs(routing=Routing(0, 2, 5))
    y_TD = layer(*inputs.values(), plan)
    assert y_TD.shape == (0, D)
    y_TD.backward(grad)
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


def test_autocast_casts_to_its_dtype():
    layer, inputs, plan, _ = layer_and_inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        y_TD = layer(*inputs.values(), plan)
    halves = {name: value.bfloat16() for name, value in inputs.items() if name != "weight"}
    assert y_TD.dtype == torch.bfloat16
    assert torch.equal(y_TD, layer(**rename(inputs | halves), plan=plan))


def rename(inputs):
    names = {"x": "x_TD", "gate_up": "gate_up_proj", "down": "down_proj", "weight": "weight_TK"}
    return {names[name]: value for name, value in inputs.items()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(use_reentrant):
    layer, inputs, plan, grad = layer_and_inputs()
    x_TD = inputs["x"].requires_grad_()
    results = []
    for call in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=use_reentrant)):
        layer.zero_grad()
        x_TD.grad = None
        call(*inputs.values(), plan).backward(grad)
        results.append([x_TD.grad, *(parameter.grad for parameter in layer.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_compiles_once():
    layer, _, _, _ = layer_and_inputs()

    def fn(x, gate_up, down, weight, expert):
        return layer(x, gate_up, down, weight, make_plan(expert, 5))

    def make(T):
        routing = Routing(T, 2, 5)
        inputs, grad = make_inputs(routing, torch.float32)
        return inputs | {"expert": choose(routing)}, grad

    assert_compiles_once(fn, make, assert_equal_up_to_rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merge_rounds_once(dtype):
    layer, inputs, _, _ = layer_and_inputs(dtype, use_rslora=True)
    expected = {}
    for target, weight in (("gate_up_proj", inputs["gate_up"]), ("down_proj", inputs["down"])):
        delta = layer.lora_B[target].double() @ layer.lora_A[target].double()
        expected[target] = (weight.double() + layer.scaling * delta).detach()
    layer.merge(inputs["gate_up"], inputs["down"])
    for weight, exact in zip((inputs["gate_up"], inputs["down"]), expected.values(), strict=True):
        # float32 sums of R + 1 terms, then half a step of the weight's dtype
        assert ((weight.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_merge_leaves_what_is_no_target():
    layer, inputs, _, _ = layer_and_inputs(targets=("down_proj",))
    before = {name: inputs[name].clone() for name in ("gate_up", "down")}
    layer.merge(inputs["gate_up"], inputs["down"])
    assert torch.equal(inputs["gate_up"], before["gate_up"])
    assert not torch.equal(inputs["down"], before["down"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"targets": ()}, r"targets must be some of gate_up_proj, down_proj, got \(\)"),
        ({"targets": ("up_proj",)}, r"targets must be some of gate_up_proj, down_proj, got \('up_proj',\)"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertLoRA(torch.empty(2, 6, 4), torch.empty(2, 4, 3), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_dropout": 0.5}, "expert_dropout must be 0.0 with expert_lora, got 0.5"),
        ({"recompute_experts": True}, "recompute_experts must be False with expert_lora, got True"),
    ],
)
def test_experts_that_are_configured_for_more_refuse_it(options, message):
    router = RouterConfig(hidden_size=D, num_experts=3, experts_per_token=2)
    layer = Experts(FeedForwardConfig(hidden_size=D, intermediate_size=F, router=router, **options))
    inputs = torch.ones(4, D), torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 2)
    layer(*inputs)
    layer.expert_lora = adapter(layer.gate_up_proj, layer.down_proj)
    with pytest.raises(ValueError, match=message):
        layer(*inputs)


def test_every_gradient_is_compared_and_names_tell_shapes():
    """Guards the comparisons above: an adapter that got no gradient would not be compared."""
    routing = Routing(9, 2, 3)
    inputs, grad = make_all(routing, torch.float32)
    with checked_shape_names("moe_runtime"):
        found = run(adapted(make_plan(choose(routing), 3)), inputs, grad)
    assert {f"d{name}" for name in FACTORS} < set(found)
