"""What a config.json of a known model family means, as a `ModelConfig`. Needs neither torch nor transformers.

Reads the files of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). Keys that a file
leaves out have the default of the family's own configuration class; sizes have none: every writer has them.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from moe_runtime.config import ModelConfig

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

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
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
        ),
    ),
    "a number": (
        (int, float),
        ("rms_norm_eps", "layer_norm_eps", "rope_theta", "logit_scale", "router_aux_loss_coef"),
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
        ),
    ),
    "a text": (str, ("hidden_act",)),
    "a list": (list, ("layer_types", "mlp_only_layers")),
    "an object": (Mapping, ("rope_parameters", "rope_scaling")),
}
_MAY_BE_NULL = (
    "num_key_value_heads",
    "head_dim",
    "original_max_position_embeddings",
    "sliding_window",
    "layer_types",
    "mlp_only_layers",
    "rope_parameters",
    "rope_scaling",
)

# Rotary types whose scaling refers to the length the model was first trained on.
_LENGTH_SCALED_ROPE = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class _Family:
    """`defaults` of absent keys; `special` makes the fields that only this family sets."""

    special: Callable[[Mapping[str, Any]], dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)


# --- what each family adds to the fields that all share ---


def _llama(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_bias": c["attention_bias"],
        "attention_output_bias": c["attention_bias"],
        "mlp_bias": c["mlp_bias"],
    }


def _mistral(c: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": c["sliding_window"]}


def _qwen2(c: Mapping[str, Any]) -> dict[str, Any]:
    late = [layer >= c["max_window_layers"] for layer in range(c["num_hidden_layers"])]
    return {"attention_bias": True, **_window(c, late)}


def _qwen3(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_qwen2(c),
        "attention_bias": c["attention_bias"],
        "attention_output_bias": c["attention_bias"],
        "qk_norm": "rms_norm",
    }


def _cohere(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_bias": c["attention_bias"],
        "attention_output_bias": c["attention_bias"],
        "qk_norm": "layer_norm" if c["use_qk_norm"] else None,
        "rope_interleaved": True,
        "block": "parallel",
        "num_norms": 1,
        "norm": "layer_norm",
        "norm_eps": c["layer_norm_eps"],
        "logit_scale": c["logit_scale"],
    }


def _mixtral(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_mistral(c),
        "num_experts": _required(c, "num_local_experts"),
        "num_experts_per_tok": _required(c, "num_experts_per_tok"),
        "moe_intermediate_size": c["intermediate_size"],
        "router_aux_loss_coef": c["router_aux_loss_coef"],
    }


def _qwen2_moe(c: Mapping[str, Any]) -> dict[str, Any]:
    early = [layer % 2 == 0 and layer < c["max_window_layers"] for layer in range(c["num_hidden_layers"])]
    shared = _required(c, "shared_expert_intermediate_size")
    return {
        **_qwen_experts(c),
        **_window(c, early),
        "attention_bias": c["qkv_bias"],
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": shared > 0,
    }


def _qwen3_moe(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_qwen_experts(c),
        "attention_bias": c["attention_bias"],
        "attention_output_bias": c["attention_bias"],
        "qk_norm": "rms_norm",
        "sliding_window": c["sliding_window"] if c["use_sliding_window"] else None,
    }


def _qwen_experts(c: Mapping[str, Any]) -> dict[str, Any]:
    dense = set(c["mlp_only_layers"] or ())
    layers = range(c["num_hidden_layers"])
    sparse = tuple(n for n in layers if n not in dense and (n + 1) % c["decoder_sparse_step"] == 0)
    return {
        "num_experts": _required(c, "num_experts"),
        "num_experts_per_tok": _required(c, "num_experts_per_tok"),
        "moe_intermediate_size": _required(c, "moe_intermediate_size"),
        "moe_layers": None if len(sparse) == len(layers) else sparse,
        "router_gate": "renorm" if c["norm_topk_prob"] else "raw",
        "router_aux_loss_coef": c["router_aux_loss_coef"],
    }


_FAMILIES: dict[str, _Family] = {
    "llama": _Family(_llama, {"mlp_bias": False, "max_position_embeddings": 2048}),
    "mistral": _Family(
        _mistral, {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    ),
    "qwen2": _Family(_qwen2, {**_QWEN_DEFAULTS, "num_key_value_heads": 32}),
    "qwen3": _Family(_qwen3, {**_QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128}),
    "cohere": _Family(
        _cohere,
        {
            "use_qk_norm": False,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    ),
    "mixtral": _Family(
        _mixtral,
        {
            "sliding_window": None,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2_moe": _Family(
        _qwen2_moe, {**_QWEN_DEFAULTS, **_SPARSE_DEFAULTS, "qkv_bias": True, "num_key_value_heads": 16}
    ),
    "qwen3_moe": _Family(_qwen3_moe, {**_QWEN_DEFAULTS, **_SPARSE_DEFAULTS, "num_key_value_heads": 4}),
}

DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "cohere")
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
                _required(config_json, needed.name)
        return ModelConfig.from_dict(config_json)
    if family not in _FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(KNOWN_FAMILIES)}, got {family!r}")
    keys = {**_COMMON_DEFAULTS, **_FAMILIES[family].defaults, **_one_name_per_key(config_json)}
    _check_kinds(keys)
    heads = _required(keys, "num_attention_heads")
    shared: dict[str, Any] = {
        "vocab_size": _required(keys, "vocab_size"),
        "hidden_size": _required(keys, "hidden_size"),
        "intermediate_size": _required(keys, "intermediate_size"),
        "num_hidden_layers": _required(keys, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys["num_key_value_heads"] or heads,
        "head_dim": keys["head_dim"] or keys["hidden_size"] // heads,
        "hidden_act": _activation(keys["hidden_act"]),
        "max_position_embeddings": keys["max_position_embeddings"],
        "rope_parameters": _rope_parameters(keys),
        "norm_eps": keys["rms_norm_eps"],
        "tie_word_embeddings": keys["tie_word_embeddings"],
    }
    return ModelConfig(**{**shared, **_FAMILIES[family].special(keys)})


def _one_name_per_key(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """transformers reads either name for the number of experts; versions differ in which they write."""
    keys = dict(config_json)
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


def _required(keys: Mapping[str, Any], name: str) -> Any:
    if keys.get(name) is None:
        raise ValueError(f"{name} is missing from the config.json of a {keys['model_type']} model")
    return keys[name]


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _rope_parameters(keys: Mapping[str, Any]) -> dict[str, Any]:
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
    _check_kinds({"rope_theta": rope["rope_theta"]})
    if rope["rope_type"] in _LENGTH_SCALED_ROPE:
        first_length = keys.get("original_max_position_embeddings")
        if first_length is not None:
            rope["original_max_position_embeddings"] = first_length
        rope.setdefault("original_max_position_embeddings", keys["max_position_embeddings"])
    return rope


def _window(keys: Mapping[str, Any], slides: list[bool]) -> dict[str, Any]:
    """Sliding window and layer types of a Qwen model; `slides` counts when the file is silent."""
    window = keys["sliding_window"] if keys["use_sliding_window"] else None
    types = keys.get("layer_types")
    if types is None:
        types = ["sliding_attention" if window and slid else "full_attention" for slid in slides]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer_types must hold 'full_attention' or 'sliding_attention', got {unknown[0]!r}")
    if len(types) != keys["num_hidden_layers"]:
        raise ValueError(
            f"layer_types must have num_hidden_layers ({keys['num_hidden_layers']}) entries, got {len(types)}"
        )
    if "sliding_attention" not in types:
        return {}
    if not window:
        raise ValueError("sliding_window must be set where layer_types holds 'sliding_attention', got none")
    alike = "full_attention" not in types
    return {"sliding_window": window, "layer_types": None if alike else tuple(types)}
