"""What is trained, and how fast: parts of a model, freezing modes, parameter groups of the optimizer.

Every parameter is of one part: `gate` (routers, and the gate of a shared expert), `experts` (routed and
shared experts, and adapters of them) or `rest`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from moe_runtime.errors import RunError
from moe_runtime.stats.layers import routed_layers

from .recipe import Freeze, TrainSection

Part = Literal["gate", "experts", "rest"]
FROZEN: dict[Freeze, tuple[Part, ...]] = {
    "none": (),
    "gate": ("gate",),
    "experts": ("experts",),
    "moe": ("gate", "experts"),
    "non_expert": ("gate", "rest"),
}
SHARED_GATE = "shared_expert_gate"
SHARED = ("shared_expert", "shared_experts", "shared_mlp")


def parts(model: nn.Module) -> dict[str, Part]:
    """The part of every parameter by its name. A model without routers is all `rest`."""
    gates, experts = set(), set()
    if has_routers(model):
        for layer in routed_layers(model):
            gates |= {id(p) for p in layer.router.parameters()}
            if layer.kind == "feed_forward":
                experts |= {id(p) for p in layer.block.get_submodule("experts").parameters()}
    result: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        modules = name.split(".")
        if id(parameter) in gates or SHARED_GATE in modules:
            result[name] = "gate"
        elif id(parameter) in experts or any(shared in modules for shared in SHARED):
            result[name] = "experts"
        else:
            result[name] = "rest"
    return result


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters of each part, and how many of them are trained."""
    of_parameter = parts(model)
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = counts.setdefault(of_parameter[name], {"all": 0, "trained": 0})
        part["all"] += parameter.numel()
        part["trained"] += parameter.numel() * parameter.requires_grad
    return counts


def has_routers(model: nn.Module) -> bool:
    try:
        return bool(routed_layers(model))
    except ValueError:
        return False


def freeze(model: nn.Module, mode: Freeze) -> None:
    """Switch off the gradients of the parts that `mode` names; no parameter is switched on.

    Raises:
        RunError: nothing would be left to train.
    """
    of_parameter = parts(model)
    for name, parameter in model.named_parameters():
        if of_parameter[name] in FROZEN[mode]:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RunError(f"train.freeze must leave something to train, got {mode!r}, which freezes everything")


def parameter_groups(model: nn.Module, section: TrainSection) -> list[dict[str, Any]]:
    """Groups for the optimizer: each part has its learning rate, matrices their decay; the rest comes first.

    What is stacked over experts counts as what each expert has: a matrix decays, a bias does not.
    """
    rates: Mapping[Part, float] = {
        "rest": section.learning_rate,
        "gate": section.router_learning_rate or section.learning_rate,
        "experts": section.expert_learning_rate or section.learning_rate,
    }
    of_parameter = parts(model)
    groups = []
    for part, rate in rates.items():
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and of_parameter[name] == part
        }
        decays = {name for name, parameter in trained.items() if parameter.dim() > 1 and not _is_bias(name)}
        for names, decay in ((decays, section.weight_decay), (trained.keys() - decays, 0.0)):
            members = [parameter for name, parameter in trained.items() if name in names]
            if members:
                groups.append({"params": members, "lr": rate, "weight_decay": decay})
    return groups


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")
