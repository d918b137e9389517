"""The model of a run: loaded, set up as the recipe says, and refused where it cannot be trained so."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from moe_runtime.errors import RunError
from moe_runtime.hf import MoeRuntimeForCausalLM
from moe_runtime.hf.accelerate import accelerate_model, is_experts
from moe_runtime.hf.document_attention import attend_by_document
from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.hf.lora import CONFIG_NAME, add_expert_lora, load_expert_lora
from moe_runtime.optional import installed
from moe_runtime.publishing import MODEL_TYPE
from moe_runtime.routers import TopKRouter
from moe_runtime.stats.layers import routed_layers

from . import checkpoints
from .data.apart import keeps_samples_apart
from .freeze import count_parameters, freeze, has_routers
from .linear_loss import linear_loss_obstacle, use_linear_loss
from .recipe import MoeSection, TrainRecipe, TrainSection
from .selection_bias import selection_bias

SAID = "said_before_training"  # attribute of a model of transformers: options that training changed


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained."""

    model: Any
    linear_loss: str | None  # why logits of all tokens are made; None: they are not
    parameters: dict[str, dict[str, int]]  # as `count_parameters` gives them


def prepare_model(recipe: TrainRecipe, checkpoint: Path | None = None) -> Prepared:
    """Load the model in float32, or of a run that goes on that of its checkpoint, with adapters and all.

    Raises:
        RunError: the recipe asks for what this model has not, or for routers that would not be trained.
    """
    set_seed(recipe.seed)  # adapters are random
    # a checkpoint of adapters, or of a model in shards, has no config.json
    whole = checkpoint is not None and (checkpoint / "config.json").is_file()
    folder = checkpoint if whole and checkpoint else recipe.model
    attention = attention_of(recipe, torch.cuda.is_available(), installed("flash_attn") is not None)
    model: Any = load_causal_lm(folder, dtype=torch.float32, attention=attention)
    prepared = set_up_model(model, recipe, checkpoint)
    if recipe.data.packing and attention is None:  # flash attention is told the ends, and runs on no CPU
        check_packing(model, recipe)
    return prepared


def check_packing(model: Any, recipe: TrainRecipe) -> None:
    """Refuse packed rows whose samples the model would not keep apart."""
    if not keeps_samples_apart(model, recipe.train.batch_size * recipe.data.max_length):
        raise RunError(
            f"data.packing must be false for {type(model).__name__}, whose attention does not keep packed "
            "samples apart"
        )


def attention_of(recipe: TrainRecipe, on_gpu: bool, has_flash: bool) -> str | None:
    """transformers' name of the attention for packed rows; None leaves the choice to transformers.

    Flash attention knows where documents end and takes products of half precision only.
    """
    wanted = recipe.data.packing and recipe.train.precision == "bfloat16"
    return "flash_attention_2" if wanted and on_gpu and has_flash else None


def set_up_model(model: Any, recipe: TrainRecipe, checkpoint: Path | None = None) -> Prepared:
    """Give a loaded model the recipe's options, or refuse them."""
    section = recipe.train
    check_recipe(model, recipe)
    if isinstance(model, MoeRuntimeForCausalLM):
        _set_options(model, recipe)
    elif any(is_experts(module) for module in model.modules()):
        accelerate_model(model)
        if hasattr(model.config, "output_router_logits"):
            # the trainer has the auxiliary losses; a saved configuration says what this one did
            setattr(model, SAID, {"output_router_logits": model.config.output_router_logits})
            model.config.output_router_logits = False
    if recipe.data.packing and not torch.cuda.is_available():
        attend_by_document(model)
    obstacle = linear_loss_obstacle(model)
    if obstacle is None:
        use_linear_loss(model)
    if section.lora is not None and checkpoint is not None and (checkpoint / CONFIG_NAME).is_file():
        checkpoints.check_same_base(checkpoint, recipe.model)
        load_expert_lora(model, checkpoint)
    elif section.lora is not None:
        lora = section.lora
        try:
            add_expert_lora(model, lora.rank, lora.alpha, lora.targets, target_modules=lora.target_modules)
        except ValueError as error:  # PEFT's own among them
            raise RunError(f"train.lora does not fit the model: {error}") from error
    freeze(model, section.freeze)
    check_routers(model, recipe.moe or MoeSection())
    if section.gradient_checkpointing:
        _checkpoint_gradients(model)
    parameters = count_parameters(model)
    check_rates(parameters, section)
    return Prepared(model, obstacle, parameters)


def check_recipe(model: nn.Module, recipe: TrainRecipe) -> None:
    """Refuse options that this model has not."""
    section, moe = recipe.train, recipe.moe
    ours = isinstance(model, MoeRuntimeForCausalLM)
    name = type(model).__name__
    if not has_feed_forward_routers(model):
        asked = {
            "moe": moe is not None,
            "train.lora": section.lora is not None,
            "train.freeze": section.freeze != "none",
            "train.router_learning_rate": section.router_learning_rate is not None,
            "train.expert_learning_rate": section.expert_learning_rate is not None,
            "train.recompute_experts": section.recompute_experts,
        }
        for key, is_asked in asked.items():
            if is_asked:
                raise RunError(f"{key} must be left out for a model without experts, and {name} has none")
    if ours or moe is None:
        options = {"train.recompute_experts": section.recompute_experts and not ours}
    else:
        options = {
            "train.recompute_experts": section.recompute_experts,
            "moe.expert_dropout": bool(moe.expert_dropout),
            "moe.gate": moe.gate is not None,
        }
    for key, is_asked in options.items():
        if is_asked:
            raise RunError(f"{key} must be left out for models of transformers, got one for {name}")


def has_feed_forward_routers(model: nn.Module) -> bool:
    return has_routers(model) and any(layer.kind == "feed_forward" for layer in routed_layers(model))


def check_routers(model: nn.Module, moe: MoeSection) -> None:
    """Refuse gates that are constant, and biases that are not there."""
    if not has_feed_forward_routers(model):
        return
    for layer in routed_layers(model):
        if layer.kind != "feed_forward":
            continue
        router: Any = layer.router
        if _gate_is_constant(router) and any(p.requires_grad for p in router.parameters()):
            raise RunError(
                f"moe.gate must not be 'renorm' with one expert per token, as {layer.name} has it: the gate "
                "is always 1 and the loss never reaches the router; use gate: straight_through or raw, or "
                "freeze: gate"
            )
        if moe.bias_update and selection_bias(router) is None:
            raise RunError(
                f"moe.bias_update must be 0 where routers have no selection bias, and {layer.name} "
                f"({type(router).__name__}) has none, got {moe.bias_update}"
            )
        if moe.bias_update and not any(p.requires_grad for p in router.parameters()):
            raise RunError(
                "moe.bias_update must be 0 where train.freeze leaves routers as they are, got "
                f"{moe.bias_update}"
            )


def check_rates(parameters: Mapping[str, Mapping[str, int]], section: TrainSection) -> None:
    """Refuse learning rates of parts of which nothing is trained."""
    rates = {"router": section.router_learning_rate, "expert": section.expert_learning_rate}
    for name, part in (("router", "gate"), ("expert", "experts")):
        if rates[name] is not None and not parameters.get(part, {}).get("trained"):
            raise RunError(
                f"train.{name}_learning_rate must be left out where no {name} is trained, got {rates[name]}"
            )


def save_whole(model: Any, folder: str | Path, moe: MoeSection) -> None:
    """`save_pretrained`, with what the configuration says of auxiliary losses outside of this trainer: in
    ours the factors of the recipe, in one of transformers what it said before.
    """
    config = model.config
    said = {"router_aux_loss_coef": moe.balance_loss, "router_z_loss_coef": moe.z_loss}
    if config.model_type != MODEL_TYPE:
        said = getattr(model, SAID, {})
    while_training = {name: getattr(config, name) for name in said}
    for name, value in said.items():
        setattr(config, name, value)
    try:
        model.save_pretrained(folder)
    finally:
        for name, value in while_training.items():
            setattr(config, name, value)


def _gate_is_constant(router: Any) -> bool:
    if isinstance(router, TopKRouter):
        config = router.config
        return config.experts_per_token == 1 and config.gate == "renorm" and not config.aux_only
    family = getattr(router, "router_family", None)
    if family is None or router.top_k != 1:
        return False
    return family.gate == "renorm" or (family.gate == "norm_topk_prob" and bool(router.norm_topk_prob))


def _set_options(model: Any, recipe: TrainRecipe) -> None:
    """Options of our model, in its configuration and in its layers; the trainer has the auxiliary losses."""
    config, moe = model.config, recipe.moe or MoeSection()
    config.router_aux_loss_coef = config.router_z_loss_coef = 0.0
    config.recompute_experts = recipe.train.recompute_experts
    if moe.expert_dropout is not None:
        config.expert_dropout = moe.expert_dropout
    if moe.gate is not None:
        config.router_gate = moe.gate
    if moe.bias_update:
        config.router_selection_bias = True
    described = config.model_config()  # checks what goes together
    for number, layer in enumerate(model.model.layers):
        if not described.is_moe_layer(number):
            continue
        of_layer = described.feed_forward_config(number)
        layer.mlp.config = layer.mlp.experts.config = of_layer
        router = layer.mlp.router
        router.config = of_layer.router
        if of_layer.router.selection_bias and router.selection_bias is None:
            router.selection_bias = torch.zeros(of_layer.router.num_experts)


def _checkpoint_gradients(model: Any) -> None:
    """Not reentrant: what routers did in forward stays part of the graph."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
