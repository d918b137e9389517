"""accelerate_model: swapped routers against their own forward, whole models against themselves, and undo."""

import copy
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from inputs import assert_compiles_once, normal
from moe_families import FAMILIES, is_at_least, tiny_family
from shape_names import checked_shape_names
from tiny_models import tiny_model, tokens
from torch import nn

import moe_runtime
from moe_runtime.hf.accelerate import BY_CLASS, FusedRouter, accelerate_model, fused_class
from moe_runtime.hf.experts_interface import experts_forward

T, E, K, D = 33, 12, 3, 16
IDS = tokens(2, 9, seed=1)
MODELS = Path(transformers.__file__).parent / "models"


def module_of_each_router():
    """Router class -> the module of transformers that defines it, for those that this version has."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            if name in BY_CLASS and is_at_least(BY_CLASS[name].since):
                found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


MODULES = module_of_each_router()
CONFIG = {
    "hidden_size": D,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": K,
    "moe_topk": K,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_scaling_factor": 1.5,
    "route_scale": 0.5,
    "moe_norm_min": 1e-12,
}


def make_router(name, dtype=torch.float32, **changes):
    router = getattr(importlib.import_module(MODULES[name]), name)(SimpleNamespace(**(CONFIG | changes)))
    for seed, tensor in enumerate([*router.parameters(), *router.buffers()]):
        tensor.data = normal(*tensor.shape, seed=seed, scale=0.3)
    return router.to(dtype)


def swapped(router):
    router = copy.deepcopy(router)
    router.__class__ = fused_class(type(router))
    return router


def bias_argument(kind):
    """What some routers take after the rows: the bias of the choice."""
    return (normal(E, seed=5, scale=0.3),) if len(inspect.signature(kind.forward).parameters) == 3 else ()


def outcome(router, x_TD, extra):
    """Logits, gates of all experts, and gradients of the input and every parameter."""
    x_TD = x_TD.clone().requires_grad_()
    rows = (
        x_TD[None] if isinstance(getattr(router, "gate", None), nn.Linear) else x_TD
    )  # Afmoe's has two axes
    logits_TE, weight_TK, expert_TK = router(rows, *extra)
    assert expert_TK.dtype == torch.int64
    assert (expert_TK.sort(1).values.diff(dim=1) > 0).all()
    gate_TE = torch.zeros(T, E, dtype=weight_TK.dtype).scatter(1, expert_TK, weight_TK)
    loss = (gate_TE.float() * normal(T, E, seed=7)).sum() + (logits_TE.float() * normal(T, E, seed=8)).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in router.named_parameters() if p.grad is not None}
    return {"logits": logits_TE.detach(), "gates": gate_TE.detach(), "dx": x_TD.grad} | gradients


def assert_same_router(router, dtype=torch.float32, gradients=None):
    """`gradients`: a dtype that both round gradients to on their way, if it is not their own."""
    extra = bias_argument(type(router))
    x_TD = normal(T, D, seed=6).to(dtype)
    expected, actual = outcome(router, x_TD, extra), outcome(swapped(router), x_TD, extra)
    assert actual.keys() == expected.keys()
    assert any(name.endswith("weight") for name in expected)
    assert torch.equal(actual["logits"], expected["logits"])
    assert torch.equal(actual["gates"] != 0, expected["gates"] != 0)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        # the arithmetic of the gates is float32 in both; they are rounded to the dtype once
        error = (actual[name] - value).abs().max()
        dtype = value.dtype if gradients is None or name in ("logits", "gates") else gradients
        assert error <= 4 * torch.finfo(dtype).eps * value.abs().max(), f"{name}: {error}"


@pytest.mark.parametrize("name", MODULES)
def test_a_swapped_router_is_the_router(name):
    assert_same_router(make_router(name))


@pytest.mark.parametrize("name", ["Qwen3MoeTopKRouter", "DeepseekV3TopkRouter", "NemotronHTopkRouter"])
def test_gates_that_are_not_renormalised(name):
    assert_same_router(make_router(name, norm_topk_prob=False))


def test_a_greedy_choice_has_no_groups():
    router = make_router("DeepseekV2TopkRouter", topk_method="greedy", n_group=None, topk_group=None)
    assert_same_router(router)


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_rows_and_weights(name):
    assert_same_router(make_router(name, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_rows_and_a_float32_router(name):
    """Some cast the rows; of the others, both refuse them."""
    router = make_router(name)
    extra = bias_argument(type(router))
    rows = normal(1, T, D, seed=6).bfloat16()
    try:
        router(rows, *extra)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="same dtype"):
            swapped(router)(rows, *extra)
    else:
        assert_same_router(router, torch.bfloat16)


# autocast computes their logits in its dtype, and transformers multiplies gates in that dtype
ROUNDED = [
    name for name in MODULES if BY_CLASS[name].score == "sigmoid" and BY_CLASS[name].product == "float32"
]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ROUNDED])
def test_autocast_changes_both_alike(name):
    # these choose before the softmax, so that its gradient is rounded at another place
    gradients = torch.bfloat16 if name in ("AriaTextTopKRouter", "GptOssTopKRouter") else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_router(make_router(name), gradients=gradients)


@pytest.mark.parametrize("name", ROUNDED)
def test_gates_of_sigmoid_scores_stay_float32_under_autocast(name):
    """The router's own are rounded to autocast's dtype, as its logits are."""
    router, x_TD = make_router(name), normal(T, D, seed=6)
    extra = bias_argument(type(router))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_TE, gates_TK, _ = swapped(router)(x_TD, *extra)
        its_logits_TE, its_gates_TK, _ = router(x_TD, *extra)
    assert torch.equal(logits_TE, its_logits_TE)
    assert (gates_TK.dtype, its_gates_TK.dtype) == (torch.float32, torch.bfloat16)
    scale = getattr(router, BY_CLASS[name].scale)
    assert (gates_TK.sum(1) - scale).abs().max() <= 1e-6
    assert (its_gates_TK.float().sum(1) - scale).abs().max() > 1e-6


def test_every_row_of_the_table_is_tested():
    if is_at_least("5.23"):
        assert MODULES.keys() == BY_CLASS.keys()
    assert len(MODULES) >= 30


@pytest.mark.parametrize("name", ["Qwen3MoeTopKRouter", "DeepseekV3TopkRouter"])
def test_compiled_as_one_graph_for_all_lengths(name):
    router = swapped(make_router(name)).requires_grad_(False)

    def fn(x):
        logits_TE, weight_TK, expert_TK = router(x)
        return torch.zeros_like(logits_TE).scatter(1, expert_TK, weight_TK)

    assert_compiles_once(fn, lambda length: ({"x": normal(length, D)}, normal(length, E, seed=2)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch
def test_compiled_with_a_symbolic_scale():
    """`dynamic=True` makes symbols of a module's numbers too."""
    router = swapped(make_router("DeepseekV3TopkRouter"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: router(x), fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for length in (9, 12):
            x = normal(length, D)
            for actual, expected in zip(compiled(x), router(x), strict=True):
                assert torch.equal(actual, expected)


# --- whole models ---------------------------------------------------------------------------

# one of each row of the table, and one whose router is not in it
CHECKED = (
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "granitemoe",
    "deepseek_v2",
    "deepseek_v3",
    "minimax_m2",
    "hy_v3",
    "hunyuan_v1_moe",
    "ernie4_5_moe",
    "afmoe",
    "jamba",
    "phimoe",
)


def has_router_losses(model):
    if model.config.model_type == "granitemoe" and not is_at_least("5.23"):
        return False  # its own loss raises there
    return hasattr(model.config, "output_router_logits") and hasattr(model.config, "router_aux_loss_coef")


def results(model):
    """Logits, loss, gradients, and the recorded router logits with their loss where the model has them."""
    model.zero_grad()
    options = {"output_router_logits": True} if has_router_losses(model) else {}
    output = model(IDS, labels=IDS, **options)
    output.loss.backward()
    found = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    if options:
        assert output.router_logits
        found |= {f"router_logits.{i}": x.detach() for i, x in enumerate(output.router_logits)}
        found["aux_loss"] = output.aux_loss.detach()
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def routers_of(model):
    return {name: type(m) for name, m in model.named_modules() if "Router" in type(m).__name__}


@pytest.mark.parametrize("name", CHECKED)
def test_an_accelerated_model_is_the_model_and_undo_brings_it_back(name):
    model = tiny_family(name)
    before, classes, keys = results(model), routers_of(model), list(model.state_dict())
    acceleration = accelerate_model(model)

    swap = FAMILIES[name].router and not (name in ("granitemoe", "jamba") and not is_at_least("5.23"))
    assert set(acceleration.experts.values()) == {FAMILIES[name].experts}
    assert all((what == "route_topk") == swap for what in acceleration.routers.values())
    assert bool(acceleration.routers) == (name != "jamba" or is_at_least("5.23"))
    now = routers_of(model)
    assert all(issubclass(now[key], original) for key, original in classes.items())
    assert all(issubclass(kind, FusedRouter) == swap for kind in now.values())
    assert list(model.state_dict()) == keys
    after = results(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        error = (after[key] - value).abs().max()
        assert error <= 1e-5 * value.abs().max().clamp(min=1), f"{key}: {error}"

    assert acceleration.undo() is model
    assert routers_of(model) == classes
    assert model.config._experts_implementation == "eager"
    for key, value in results(model).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_shape_letters_hold(name):
    model = tiny_family(name)
    accelerate_model(model)
    with checked_shape_names("moe_runtime"):
        model(IDS).logits.sum().backward()


def test_the_losses_of_the_router_are_compared():
    assert {"router_logits.1", "aux_loss"} <= results(tiny_family("mixtral")).keys()


def test_the_report_names_every_layer():
    acceleration = moe_runtime.accelerate_model(tiny_family("phimoe"))
    assert str(acceleration).splitlines() == [
        "model.layers.0.mlp.experts: expert_ffn",
        "model.layers.0.mlp.router: unchanged: PhimoeTopKRouter",
        "model.layers.1.mlp.experts: expert_ffn",
        "model.layers.1.mlp.router: unchanged: PhimoeTopKRouter",
    ]


def fused_routers(model):
    return [name for name, kind in routers_of(model).items() if issubclass(kind, FusedRouter)]


def test_a_wrapped_model():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

    model = tiny_family("mixtral")
    acceleration = accelerate_model(Wrapper(model))
    assert acceleration.experts.keys() == {f"inner.model.layers.{i}.mlp.experts" for i in range(2)}
    acceleration.undo()
    assert model.config._experts_implementation == "eager"
    assert not fused_routers(model)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 1, 1)])
def test_two_accelerations_are_undone_in_any_order(order):
    model = tiny_family("mixtral")
    classes = routers_of(model)
    accelerations = [accelerate_model(model), accelerate_model(model)]
    assert set(accelerations[1].routers.values()) == {"route_topk"}
    for i in order:
        accelerations[i].undo()
    assert model.config._experts_implementation == "eager"
    assert routers_of(model) == classes


def test_an_implementation_that_was_chosen_since_stays():
    model = tiny_family("mixtral")
    acceleration = accelerate_model(model)
    model.set_experts_implementation("batched_mm")
    assert acceleration.undo().config._experts_implementation == "batched_mm"


def test_a_copy_gets_its_routers_back():
    model = tiny_family("mixtral")
    classes = routers_of(model)
    acceleration = accelerate_model(model)
    expected = model(IDS).logits
    other, duplicate = copy.deepcopy(model), copy.deepcopy(acceleration)
    assert torch.equal(other(IDS).logits, expected)
    assert routers_of(accelerate_model(other).undo()) == classes
    assert other.config._experts_implementation == "moe_runtime"
    assert routers_of(duplicate.undo()) == classes
    assert duplicate.model.config._experts_implementation == "eager"
    assert len(fused_routers(model)) == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # inside PEFT
def test_routers_that_peft_copies_are_undone():
    from peft import LoraConfig, get_peft_model

    model = tiny_family("mixtral")
    acceleration = accelerate_model(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    model = get_peft_model(model, config)
    assert len(fused_routers(model)) == 4
    acceleration.undo()
    assert len(routers_of(model)) == 4
    assert not fused_routers(model)


def test_groups_with_too_few_experts_are_left_to_the_router():
    """transformers fills the choice with experts of the other groups; `route_topk` refuses it."""
    model = tiny_family("deepseek_v3", n_group=4, topk_group=1, num_experts_per_tok=3)
    expected = model(IDS).logits
    routers = accelerate_model(model).routers
    assert set(routers.values()) == {"unchanged: DeepseekV3TopkRouter"}
    assert (model(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_accelerated_model_is_saved_as_the_model(tmp_path):
    model = tiny_family("qwen3_moe")
    expected = model(IDS).logits
    accelerate_model(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(loaded(IDS).logits, expected)


def test_a_router_of_another_project_with_a_known_name_is_left_alone():
    class MixtralTopKRouter(nn.Module):
        pass

    model = tiny_family("mixtral")
    model.model.layers[0].mlp.gate.__class__ = MixtralTopKRouter
    routers = accelerate_model(model).routers
    assert routers["model.layers.0.mlp.gate"] == "unchanged: MixtralTopKRouter"
    assert routers["model.layers.1.mlp.gate"] == "route_topk"


@pytest.mark.parametrize(("model", "kind"), [(None, "NoneType"), ("mixtral", "str")])
def test_what_is_no_model_is_refused(model, kind):
    with pytest.raises(ValueError, match=f"model must be a torch.nn.Module, got {kind}"):
        accelerate_model(model)


def test_a_model_without_experts_is_refused():
    message = "model must have experts on transformers' experts interface, such as Mixtral or Qwen3-MoE; "
    with pytest.raises(ValueError, match=message + "MoeRuntimeForCausalLM has none"):
        accelerate_model(tiny_model())


def test_experts_that_no_kernel_can_run_are_refused_and_nothing_is_changed():
    model = tiny_family("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    message = (
        "model must have experts that the kernels can run, but of model.layers.1.mlp.experts, its down_proj"
    )
    with pytest.raises(ValueError, match=message + " is float8_e4m3fn, which no kernel takes"):
        accelerate_model(model)
    assert model.config._experts_implementation == "eager"
    assert not fused_routers(model)


def test_the_function_is_found_where_the_name_is_used():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    accelerate_model(tiny_family("mixtral"))
    assert ALL_EXPERTS_FUNCTIONS["moe_runtime"] is experts_forward
