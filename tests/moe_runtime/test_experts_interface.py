"""`experts_implementation="moe_runtime"` against the experts' own forward, over transformers' families."""

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from inputs import DTYPES, PATTERNS, SMALL, Routing, assert_compiles_once, assert_matches, choose, normal
from moe_families import FAMILIES, HERE, is_at_least, tiny_family
from moe_runtime_kernels import expert_ffn, make_plan
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import moe_runtime
from moe_runtime.hf import experts_interface
from moe_runtime.hf.accelerate import is_experts
from moe_runtime.hf.experts_interface import (
    experts_forward,
    obstacle,
    served_by,
    transposed_grouped_gemm,
)

moe_runtime.register()

E, D, F = 5, 16, 12
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


# --- whole models ------------------------------------------------------------------------


def logits_and_gradients(model):
    model.zero_grad()
    output = model(IDS, labels=IDS)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels' functions, in the order in which the interface called them."""
    called = []
    for name in ("expert_ffn", "grouped_gemm", "transposed_grouped_gemm"):
        function = getattr(experts_interface, name)
        monkeypatch.setattr(experts_interface, name, counted(function, name, called))
    return called


def counted(function, name, called):
    def call(*arguments, **options):
        called.append(name.removeprefix("transposed_"))
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("name", HERE)
def test_families_equal_eager(name, calls):
    model = tiny_family(name)
    logits, gradients = logits_and_gradients(model)
    assert not calls
    model.set_experts_implementation("moe_runtime")
    mine, my_gradients = logits_and_gradients(model)

    experts = [module for module in model.modules() if is_experts(module)]
    assert experts
    assert {served_by(module) for module in experts} == {FAMILIES[name].experts} == set(calls)
    assert (mine - logits).abs().max() <= 1e-5
    assert my_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        error = (my_gradients[key] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max().clamp(min=1), f"{key}: {error}"


def test_families_are_many_and_reach_the_experts_gradients():
    assert len(HERE) >= 12
    _, gradients = logits_and_gradients(tiny_family("mixtral", "moe_runtime"))
    for part in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        assert gradients[f"model.layers.1.mlp.{part}"].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "cache"), [("mixtral", "dynamic"), ("gpt_oss", "static"), ("deepseek_v3", "static")]
)
def test_generate_gives_eagers_tokens(name, cache):
    model = tiny_family(name)

    def generate():
        options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
        if cache == "static":
            options["past_key_values"] = StaticCache(config=model.config, max_cache_len=32)
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)

    expected = generate()
    model.set_experts_implementation("moe_runtime")
    assert torch.equal(generate(), expected)
    assert expected.shape == (2, 13)


def test_the_argument_of_from_pretrained(tmp_path, calls):
    model = tiny_family("olmoe")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_runtime")
    with torch.no_grad():
        assert (loaded(IDS).logits - model(IDS).logits).abs().max() <= 1e-5
    assert calls == ["expert_ffn"] * 2


def test_an_unknown_name_is_refused_with_ours_among_the_known_ones():
    model = tiny_family("mixtral")
    with pytest.raises(ValueError, match=r'"moe_run"` is not supported.*="moe_runtime"'):
        model.set_experts_implementation("moe_run")


def test_registering_again_changes_nothing():
    moe_runtime.register()
    assert ALL_EXPERTS_FUNCTIONS["moe_runtime"] is experts_forward


# --- one experts module -------------------------------------------------------------------


def experts_module(
    *,
    act_fn=nn.functional.silu,
    dtype=torch.float32,
    num_experts=E,
    own_gate=None,
    post_norm=False,
    **flags,
):
    """An experts class as transformers' model files write them, with chosen flags."""
    has_gate, transposed = flags.get("has_gate", True), flags.get("is_transposed", False)
    G, first = (2 * F, "gate_up_proj") if has_gate else (F, "up_proj")

    class TestExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = num_experts, act_fn
            shapes = {first: (num_experts, G, D), "down_proj": (num_experts, D, F)}
            for seed, (name, shape) in enumerate(shapes.items()):
                weight = normal(*shape, seed=seed, scale=0.4).to(dtype)
                bias = normal(*shape[:2], seed=10 + seed).to(dtype)
                weight = weight.transpose(1, 2).contiguous() if transposed else weight
                self.register_parameter(name, nn.Parameter(weight))
                if flags.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(bias))
            if post_norm:
                self.post_expert_norm = nn.RMSNorm(D, eps=1e-5)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("the eager forward must not run")

    if own_gate is not None:
        TestExperts._apply_gate = own_gate
    if post_norm:
        flags["has_post_expert_norm"] = True
    return use_experts_implementation(TestExperts, **flags)(
        SimpleNamespace(_experts_implementation="moe_runtime")
    )


def interleaved_and_clamped(self, gate_up):
    gate, up = gate_up[..., ::2].clamp(max=1.0), gate_up[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def by_hand(module, x_TD, expert_TK, weight_TK):
    """Every token through every expert, with the module's own activation and norm."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    total = torch.zeros_like(x_TD)
    for e in range(module.num_experts):
        h = product_by_hand(module, x_TD, first, e)
        a = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        y = product_by_hand(module, a, "down_proj", e)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        total = total + (weight_TK * (expert_TK == e)).sum(1, keepdim=True) * y
    return total


def product_by_hand(module, x, name, e):
    weight = getattr(module, name)[e]
    y = x @ (weight if module.is_transposed else weight.t())
    return y + getattr(module, f"{name}_bias")[e] if module.has_bias else y


MODULES = {
    "plain": ({}, "expert_ffn"),
    "biases": ({"has_bias": True}, "expert_ffn"),
    "without-a-gate": ({"has_gate": False, "act_fn": transformers.activations.ACT2FN["relu2"]}, "expert_ffn"),
    "transposed": ({"is_transposed": True}, "grouped_gemm"),
    "transposed-and-without-a-gate": ({"is_transposed": True, "has_gate": False}, "grouped_gemm"),
    "as-gpt-oss": (
        {
            "is_transposed": True,
            "is_concatenated": False,
            "has_bias": True,
            "own_gate": interleaved_and_clamped,
        },
        "grouped_gemm",
    ),
    "own-gate": ({"own_gate": interleaved_and_clamped}, "grouped_gemm"),
    "own-gate-and-biases": ({"own_gate": interleaved_and_clamped, "has_bias": True}, "grouped_gemm"),
    "another-activation": ({"act_fn": nn.functional.mish}, "grouped_gemm"),
}
if is_at_least("5.23"):
    MODULES["norm-after-the-experts"] = ({"post_norm": True}, "grouped_gemm")


def outcome(call, module, routing, dtype=torch.float64):
    """Output and all gradients under a random upstream gradient."""
    module.zero_grad()
    x = normal(routing.T, D, seed=3).to(dtype).requires_grad_()
    weight = normal(routing.T, routing.K, seed=4).softmax(1).to(dtype).requires_grad_()
    y = call(module, x, choose(routing, "cpu").long(), weight)
    y.backward(normal(routing.T, D, seed=5).to(dtype))
    parameters = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "dweight": weight.grad} | parameters


ROUTINGS = [
    pytest.param(Routing(11, 3, 5), id="uniform"),
    pytest.param(Routing(9, 2, 6, "empty"), id="an-empty-expert"),
    pytest.param(Routing(1, 1, 4), id="one-token-one-choice"),
    pytest.param(Routing(9, 3, 6, "sentinels"), id="dropped-choices"),
]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", MODULES)
def test_a_module_is_its_definition(kind, routing):
    options, expected_kernel = MODULES[kind]
    module = experts_module(num_experts=routing.E, dtype=torch.float64, **options)
    if kind == "norm-after-the-experts":
        module.double()
    assert served_by(module) == expected_kernel
    mine = outcome(type(module).forward, module, routing)
    expected = outcome(by_hand, module, routing)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert mine[name] is not None, name
        assert value.abs().max() > 0, f"{name}: this compares nothing"
        assert (mine[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


ACT2FN = transformers.activations.ACT2FN
GELU_OF_PYTHON = transformers.activations.GELUActivation(use_gelu_python=True)


@pytest.mark.parametrize(
    "act_fn",
    [
        *(
            ACT2FN[name]
            for name in ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
        ),
        GELU_OF_PYTHON,
        nn.functional.silu,
        nn.functional.gelu,
        nn.functional.relu,
    ],
    ids=lambda act_fn: getattr(act_fn, "__name__", type(act_fn).__name__),
)
def test_a_known_activation_is_fused(act_fn):
    module = experts_module(act_fn=act_fn, dtype=torch.float64)
    assert served_by(module) == "expert_ffn"
    mine, expected = outcome(type(module).forward, module, SMALL), outcome(by_hand, module, SMALL)
    for name, value in expected.items():
        assert (mine[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


def test_a_subclass_of_a_known_activation_is_not():
    class Scaled(nn.SiLU):
        def forward(self, x):
            return 2 * super().forward(x)

    assert served_by(experts_module(act_fn=Scaled())) == "grouped_gemm"
    assert served_by(experts_module(act_fn=nn.GELU(approximate="tanh"))) == "grouped_gemm"


@pytest.mark.parametrize("kind", ["plain", "as-gpt-oss"])
def test_rows_in_another_dtype_take_the_weights(kind):
    """As autocast around the rest of a model leaves them: float32 rows, bfloat16 weights, float32 gates."""
    options, _ = MODULES[kind]
    module = experts_module(dtype=torch.bfloat16, **options)
    x, weight = normal(7, D).to(torch.bfloat16), normal(7, 2).softmax(1)
    index = choose(SMALL, "cpu").long()
    expected = module(x, index, weight)
    assert expected.dtype == torch.bfloat16
    actual = module(x.float(), index, weight)
    assert actual.dtype == torch.float32
    assert torch.equal(actual.bfloat16(), expected)


@pytest.mark.parametrize("kind", ["plain", "as-gpt-oss"])
def test_under_autocast_products_take_its_dtype(kind, autocast_rounds):
    options, _ = MODULES[kind]
    wide, narrow = experts_module(**options), experts_module(dtype=torch.bfloat16, **options)
    x, weight, index = normal(7, D).bfloat16(), normal(7, 2).softmax(1), choose(SMALL, "cpu").long()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = wide(x.float(), index, weight)
        actual.square().sum().backward()
    assert actual.dtype == torch.float32
    assert torch.equal(actual.bfloat16(), narrow(x, index, weight))
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in wide.parameters())


@pytest.mark.parametrize("kind", ["plain", "as-gpt-oss"])
def test_autocast_leaves_float64_alone(kind):
    options, _ = MODULES[kind]
    module = experts_module(dtype=torch.float64, **options)
    x, index = normal(7, D).double(), choose(SMALL, "cpu").long()
    weight = normal(7, 2).softmax(1).double()
    expected = module(x, index, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x, index, weight), expected)


@pytest.mark.parametrize("kind", ["plain", "as-gpt-oss"])
def test_choices_that_are_elsewhere_add_nothing(kind):
    options, _ = MODULES[kind]
    module = experts_module(**options)
    module.down_proj.register_hook(lambda grad: finite(grad))
    x, weight = normal(4, D).requires_grad_(), torch.full((4, 2), 0.5)
    index = torch.tensor([[E, E], [0, E], [E, 1], [2, 3]])
    y = module(x, index, weight)
    y.sum().backward()
    finite(y), finite(x.grad)
    assert (y[0] == 0).all()
    assert (x.grad[0] == 0).all()
    assert (y[1:] != 0).all()
    assert (module(x, torch.full_like(index, E), weight) == 0).all()


def finite(tensor):
    assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("kind", ["plain", "as-gpt-oss"])
def test_no_tokens(kind):
    options, _ = MODULES[kind]
    module, x = experts_module(**options), torch.zeros(0, D, requires_grad=True)
    y = module(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, D)
    assert all((p.grad == 0).all() for p in module.parameters())


@pytest.mark.parametrize("kind", ["plain", "as-gpt-oss"])
def test_compiled_as_one_graph_for_all_lengths(kind):
    options, _ = MODULES[kind]
    module = experts_module(**options)

    def fn(x, weight, index):
        return module(x, index, weight)

    def make(T):
        index = torch.rand(T, E, generator=torch.Generator().manual_seed(T)).argsort(1)[:, :2]
        inputs = {"x": normal(T, D), "weight": normal(T, 2, seed=1).softmax(1), "index": index}
        return inputs, normal(T, D, seed=2)

    assert_compiles_once(fn, make)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
@pytest.mark.parametrize("kind", ["plain", "as-gpt-oss"])
def test_compiled_where_nothing_needs_a_gradient(kind, how):
    options, _ = MODULES[kind]
    module = experts_module(**options).requires_grad_(how != "frozen")
    x, index, weight = normal(7, D), choose(SMALL, "cpu").long(), normal(7, 2).softmax(1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: module(*inputs), fullgraph=True, backend="eager")
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": nullcontext}
    with modes[how]():
        assert torch.equal(compiled(x, index, weight), module(x, index, weight))


def test_weights_that_are_computed():
    """A parametrised weight, as adapters make them, is no leaf."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module, plain = experts_module(), experts_module()
    nn.utils.parametrize.register_parametrization(module, "gate_up_proj", Doubled())
    with torch.no_grad():
        plain.gate_up_proj *= 2
    assert served_by(module) == "expert_ffn"
    x, index, weight = normal(7, D), choose(SMALL, "cpu").long(), normal(7, 2).softmax(1)
    y, expected = module(x, index, weight), plain(x, index, weight)
    assert torch.equal(y, expected)
    y.sum().backward(), expected.sum().backward()
    original = module.parametrizations.gate_up_proj.original
    assert torch.equal(original.grad, 2 * plain.gate_up_proj.grad)


# --- adapters, and what the kernels cannot do ---------------------------------------------


class Adapter(nn.Module):
    """Stands for an adapter: it has expert_ffn's signature and doubles what comes out."""

    def forward(self, *arguments, **options):
        return 2 * expert_ffn(*arguments, **options)


def test_an_adapter_takes_the_place_of_expert_ffn():
    x, index, weight = normal(7, D), choose(SMALL, "cpu").long(), normal(7, 2).softmax(1)
    module = experts_module(has_bias=True)
    expected = 2 * module(x, index, weight)
    module.expert_lora = Adapter()
    assert torch.equal(module(x, index, weight), expected)


def test_an_adapter_on_other_experts_is_refused():
    module = experts_module(is_transposed=True)
    module.expert_lora = Adapter()
    message = "expert_lora must sit on experts that run as one expert_ffn, got TestExperts, which runs on "
    with pytest.raises(ValueError, match=message + "grouped_gemm"):
        module(normal(7, D), choose(SMALL, "cpu").long(), normal(7, 2))


def test_what_the_kernels_cannot_do_goes_to_transformers_and_is_said(monkeypatch):
    warned = []
    monkeypatch.setattr(experts_interface.logger, "warning_once", warned.append)
    module = experts_module(num_experts=1030)
    x, weight = normal(7, D), normal(7, 2).softmax(1)
    index = torch.tensor([[1029, 3]]).expand(7, 2)
    assert served_by(module) == "grouped_mm"
    y = module(x, index, weight)
    assert torch.equal(y, ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, x, index, weight))
    assert warned == [
        "moe_runtime: TestExperts runs on transformers' 'grouped_mm', because it has 1030 experts, more than "
        "1024"
    ]


def test_delegation_compiles_and_leaves_the_warning_out(monkeypatch):
    warned = []
    monkeypatch.setattr(experts_interface.logger, "warning_once", warned.append)
    module = experts_module(num_experts=1030)
    x, index, weight = normal(7, D), torch.tensor([[1029, 3]]).expand(7, 2), normal(7, 2).softmax(1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: module(*inputs), fullgraph=True, backend="eager")
    y = compiled(x, index, weight)
    assert not warned
    assert torch.equal(y, module(x, index, weight))
    assert len(warned) == 1


def test_as_many_experts_as_the_plan_takes():
    module = experts_module(num_experts=1024)
    assert served_by(module) == "expert_ffn"
    x, index, weight = normal(7, D), torch.tensor([[1023, 3]]).expand(7, 2), normal(7, 2).softmax(1)
    expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, x, index, weight)
    assert (module(x, index, weight) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_obstacles_name_the_weight():
    module = experts_module()
    assert obstacle(module) is None
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert obstacle(module) == "its gate_up_proj is float8_e4m3fn, which no kernel takes"
    del module.gate_up_proj
    assert obstacle(module) == "its gate_up_proj is not one tensor with three axes"
    module = experts_module(has_gate=False)
    module.down_proj = nn.Parameter(module.down_proj.flatten())
    assert obstacle(module) == "its down_proj is not one tensor with three axes"


# --- the product with transposed weights --------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", PATTERNS)
def test_transposed_product(routing, dtype):
    plan = make_plan(choose(routing, "cpu"), routing.E)
    rows = int(plan.offset_E[-1])

    def product(x, weight, bias):
        return transposed_grouped_gemm(x, weight, plan, bias)[:rows]

    def definition(x, weight, bias):
        ends = [0, *plan.offset_E.tolist()]
        parts = [x[s:e] @ weight[i] + bias[i] for i, (s, e) in enumerate(pairwise(ends))]
        return torch.cat(parts)

    def make(draw):
        inputs = {
            "x": normal(routing.T * routing.K, D, dtype=dtype, seed=draw),
            "weight": normal(routing.E, D, F, dtype=dtype, seed=100 + draw, scale=D**-0.5),
            "bias": normal(routing.E, F, dtype=dtype, seed=200 + draw),
        }
        return inputs, normal(rows, F, dtype=dtype, seed=300 + draw)

    assert_matches(product, definition, make, rows)


def transposed_operands():
    routing = Routing(9, 2, 6)
    plan = make_plan(choose(routing, "cpu"), routing.E)
    return normal(routing.T * routing.K, D), normal(routing.E, D, F, seed=1), plan


def test_transposed_product_of_operands_that_are_not_contiguous(monkeypatch):
    """The kernels take contiguous ones; their code for a CPU takes any."""
    seen = []
    for name in ("_input_grad", "_grouped_gemm", "_weight_grad"):
        monkeypatch.setattr(experts_interface, name, seen_contiguous(getattr(experts_interface, name), seen))
    x, weight, plan = transposed_operands()
    weight.requires_grad_()
    y = transposed_grouped_gemm(x.t().contiguous().t().requires_grad_(), weight, plan)
    y.backward(normal(*y.t().shape).t())
    assert seen == [True] * 3


def seen_contiguous(operation, seen):
    def call(*operands):
        seen.append(all(x.is_contiguous() for x in operands if x is not None))
        return operation(*operands)

    return call


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_are_kept_for_weights_that_learn(frozen):
    x, weight, plan = transposed_operands()
    x.requires_grad_(), weight.requires_grad_(not frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.data_ptr()) or saved, id):
        transposed_grouped_gemm(x, weight, plan)
    assert weight.data_ptr() in kept
    assert (x.data_ptr() in kept) == (not frozen)


def test_transposed_weights_are_not_copied(monkeypatch):
    pointers = []
    operation = experts_interface._input_grad

    def spy(x, weight, *plan):
        pointers.append(weight.data_ptr())
        return operation(x, weight, *plan)

    monkeypatch.setattr(experts_interface, "_input_grad", spy)
    module = experts_module(is_transposed=True)
    module(normal(7, D), choose(SMALL, "cpu").long(), normal(7, 2).softmax(1))
    assert pointers == [module.gate_up_proj.data_ptr(), module.down_proj.data_ptr()]
