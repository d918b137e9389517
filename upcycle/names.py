"""Tensor names: of a dense source, and of the router and experts in each target layout.

The five dense families share one set of names; what differs (biases, norms) follows from their `ModelConfig`.
"""

from dataclasses import dataclass

from moe_runtime.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm"
HEAD = "lm_head.weight"

# Old checkpoints store this table, which every model computes for itself.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


def layer(number: int) -> str:
    return f"model.layers.{number}"


@dataclass(frozen=True)
class ExpertNames:
    """Names below a layer. `fused`: the experts of a layer are stacked in two tensors, gate rows above up rows."""

    router: str
    fused: bool
    experts: str
    gate: str
    up: str
    down: str


EXPERT_NAMES = {
    "moe_runtime": ExpertNames("mlp.router.weight", True, "mlp.experts", "", "", ""),
    "mixtral": ExpertNames(
        "block_sparse_moe.gate.weight", False, "block_sparse_moe.experts", "w1", "w3", "w2"
    ),
    "qwen2_moe": ExpertNames("mlp.gate.weight", False, "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ExpertNames("mlp.gate.weight", False, "mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


def norm_names(config: ModelConfig) -> tuple[str, ...]:
    """The norms of one layer, below the layer."""
    return ("input_layernorm", "post_attention_layernorm")[: config.num_norms]


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a dense checkpoint of this description must hold, with its shape."""
    D, F = config.hidden_size, config.intermediate_size
    heads, kv_heads, P = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, D), f"{FINAL_NORM}.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, D)
    if config.norm_bias:
        shapes[f"{FINAL_NORM}.bias"] = (D,)
    for number in range(config.num_hidden_layers):
        prefix = layer(number)
        for norm in norm_names(config):
            shapes[f"{prefix}.{norm}.weight"] = (D,)
            if config.norm_bias:
                shapes[f"{prefix}.{norm}.bias"] = (D,)
        for name, rows in (("q", heads * P), ("k", kv_heads * P), ("v", kv_heads * P)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, D)
            if config.attention_bias:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (D, heads * P)
        if config.attention_output_bias:
            shapes[f"{prefix}.self_attn.o_proj.bias"] = (D,)
        if config.qk_norm is not None:
            # Qwen3 has one row for all heads, Cohere a row per head.
            one_row = config.qk_norm == "rms_norm"
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (P,) if one_row else (heads, P)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (P,) if one_row else (kv_heads, P)
        for name, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = (rows, columns)
            if config.mlp_bias:
                shapes[f"{prefix}.mlp.{name}_proj.bias"] = (rows,)
    return shapes
