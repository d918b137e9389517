"""What the keys of each family's config.json mean: the fields of `ModelConfig` that only this family sets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import nextafter
from typing import Any

Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """`defaults` of absent keys; `special` makes the fields that only this family sets.

    `renamed`: the family's key -> the key that other families have for it, which its class ignores;
    `aliases`: the same where its class reads either. `unread`: other common keys that its class ignores.
    `rotates_a_part`: it reads `partial_rotary_factor`, which other families ignore.
    """

    special: Callable[[Keys], dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    rotates_a_part: bool = False


def required(keys: Keys, name: str) -> Any:
    if keys.get(name) is None:
        raise ValueError(f"{name} is missing from the config.json of a {keys['model_type']} model")
    return keys[name]


def _must_be(keys: Keys, name: str, *allowed: object) -> None:
    """Refuse a variant of a family by name."""
    if keys.get(name) not in allowed:
        raise ValueError(
            f"{name} must be {' or '.join(map(repr, allowed))} in a {keys['model_type']} model, "
            f"got {keys[name]!r}; other variants are not supported"
        )


# --- what each family adds to the fields that all share ---


def llama(c: Keys) -> dict[str, Any]:
    return {**_attention_biases(c), "mlp_bias": c["mlp_bias"]}


def _attention_biases(c: Keys) -> dict[str, Any]:
    return {"attention_bias": c["attention_bias"], "attention_output_bias": c["attention_bias"]}


def one_window(c: Keys) -> dict[str, Any]:
    return {"sliding_window": c["sliding_window"]}


def mistral(c: Keys) -> dict[str, Any]:
    """With `layer_types`, transformers takes the file for a Ministral's, whose layers may differ."""
    return one_window(c) if c.get("layer_types") is None else window(c, c["sliding_window"], [])


def qwen2(c: Keys) -> dict[str, Any]:
    late = [layer >= c["max_window_layers"] for layer in range(c["num_hidden_layers"])]
    return {"attention_bias": True, **_qwen_window(c, late)}


def qwen3(c: Keys) -> dict[str, Any]:
    return {**qwen2(c), **_attention_biases(c), "qk_norm": "rms_norm"}


def olmo2(c: Keys) -> dict[str, Any]:
    return {**_attention_biases(c), "qk_norm": "joint_rms_norm", "norm_placement": "after"}


def granite(c: Keys) -> dict[str, Any]:
    return {
        **llama(c),
        "embedding_multiplier": c["embedding_multiplier"],
        "residual_multiplier": c["residual_multiplier"],
        "attention_multiplier": _scale(c, c["attention_multiplier"]),
        "logit_scale": 1.0 / c["logits_scaling"],
    }


def _scale(c: Keys, multiplier: float) -> float | None:
    """Of the scores; None where it is what all other families have."""
    width = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    return None if multiplier == width**-0.5 else multiplier


def gemma2(c: Keys) -> dict[str, Any]:
    _must_be(c, "use_bidirectional_attention", False, None)
    every_other = [layer % 2 == 0 for layer in range(c["num_hidden_layers"])]
    return {
        **_attention_biases(c),
        **window(c, c["sliding_window"], every_other),
        "attention_multiplier": _scale(c, c["query_pre_attn_scalar"] ** -0.5),
        "attn_logit_softcapping": c["attn_logit_softcapping"],
        "final_logit_softcapping": c["final_logit_softcapping"],
        "embedding_multiplier": c["hidden_size"] ** 0.5,
        "norm": "offset_rms_norm",
        "norm_placement": "both",
    }


def gemma3(c: Keys) -> dict[str, Any]:
    _must_be(c, "attn_logit_softcapping", None)  # which the family's attention does not read
    pattern = c["sliding_window_pattern"]
    local = [(layer + 1) % pattern != 0 for layer in range(c["num_hidden_layers"])]
    return {**gemma2(c), **window(c, c["sliding_window"], local), "qk_norm": "offset_rms_norm"}


def starcoder2(c: Keys) -> dict[str, Any]:
    return {
        **_plain_mlp(c, c["use_bias"]),
        "attention_bias": c["use_bias"],
        "attention_output_bias": c["use_bias"],
        "sliding_window": c["sliding_window"],
    }


def _plain_mlp(c: Keys, bias: bool) -> dict[str, Any]:
    """Two matrices without a gate, and norms with a bias."""
    return {
        "gated_mlp": False,
        "mlp_bias": bias,
        "norm": "layer_norm",
        "norm_bias": True,
        "norm_eps": c["layer_norm_eps"],
    }


def cohere(c: Keys) -> dict[str, Any]:
    return {
        **_attention_biases(c),
        "qk_norm": "layer_norm" if c["use_qk_norm"] else None,
        "rope_interleaved": True,
        "block": "parallel",
        "num_norms": 1,
        "norm": "layer_norm",
        "norm_eps": c["layer_norm_eps"],
        "logit_scale": c["logit_scale"],
    }


def cohere2(c: Keys) -> dict[str, Any]:
    required(c, "sliding_window")
    local = [(layer + 1) % c["sliding_window_pattern"] != 0 for layer in range(c["num_hidden_layers"])]
    windows = window(c, c["sliding_window"], local)
    types = windows.get("layer_types") if windows else ["full_attention"] * len(local)
    sliding = None if types is None else tuple(n for n, kind in enumerate(types) if kind != "full_attention")
    return {**cohere({**c, "use_qk_norm": False}), **windows, "rope_layers": sliding}


def phi(c: Keys) -> dict[str, Any]:
    _must_be(c, "qk_layernorm", False)
    return {
        **_plain_mlp(c, True),
        "attention_bias": True,
        "attention_output_bias": True,
        "block": "parallel",
        "num_norms": 1,
        "head_bias": True,
    }


def gptj(c: Keys) -> dict[str, Any]:
    width = c["hidden_size"] // c["num_attention_heads"]
    rotated = required(c, "rotary_dim")
    if rotated % 2 or not 0 < rotated <= width:
        raise ValueError(
            f"rotary_dim must be an even width of at most that of a head ({width}), got {rotated}"
        )
    factor = rotated / width
    if int(width * factor) < rotated:  # a quotient that was rounded down
        factor = nextafter(factor, 2.0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        **_plain_mlp(c, True),
        "intermediate_size": c["intermediate_size"] or 4 * c["hidden_size"],
        "block": "parallel",
        "num_norms": 1,
        "head_bias": True,
        "rope_interleaved": True,
        "rope_parameters": rope if factor == 1.0 else {**rope, "partial_rotary_factor": factor},
    }


def gpt_neox(c: Keys) -> dict[str, Any]:
    return {
        **_plain_mlp(c, True),
        **_attention_biases(c),
        "block": "parallel" if c["use_parallel_residual"] else "sequential",
    }


def falcon(c: Keys) -> dict[str, Any]:
    _must_be(c, "alibi", False, None)
    new, heads = c["new_decoder_architecture"], c["num_attention_heads"]
    norms = c["num_ln_in_parallel_attn"] or (2 if new else 1)
    if new:
        _must_be(c, "parallel_attn", True)
    elif c["parallel_attn"]:
        _must_be(c, "num_ln_in_parallel_attn", None, 1)
    kv_heads = c["num_key_value_heads"] or heads if new else 1 if c["multi_query"] else heads
    return {
        **_plain_mlp(c, c["bias"]),
        "intermediate_size": c["intermediate_size"] or 4 * c["hidden_size"],
        "num_key_value_heads": kv_heads,
        "attention_bias": c["bias"],
        "attention_output_bias": c["bias"],
        "block": "parallel" if c["parallel_attn"] else "sequential",
        "num_norms": norms if c["parallel_attn"] else 2,
    }


# --- mixtures ---


def mixtral(c: Keys) -> dict[str, Any]:
    return {**one_window(c), **_experts_of_one_width(c)}


def _experts_of_one_width(c: Keys) -> dict[str, Any]:
    return {
        "num_experts": required(c, "num_local_experts"),
        "num_experts_per_tok": required(c, "num_experts_per_tok"),
        "moe_intermediate_size": c["intermediate_size"],
        "router_aux_loss_coef": c["router_aux_loss_coef"],
    }


def granitemoe(c: Keys) -> dict[str, Any]:
    return {**granite({**c, "mlp_bias": False}), **_experts_of_one_width(c)}


def olmoe(c: Keys) -> dict[str, Any]:
    _must_be(c, "clip_qkv", None)
    return {
        **_attention_biases(c),
        **_experts_of_one_width(c),
        "qk_norm": "joint_rms_norm",
        "router_gate": "renorm" if c["norm_topk_prob"] else "raw",
    }


def flex_olmo(c: Keys) -> dict[str, Any]:
    return {**olmoe(c), "norm_placement": "after"}


def qwen2_moe(c: Keys) -> dict[str, Any]:
    early = [layer % 2 == 0 and layer < c["max_window_layers"] for layer in range(c["num_hidden_layers"])]
    shared = required(c, "shared_expert_intermediate_size")
    return {
        **_qwen_experts(c),
        **_qwen_window(c, early),
        "attention_bias": c["qkv_bias"],
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": shared > 0,
    }


def qwen3_moe(c: Keys) -> dict[str, Any]:
    return {
        **_qwen_experts(c),
        **_attention_biases(c),
        "qk_norm": "rms_norm",
        "sliding_window": c["sliding_window"] if c["use_sliding_window"] else None,
    }


def _qwen_experts(c: Keys) -> dict[str, Any]:
    dense = set(c["mlp_only_layers"] or ())
    layers = range(c["num_hidden_layers"])
    sparse = tuple(n for n in layers if n not in dense and (n + 1) % c["decoder_sparse_step"] == 0)
    return {
        "num_experts": required(c, "num_experts"),
        "num_experts_per_tok": required(c, "num_experts_per_tok"),
        "moe_intermediate_size": required(c, "moe_intermediate_size"),
        "moe_layers": None if len(sparse) == len(layers) else sparse,
        "router_gate": "renorm" if c["norm_topk_prob"] else "raw",
        "router_aux_loss_coef": c["router_aux_loss_coef"],
    }


# --- sliding windows ---


def _qwen_window(keys: Keys, slides: list[bool]) -> dict[str, Any]:
    return window(keys, keys["sliding_window"] if keys["use_sliding_window"] else None, slides)


def window(keys: Keys, width: int | None, slides: list[bool]) -> dict[str, Any]:
    """Sliding window and layer types; `slides` counts when the file is silent about its layers."""
    types = keys.get("layer_types")
    if types is None:
        types = ["sliding_attention" if width and slid else "full_attention" for slid in slides]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer_types must hold 'full_attention' or 'sliding_attention', got {unknown[0]!r}")
    if len(types) != keys["num_hidden_layers"]:
        raise ValueError(
            f"layer_types must have num_hidden_layers ({keys['num_hidden_layers']}) entries, got {len(types)}"
        )
    if "sliding_attention" not in types:
        return {}
    if not width:
        raise ValueError("sliding_window must be set where layer_types holds 'sliding_attention', got none")
    alike = "full_attention" not in types
    return {"sliding_window": width, "layer_types": None if alike else tuple(types)}
