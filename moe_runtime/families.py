"""What a config.json of a known model family means, as a `ModelConfig`. Needs neither torch nor transformers.

Reads the files of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). Keys that a file
leaves out have the default of the family's own configuration class; sizes have none: every writer has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from moe_runtime import family_keys as of
from moe_runtime.config import MOST_LAYERS, ModelConfig
from moe_runtime.family_keys import required

_COMMON_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,  # None: as many as query heads
    "head_dim": None,  # None: hidden_size / num_attention_heads
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_QWEN_DEFAULTS: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_SPARSE_DEFAULTS: dict[str, Any] = {
    "router_aux_loss_coef": 0.001,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
_GRANITE_DEFAULTS: dict[str, Any] = {
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "max_position_embeddings": 2048,
}
_GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

# What the keys that are read here must hold. The families' own classes refuse the same.
_KINDS: dict[str, tuple[type | tuple[type, ...], tuple[str, ...]]] = {
    "a whole number": (
        int,
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "sliding_window",
            "max_window_layers",
            "num_experts",
            "num_local_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "decoder_sparse_step",
            "rotary_dim",
            "sliding_window_pattern",
            "num_ln_in_parallel_attn",
        ),
    ),
    "a number": (
        (int, float),
        (
            "rms_norm_eps",
            "layer_norm_eps",
            "rope_theta",
            "rope_local_base_freq",
            "partial_rotary_factor",
            "logit_scale",
            "logits_scaling",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "router_aux_loss_coef",
        ),
    ),
    "true or false": (
        bool,
        (
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "qkv_bias",
            "use_qk_norm",
            "use_sliding_window",
            "norm_topk_prob",
            "use_bias",
            "use_parallel_residual",
            "bias",
            "multi_query",
            "parallel_attn",
            "new_decoder_architecture",
        ),
    ),
    "a text": (str, ("hidden_act",)),
    "a list": (list, ("layer_types", "mlp_only_layers")),
    "an object": (Mapping, ("rope_parameters", "rope_scaling")),
}
_MAY_BE_NULL = (
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_ln_in_parallel_attn",
    "original_max_position_embeddings",
    "sliding_window",
    "layer_types",
    "mlp_only_layers",
    "rope_parameters",
    "rope_scaling",
)

# By which something is divided.
_ABOVE_ZERO = (
    "hidden_size",
    "num_attention_heads",
    "decoder_sparse_step",
    "sliding_window_pattern",
    "logits_scaling",
    "query_pre_attn_scalar",
)

# Rotary types that transformers can initialise.
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

# Rotary types whose scaling refers to the length the model was first trained on.
_LENGTH_SCALED_ROPE = ("llama3", "yarn", "longrope")


# --- the table ---

_DENSE: dict[str, of.Family] = {
    "llama": of.Family(of.llama, {"mlp_bias": False, "max_position_embeddings": 2048}),
    "mistral": of.Family(
        of.mistral, {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    ),
    "qwen2": of.Family(of.qwen2, {**_QWEN_DEFAULTS, "num_key_value_heads": 32}),
    "qwen3": of.Family(of.qwen3, {**_QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128}),
    "cohere": of.Family(
        of.cohere,
        {
            "use_qk_norm": False,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    ),
    "olmo2": of.Family(of.olmo2, {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}),
    "granite": of.Family(of.granite, _GRANITE_DEFAULTS),
    "gemma2": of.Family(
        of.gemma2,
        {
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 8192,
        },
        {"hidden_activation": "hidden_act"},
    ),
    "gemma3_text": of.Family(
        of.gemma3,
        {
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "max_position_embeddings": 131072,
        },
        {"hidden_activation": "hidden_act"},
    ),
    "phi3": of.Family(
        of.one_window,
        {
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 4096,
        },
        rotates_a_part=True,
    ),
    "starcoder2": of.Family(
        of.starcoder2,
        {
            "sliding_window": None,
            "use_bias": True,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        },
        {"norm_epsilon": "layer_norm_eps"},
    ),
    "cohere2": of.Family(
        of.cohere2,
        {
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    ),
    "gpt_neox": of.Family(
        of.gpt_neox,
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.25,
            "max_position_embeddings": 2048,
        },
        {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
        unread=("num_key_value_heads",),
        rotates_a_part=True,
    ),
    "phi": of.Family(
        of.phi,
        {
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "qk_layernorm": False,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 2048,
        },
        rotates_a_part=True,
    ),
    "gptj": of.Family(
        of.gptj,
        {
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "intermediate_size": None,
            "rotary_dim": 64,
            "max_position_embeddings": 2048,
        },
        {
            "n_inner": "intermediate_size",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "layer_norm_eps",
        },
        {
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
        },
        unread=("num_key_value_heads",),
    ),
    "falcon": of.Family(
        of.falcon,
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "intermediate_size": None,
            "alibi": False,
            "bias": False,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "num_ln_in_parallel_attn": None,
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
        },
        {
            "num_kv_heads": "num_key_value_heads",
            "ffn_hidden_size": "intermediate_size",
            "activation": "hidden_act",
            "layer_norm_epsilon": "layer_norm_eps",
        },
    ),
}

_SPARSE: dict[str, of.Family] = {
    "mixtral": of.Family(
        of.mixtral,
        {
            "sliding_window": None,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2_moe": of.Family(
        of.qwen2_moe, {**_QWEN_DEFAULTS, **_SPARSE_DEFAULTS, "qkv_bias": True, "num_key_value_heads": 16}
    ),
    "qwen3_moe": of.Family(of.qwen3_moe, {**_QWEN_DEFAULTS, **_SPARSE_DEFAULTS, "num_key_value_heads": 4}),
    "olmoe": of.Family(
        of.olmoe,
        {
            "rms_norm_eps": 1e-5,
            "clip_qkv": None,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
            "max_position_embeddings": 4096,
        },
    ),
    "flex_olmo": of.Family(
        of.flex_olmo,
        {
            "clip_qkv": None,
            "norm_topk_prob": False,
            "rope_theta": 500000.0,
            "router_aux_loss_coef": 0.01,
            "max_position_embeddings": 4096,
        },
    ),
    "granitemoe": of.Family(of.granitemoe, {**_GRANITE_DEFAULTS, "router_aux_loss_coef": 0.001}),
}

# What looks like a family of the table and is not one.
_NOT_SUPPORTED = {
    "gemma3": "it reads images too; save its text model, of model_type 'gemma3_text'",
}

_FAMILIES = _DENSE | _SPARSE
DENSE_FAMILIES = tuple(_DENSE)
KNOWN_FAMILIES = (*_FAMILIES, "moe_runtime")


def model_config(config_json: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        ValueError: the family is not one of `KNOWN_FAMILIES`, a size is missing, or a value is unknown.
    """
    family = config_json.get("model_type")
    if family == "moe_runtime":
        for needed in fields(ModelConfig):
            if needed.default is MISSING and needed.default_factory is MISSING:
                required(config_json, needed.name)
        return ModelConfig.from_dict(config_json)
    check_family(family, KNOWN_FAMILIES)
    described = _FAMILIES[str(family)]
    given = _one_name_per_key(config_json, described)
    keys = {**_COMMON_DEFAULTS, **described.defaults, **given}
    _check_kinds(keys)
    heads = required(keys, "num_attention_heads")
    shared: dict[str, Any] = {
        "vocab_size": required(keys, "vocab_size"),
        "hidden_size": required(keys, "hidden_size"),
        "num_hidden_layers": required(keys, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys["num_key_value_heads"] or heads,
        "head_dim": keys["head_dim"] or keys["hidden_size"] // heads,
        "hidden_act": _activation(keys["hidden_act"]),
        "max_position_embeddings": keys["max_position_embeddings"],
        **_rope(keys, described.rotates_a_part),
        "norm_eps": keys["rms_norm_eps"],
        "tie_word_embeddings": keys["tie_word_embeddings"],
    }
    special = described.special(keys)
    if "intermediate_size" not in special:
        shared["intermediate_size"] = required(keys, "intermediate_size")
    return ModelConfig(**{**shared, **special})


def check_family(family: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless it is one of the allowed model types."""
    if family not in allowed:
        why = f"; {_NOT_SUPPORTED[family]}" if isinstance(family, str) and family in _NOT_SUPPORTED else ""
        raise ValueError(f"model_type must be one of {', '.join(allowed)}, got {family!r}{why}")


def _one_name_per_key(config_json: Mapping[str, Any], family: of.Family) -> dict[str, Any]:
    """The names that most families have. For the number of experts transformers reads and writes either."""
    ignored = {*family.renamed.values(), *family.unread}
    keys = {name: value for name, value in config_json.items() if name not in ignored}
    for own, common in {**family.renamed, **family.aliases}.items():
        if own in config_json:
            keys[common] = config_json[own]
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if name not in config_json and other in config_json:
            keys[name] = config_json[other]
    return keys


def _check_kinds(keys: Mapping[str, Any]) -> None:
    for wanted, (kind, names) in _KINDS.items():
        for name in names:
            value = keys.get(name)
            if name not in keys or (value is None and name in _MAY_BE_NULL):
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
            if name in _ABOVE_ZERO and isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
    if keys.get("num_hidden_layers", 0) > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, got {keys['num_hidden_layers']}")


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _rope(keys: Mapping[str, Any], rotates_a_part: bool) -> dict[str, Any]:
    """The fields about rotation. Gemma 3 keeps separate values for its sliding layers."""
    if keys["model_type"] != "gemma3_text":
        return {"rope_parameters": _rope_parameters(keys, rotates_a_part)}
    by_type = keys.get("rope_parameters") or {}
    full = {**(by_type.get("full_attention") or {}), **(keys.get("rope_scaling") or {})}
    sliding = dict(by_type.get("sliding_attention") or {})
    local = {**keys, "rope_theta": keys["rope_local_base_freq"], "rope_scaling": None}
    return {
        "rope_parameters": _rope_parameters({**keys, "rope_scaling": full}, rotates_a_part),
        "sliding_rope_parameters": _rope_parameters({**local, "rope_parameters": sliding}, rotates_a_part),
    }


def _rope_parameters(keys: Mapping[str, Any], rotates_a_part: bool) -> dict[str, Any]:
    """One flat dictionary with `rope_type` and `rope_theta`, from either style of file."""
    # transformers 5 gives the older key priority where a file holds both.
    rope = dict(keys.get("rope_scaling") or keys.get("rope_parameters") or {})
    for name, value in rope.items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"rope_parameters must be the same in all layers, got separate values for {name!r}"
            )
    old_name = rope.pop("type", "default")
    rope.setdefault("rope_type", old_name)
    rope.setdefault("rope_theta", keys["rope_theta"])
    if keys["model_type"] == "phi3" and rope["rope_type"] in ("su", "yarn"):  # its earlier names for it
        rope["rope_type"] = "longrope"
    if rope["rope_type"] not in _ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(_ROPE_TYPES)}, got {rope['rope_type']!r}")
    part = rope.pop("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    _check_kinds({"rope_theta": rope["rope_theta"], "partial_rotary_factor": part})
    if rotates_a_part and part != 1.0:
        rope["partial_rotary_factor"] = part
    if rope["rope_type"] in _LENGTH_SCALED_ROPE:
        first_length = keys.get("original_max_position_embeddings")
        if first_length is not None:
            rope["original_max_position_embeddings"] = first_length
        rope.setdefault("original_max_position_embeddings", keys["max_position_embeddings"])
    return rope
