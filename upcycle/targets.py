"""config.json of each output format, and the proof that the format can say what the output computes.

Nothing is decided by a list of family pairs: the file that would be written is read back by
`families.model_config` and must describe the very model that was asked for. The first field that differs is
the reason for a refusal.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from moe_runtime.config import ModelConfig
from moe_runtime.families import model_config
from upcycle.errors import RecipeError
from upcycle.recipe import Recipe
from upcycle.tasks import ITEM_SIZE

# Width of the shared expert of zeros that the Qwen2-MoE format demands: a multiple of what kernels tile by.
EMPTY_SHARED_WIDTH = 64

# What a row of every matrix that PyTorch's grouped_mm reads has to be a multiple of.
_GROUPED_MM_ROW_BYTES = 16

# Fields that change training or nothing at all, but never the function; a format may lack them.
_NOT_THE_FUNCTION = (
    "expert_dropout",
    "recompute_experts",
    "experts_backend",
    "router_balance_over",
    "router_aux_only",
    "router_aux_loss_coef",
)

# Where several fields differ, these say best why.
_TELLING = ("num_attention_experts", "block", "qk_norm", "moe_layers")

# Keys of a source's config.json that mean the same in every format.
_CARRIED_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "use_cache",
)

# Native formats first: where one of them works, other programs can read the output.
TARGETS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "moe_runtime")


def target_config_json(
    recipe: Recipe, model: ModelConfig, base: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """The config.json of the output in the recipe's format.

    Args:
        model: the output.
        base: config.json of the base source, for token ids and the like.
        dtype: of the weights, as torch names it.

    Raises:
        RecipeError: the format cannot express the output; says why, and the nearest format that can.
    """
    reason = _mismatch(recipe.target, model)
    if reason is None:
        carried = {key: base[key] for key in _CARRIED_KEYS if key in base}
        return {**_FORMATS[recipe.target](model), **carried, "dtype": dtype}
    nearest = next(target for target in TARGETS if _mismatch(target, model) is None)
    raise RecipeError(f"target {recipe.target!r} cannot hold this model: {reason}; use target {nearest!r}")


def eager_experts_note(target: str, model: ModelConfig, dtype: str) -> str | None:
    """What to say of experts that transformers' default implementation refuses, or None.

    Args:
        model: the output.
        dtype: of the weights, as safetensors headers name it.
    """
    widths = (model.hidden_size, model.moe_intermediate_size)
    refused = [width for width in widths if width * ITEM_SIZE[dtype] % _GROUPED_MM_ROW_BYTES]
    if target == "moe_runtime" or not refused:
        return None
    return (
        f"transformers' default for experts, grouped_mm, refuses rows of {refused[0]} numbers in {dtype}, "
        f"which are no multiple of {_GROUPED_MM_ROW_BYTES} bytes; load this model with "
        'experts_implementation="eager".'
    )


def _mismatch(target: str, model: ModelConfig) -> str | None:
    """Why the format cannot express the model, or None."""
    if target == "moe_runtime":
        return None
    written = model_config(_FORMATS[target](model))
    if target == "qwen2_moe":  # any shared expert, with a gate or with one that is made up for
        shared = model.shared_expert_intermediate_size
        written = replace(
            written, shared_expert_intermediate_size=shared, shared_expert_gate=model.shared_expert_gate
        )
    if model.moe_layers is None:  # no layer has the dense width
        written = replace(written, intermediate_size=model.intermediate_size)
    names = [field.name for field in fields(ModelConfig) if field.name not in _NOT_THE_FUNCTION]
    for name in (*_TELLING, *names):
        wanted, got = getattr(model, name), getattr(written, name)
        if wanted != got:
            return f"{name} would be {got!r} instead of {wanted!r}"
    return None


# --- what each format says ---


def _moe_runtime(model: ModelConfig) -> dict[str, Any]:
    return {"architectures": ["MoeRuntimeForCausalLM"], "model_type": "moe_runtime", **model.to_dict()}


def _shared_keys(model: ModelConfig) -> dict[str, Any]:
    rope = model.rope_parameters
    activations = {"gelu_tanh": "gelu_pytorch_tanh"}
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": activations.get(model.hidden_act, model.hidden_act),
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        # Both styles: readers written for transformers 4 know the second and third key only.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "num_experts_per_tok": model.num_experts_per_tok,
        "router_aux_loss_coef": model.router_aux_loss_coef,
        "output_router_logits": False,
    }


def _mixtral(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_shared_keys(model),
        "intermediate_size": model.moe_intermediate_size,
        "num_local_experts": model.num_experts,
        "sliding_window": model.sliding_window,
    }


def _qwen_keys(model: ModelConfig) -> dict[str, Any]:
    moe_layers = range(model.num_hidden_layers) if model.moe_layers is None else model.moe_layers
    return {
        **_shared_keys(model),
        "num_experts": model.num_experts,
        "moe_intermediate_size": model.moe_intermediate_size,
        "norm_topk_prob": model.router_gate == "renorm",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n in range(model.num_hidden_layers) if n not in moe_layers],
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
    }


def _qwen2_moe(model: ModelConfig) -> dict[str, Any]:
    every_layer = "full_attention" if model.sliding_window is None else "sliding_attention"
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **_qwen_keys(model),
        "qkv_bias": model.attention_bias,
        "shared_expert_intermediate_size": model.shared_expert_intermediate_size or EMPTY_SHARED_WIDTH,
        "layer_types": list(model.layer_types or [every_layer] * model.num_hidden_layers),
    }


def _qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_qwen_keys(model),
        "attention_bias": model.attention_bias,
    }


def _olmoe(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **_shared_keys(model),
        "intermediate_size": model.moe_intermediate_size,
        "num_experts": model.num_experts,
        "norm_topk_prob": model.router_gate == "renorm",
        "attention_bias": model.attention_bias,
    }


def _flex_olmo(model: ModelConfig) -> dict[str, Any]:
    return {**_olmoe(model), "architectures": ["FlexOlmoForCausalLM"], "model_type": "flex_olmo"}


def _granitemoe(model: ModelConfig) -> dict[str, Any]:
    scale = model.head_dim**-0.5 if model.attention_multiplier is None else model.attention_multiplier
    return {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        **_shared_keys(model),
        "intermediate_size": model.moe_intermediate_size,
        "num_local_experts": model.num_experts,
        "attention_bias": model.attention_bias,
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": scale,
        "logits_scaling": 1.0 / model.logit_scale,
    }


_FORMATS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "moe_runtime": _moe_runtime,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "flex_olmo": _flex_olmo,
    "granitemoe": _granitemoe,
}
