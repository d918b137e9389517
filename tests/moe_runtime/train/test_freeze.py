"""Parts of models, what a freezing mode leaves without a gradient, and the learning rates of the rest."""

import pytest
from moe_families import tiny_family
from tiny_models import BAM, DENSE, tiny_model

from moe_runtime.errors import RunError
from moe_runtime.train.freeze import FROZEN, freeze, parameter_groups, parts
from moe_runtime.train.recipe import TrainSection

MODELS = {
    "ours": lambda: tiny_model(shared_expert_intermediate_size=8, shared_expert_gate=True),
    "bam": lambda: tiny_model(BAM),
    "mixtral": lambda: tiny_family("mixtral"),
    "qwen2_moe": lambda: tiny_family("qwen2_moe"),
    "deepseek_v3": lambda: tiny_family("deepseek_v3"),
}
# ends of the names of one layer's parameters
GATE = {
    "ours": ("mlp.router.weight", "mlp.shared_expert_gate.weight"),
    "bam": ("mlp.router.weight", "self_attn.router.weight"),
    "mixtral": ("mlp.gate.weight",),
    "qwen2_moe": ("mlp.gate.weight", "mlp.shared_expert_gate.weight"),
    "deepseek_v3": ("mlp.gate.weight",),
}
STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SHARED = tuple(f"{name}_proj.weight" for name in ("gate", "up", "down"))
EXPERTS = {
    "ours": (*STACKED, *(f"mlp.shared_expert.{name}" for name in SHARED)),
    "bam": STACKED,
    "mixtral": STACKED,
    "qwen2_moe": (*STACKED, *(f"mlp.shared_expert.{name}" for name in SHARED)),
    "deepseek_v3": (*STACKED, *(f"mlp.shared_experts.{name}" for name in SHARED)),
}


def named(kind, *of):
    return {f"model.layers.{layer}.{name}" for layer in range(2) for names in of for name in names[kind]}


@pytest.mark.parametrize("kind", MODELS)
def test_each_mode_freezes_exactly_the_parameters_that_it_names(kind):
    gate, experts = named(kind, GATE), named(kind, EXPERTS)
    everything = {name for name, _ in MODELS[kind]().named_parameters()}
    assert gate | experts < everything
    expected = {
        "none": set(),
        "gate": gate,
        "experts": experts,
        "moe": gate | experts,
        "non_expert": everything - experts,
    }
    assert expected.keys() == FROZEN.keys()
    for mode, frozen in expected.items():
        model = MODELS[kind]()
        freeze(model, mode)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen, mode


def test_freezing_switches_nothing_on():
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    freeze(model, "gate")
    assert not model.lm_head.weight.requires_grad


def test_freezing_everything_is_refused():
    with pytest.raises(RunError, match=r"^train.freeze must leave something to train, got 'non_expert'"):
        freeze(tiny_model(DENSE), "non_expert")


def test_groups_have_the_rate_of_their_part_and_decay_for_matrices_only():
    model = tiny_model(mlp_bias=True)
    freeze(model, "none")
    section = TrainSection(
        steps=1, learning_rate=1.0, router_learning_rate=2.0, expert_learning_rate=3.0, weight_decay=0.5
    )
    groups = parameter_groups(model, section)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    rates = {"rest": 1.0, "gate": 2.0, "experts": 3.0}
    of_parameter = parts(model)
    for name, parameter in model.named_parameters():
        # stacked over experts, a bias has two axes and is still one
        is_matrix = parameter.dim() > 1 and not name.endswith("_bias")
        assert found[id(parameter)] == (rates[of_parameter[name]], 0.5 if is_matrix else 0.0), name
    assert groups[0]["lr"] == 1.0  # the rate that is logged


def test_frozen_parameters_are_in_no_group():
    model = tiny_model()
    freeze(model, "moe")
    groups = parameter_groups(model, TrainSection(steps=1))
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
