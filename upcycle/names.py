"""Tensor names: of a dense source, and of the router and experts in each target layout.

Dense sources of all families are seen under one set of names, Llama's (`upcycle.stored` says how); what
differs (biases, norms, gates) follows from their `ModelConfig`.
"""

from dataclasses import dataclass

from moe_runtime.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
HEAD_NORMS = ("q_norm.weight", "k_norm.weight")


def layer(number: int) -> str:
    return f"model.layers.{number}"


@dataclass(frozen=True)
class ExpertNames:
    """Names below a layer. `fused`: all experts of a layer in two tensors, `up` (gate rows above up rows) and
    `down`.
    """

    router: str
    fused: bool
    experts: str
    gate: str
    up: str
    down: str


EXPERT_NAMES = {
    "moe_runtime": ExpertNames("mlp.router.weight", True, "mlp.experts", "", "gate_up_proj", "down_proj"),
    "mixtral": ExpertNames(
        "block_sparse_moe.gate.weight", False, "block_sparse_moe.experts", "w1", "w3", "w2"
    ),
    "granitemoe": ExpertNames(
        "block_sparse_moe.router.layer.weight",
        True,
        "block_sparse_moe",
        "",
        "input_linear.weight",
        "output_linear.weight",
    ),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo"),
        ExpertNames("mlp.gate.weight", False, "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ),
}


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a dense checkpoint of this description must hold, with its shape."""
    table = (config.vocab_size, config.hidden_size)
    shapes = {EMBEDDING: table, **_norm_shapes(FINAL_NORM, config)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = table
    if config.head_bias:
        shapes[HEAD_BIAS] = (config.vocab_size,)
    for number in range(config.num_hidden_layers):
        for norm in config.block_config(number).norm_names:
            shapes |= _norm_shapes(f"{layer(number)}.{norm}", config)
        shapes |= _attention_shapes(f"{layer(number)}.self_attn", config)
        shapes |= _feed_forward_shapes(f"{layer(number)}.mlp", config)
    return shapes


def _norm_shapes(prefix: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if config.norm_bias else ("weight",)
    return {f"{prefix}.{kind}": (config.hidden_size,) for kind in kinds}


def _projection_shapes(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def _attention_shapes(prefix: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, P = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    shapes = _projection_shapes(f"{prefix}.q_proj", heads * P, D, config.attention_bias)
    for name in ("k_proj", "v_proj"):
        shapes |= _projection_shapes(f"{prefix}.{name}", kv_heads * P, D, config.attention_bias)
    shapes |= _projection_shapes(f"{prefix}.o_proj", D, heads * P, config.attention_output_bias)
    if config.qk_norm in ("rms_norm", "offset_rms_norm"):  # Qwen3, Gemma 3: one row for all heads
        shapes |= {f"{prefix}.q_norm.weight": (P,), f"{prefix}.k_norm.weight": (P,)}
    elif config.qk_norm is not None:  # Cohere, OLMo 2: one row per head
        shapes |= {f"{prefix}.q_norm.weight": (heads, P), f"{prefix}.k_norm.weight": (kv_heads, P)}
    return shapes


def _feed_forward_shapes(prefix: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F = config.hidden_size, config.intermediate_size
    gate = _projection_shapes(f"{prefix}.gate_proj", F, D, config.mlp_bias) if config.gated_mlp else {}
    return {
        **gate,
        **_projection_shapes(f"{prefix}.up_proj", F, D, config.mlp_bias),
        **_projection_shapes(f"{prefix}.down_proj", D, F, config.mlp_bias),
    }
