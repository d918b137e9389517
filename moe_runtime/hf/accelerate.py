"""accelerate_model: experts and routers of a transformers MoE model on this project's kernels, with undo.

Experts change by the name of their implementation, routers by their class: the new one is a subclass with the
same parameters, whose forward computes the same logits and leaves the choice and the gates to `route_topk`.
isinstance, hooks, recorded router logits, auxiliary losses and state dicts stay as they are.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as functional
import transformers
from moe_runtime_kernels import route_topk
from packaging.version import Version
from torch import Tensor, nn

from moe_runtime.hf.experts_interface import NAME, obstacle, register, served_by


@dataclass(frozen=True, kw_only=True)
class RouterFamily:
    """How routers of one family make logits and gates; names are those of attributes of the router.

    All return (logits, gates, indices). `since` is the transformers version from which that is the order.
    """

    classes: tuple[str, ...]
    # the submodule that computes the logits; without one the router holds weight (and bias) itself
    linear: str | None = None
    # the products run in the dtype of the "input", of the "weight", in "float32" unless
    # autocast has another, or in "float32_always"
    product: str = "input"
    score: str = "softmax"
    # "renorm", "raw", or "norm_topk_prob", which decides between the two
    gate: str = "renorm"
    # logits are returned in the dtype of the product, or in float32
    float_logits: bool = False
    # gates are returned in float32, or in the dtype of the logits or the input
    gates_in: str = "float32"
    scale: str | None = None
    # what is added to the scores for the choice; without one the caller may pass it as a second argument
    selection_bias: str | None = None
    grouped: bool = False
    group_score: str = "top2_sum"
    since: str = "5.17"


SOFTMAX = (
    "FlexOlmoTopKRouter",
    "MellumTopKRouter",
    "OlmoeTopKRouter",
    "Qwen2MoeTopKRouter",
    "Qwen3MoeTopKRouter",
    "Qwen3NextTopKRouter",
    "Qwen3OmniMoeTalkerTextTopKRouter",
    "Qwen3OmniMoeThinkerTextTopKRouter",
    "Qwen4ExpTextTopKRouter",
)
SIGMOID_GROUPS = (
    "AXK1TopkRouter",
    "BailingHybridTopkRouter",
    "DeepseekV32TopkRouter",
    "DeepseekV3TopkRouter",
    "Dots1TopkRouter",
    "Dots3NoteTextTopkRouter",
    "ExaoneMoeTopkRouter",
    "Glm4MoeLiteTopkRouter",
    "Glm4MoeTopkRouter",
    "Glm4vMoeTextTopkRouter",
    "Glm5NextTextTopkRouter",
    "GlmMoeDsaTopkRouter",
    "HYV4TopkRouter",
    "KimiLinearTopkRouter",
    "MiMoV2FlashTopkRouter",
    "NemotronHTopkRouter",
    "SolarOpenTopkRouter",
)
GRANITE = (
    "GraniteMoeHybridTopKRouter",
    "GraniteMoeSWATopKRouter",
    "GraniteMoeSharedTopKRouter",
    "GraniteMoeTopKRouter",
)
FAMILIES = (
    RouterFamily(classes=("MiniMaxTopKRouter", "MixtralTopKRouter")),
    RouterFamily(classes=SOFTMAX, gate="norm_topk_prob", gates_in="logits"),
    RouterFamily(
        classes=("Qwen3OmniMoeTextTopKRouter", "Qwen3VLMoeTextTopKRouter", "Qwen3_5MoeTopKRouter"),
        gates_in="logits",
    ),
    RouterFamily(classes=("JambaTopKRouter",), gate="raw", gates_in="input"),
    # a softmax over the chosen logits is the renormalised softmax over all
    RouterFamily(classes=("AriaTextTopKRouter", "GptOssTopKRouter"), gates_in="logits"),
    RouterFamily(classes=GRANITE, float_logits=True, gates_in="input", since="5.23"),
    RouterFamily(
        classes=("Ernie4_5_MoeTopKRouter", "Ernie4_5_VLMoeMoeTopKRouter"),
        product="float32_always",
        gates_in="input",
        selection_bias="moe_statics.e_score_correction_bias",
    ),
    RouterFamily(
        classes=("DeepseekOcr2TextTopkRouter", "DeepseekV2TopkRouter", "UnlimitedOcrTextTopkRouter"),
        product="float32",
        gate="raw",
        scale="routed_scaling_factor",
        grouped=True,
        group_score="max",
    ),
    RouterFamily(
        classes=SIGMOID_GROUPS,
        product="float32",
        score="sigmoid",
        gate="norm_topk_prob",
        scale="routed_scaling_factor",
        selection_bias="e_score_correction_bias",
        grouped=True,
    ),
    RouterFamily(
        classes=("FlintTopKRouter",), product="float32_always", score="sigmoid", gate="norm_topk_prob"
    ),
    RouterFamily(
        classes=("MiniMaxM3VLTopKRouter",),
        product="weight",
        score="sigmoid",
        selection_bias="e_score_correction_bias",
    ),
    RouterFamily(classes=("MiniMaxM2TopKRouter",), product="weight", score="sigmoid"),
    RouterFamily(
        classes=("AfmoeTokenChoiceRouter",),
        linear="gate",
        score="sigmoid",
        float_logits=True,
        scale="route_scale",
    ),
    RouterFamily(classes=("HunYuanMoEV1Gate",), linear="wg", product="weight", gates_in="logits"),
    RouterFamily(
        classes=("Dots3NoteVisionTopKRouter", "HYV3TopKRouter"),
        product="float32",
        score="sigmoid",
        scale="router_scaling_factor",
    ),
)
BY_CLASS = {name: family for family in FAMILIES for name in family.classes}


@dataclass
class Acceleration:
    """What `accelerate_model` changed, and the way back."""

    model: nn.Module
    experts: dict[str, str] = field(default_factory=dict)
    """Name of each experts module: "expert_ffn" or "grouped_gemm", as `served_by` says."""
    routers: dict[str, str] = field(default_factory=dict)
    """Name of each router: "route_topk", or "unchanged: " and its class."""
    _implementations: list[tuple[Any, str | None]] = field(default_factory=list, repr=False)

    def undo(self) -> nn.Module:
        """Give every router of the model its class back, and experts the implementation they had.

        Routers that were swapped before this call, or copied since, are among them. An implementation that
        was "moe_runtime" before, or was set to another one since, stays. Repeating it is harmless.

        Returns:
            The model.
        """
        for module in self.model.modules():
            original = vars(type(module)).get("router_class")
            if original is not None:
                module.__class__ = original
        for config, implementation in self._implementations:
            if config._experts_implementation_internal == NAME:
                config._experts_implementation_internal = implementation
        return self.model

    def __str__(self) -> str:
        return "\n".join(f"{name}: {what}" for name, what in sorted((self.experts | self.routers).items()))


def accelerate_model(model: nn.Module) -> Acceleration:
    """Experts as `experts_implementation="moe_runtime"` and routers as `route_topk`, in place.

    Routers whose arithmetic is not in the table of this file are left alone and reported.

    Args:
        model: of transformers, or a module that holds one, such as a PEFT model.

    Returns:
        Acceleration: `experts` and `routers` say what each module runs on, `undo()` takes it back.

    Raises:
        ValueError: the model is no module, has no experts on transformers' interface, or some that no kernel
            can run.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    register()
    result = Acceleration(model)
    modules = dict(model.named_modules())
    experts = {name: module for name, module in modules.items() if is_experts(module)}
    if not experts:
        raise ValueError(
            "model must have experts on transformers' experts interface, such as Mixtral or Qwen3-MoE; "
            f"{type(model).__name__} has none"
        )
    for name, module in experts.items():
        if (reason := obstacle(module)) is not None:
            raise ValueError(f"model must have experts that the kernels can run, but of {name}, {reason}")
        result.experts[name] = served_by(module)
    for config in _configs(model):
        result._implementations.append((config, config._experts_implementation_internal))
        config._experts_implementation_internal = NAME
    for name, module in modules.items():
        if "Router" in type(module).__name__ or type(module).__name__ in BY_CLASS:
            result.routers[name] = _swap(module)
    return result


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration in the model that names an implementation, once."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if hasattr(c, "_experts_implementation_internal")}.values())


def is_experts(module: nn.Module) -> bool:
    """Whether it is an experts module of transformers' interface, which writes these attributes into it."""
    return vars(module).keys() >= {"config", "has_gate", "has_bias", "is_transposed", "is_concatenated"}


def _swap(router: nn.Module) -> str:
    original: Any = type(router)
    if issubclass(original, FusedRouter):
        return "route_topk"
    family = BY_CLASS.get(original.__name__)
    of_transformers = original.__module__.startswith("transformers.models.")
    if (
        family is None
        or not of_transformers
        or Version(transformers.__version__).release < Version(family.since).release
        or not _groups_suffice(router, family)
    ):
        return f"unchanged: {original.__name__}"
    router.__class__ = fused_class(original)
    return "route_topk"


class FusedRouter:
    """What all swapped routers have in common, in front of their own class."""

    router_family: RouterFamily
    router_class: type  # its own class

    def forward(
        self: Any, hidden_states: Tensor, selection_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, gates, indices) of the router's own forward; equal scores go to the lowest index."""
        family = self.router_family
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = _logits(self, x_TD, family)
        if family.selection_bias is not None:
            selection_bias = _attribute(self, family.selection_bias).flatten()
        gate = family.gate
        if gate == "norm_topk_prob":
            gate = "renorm" if self.norm_topk_prob else "raw"
        groups = _groups(self, family)
        route = route_topk(
            logits_TE,
            self.top_k,
            score=family.score,
            gate=gate,
            scale=1.0 if family.scale is None else float(getattr(self, family.scale)),
            bias_E=selection_bias,
            num_groups=groups[0],
            groups_kept=groups[1],
            group_score=family.group_score,
            statistics=False,
        )
        dtypes = {"float32": torch.float32, "logits": logits_TE.dtype, "input": hidden_states.dtype}
        return logits_TE, route.weight_TK.to(dtypes[family.gates_in]), route.expert_TK.long()


@cache
def fused_class(original: type) -> type:
    """The subclass of a router's class that computes the same on `route_topk`; always the same one."""
    family = BY_CLASS[original.__name__]
    attributes = {"router_family": family, "router_class": original}
    return type(f"Fused{original.__name__}", (FusedRouter, original), attributes)


def _logits(router: Any, x_TD: Tensor, family: RouterFamily) -> Tensor:
    if family.product == "float32_always":
        with torch.autocast(x_TD.device.type, enabled=False):
            return functional.linear(x_TD.float(), router.weight.float())
    if family.product == "float32":
        return functional.linear(x_TD.float(), router.weight.float())
    linear = None if family.linear is None else getattr(router, family.linear)
    if family.product == "weight":
        x_TD = x_TD.to((linear or router).weight.dtype)
    if linear is not None:
        logits_TE = linear(x_TD)
    else:
        logits_TE = functional.linear(x_TD, router.weight, getattr(router, "bias", None))
    return logits_TE.float() if family.float_logits else logits_TE


def _groups(router: Any, family: RouterFamily) -> tuple[int, int]:
    """How many groups there are, and how many of them are chosen from."""
    if not family.grouped or getattr(router, "topk_method", None) == "greedy":
        return 1, 1
    return router.num_group, router.topk_group


def _groups_suffice(router: Any, family: RouterFamily) -> bool:
    """Whether the groups chosen from hold K experts, which `route_topk` asks for."""
    if not family.grouped:
        return True
    groups, kept = _groups(router, family)
    return kept * (router.weight.shape[0] // groups) >= router.top_k


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
