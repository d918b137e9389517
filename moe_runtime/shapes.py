"""Published model shapes by name, for `moe-runtime flops` and for the tests of `flops`."""

import difflib
from dataclasses import replace

from .config import ModelConfig

# Zhang et al. 2024, "BAM! Just Like That". The paper counts gate and up rows together: twice the width here.
_BAM_SMALL = ModelConfig(
    vocab_size=256_000,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=128,
    block="parallel",
    num_norms=1,
    norm="layer_norm",
)
_BAM_LARGE = replace(
    _BAM_SMALL,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=18,
    num_attention_heads=18,
    num_key_value_heads=6,
    tie_word_embeddings=True,
)


def _mixture_of_ffn(dense: ModelConfig, num_experts: int, experts_per_token: int) -> ModelConfig:
    return replace(
        dense,
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        router_gate="raw",
    )


def _bam(dense: ModelConfig, num_experts: int, *, shared_kv: bool) -> ModelConfig:
    return replace(
        _mixture_of_ffn(dense, num_experts, 1),
        num_attention_experts=num_experts,
        attention_kv="shared" if shared_kv else "expert",
        num_attention_heads=num_experts * dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads * (1 if shared_kv else num_experts),
    )


_MIXTRAL_8X7B = ModelConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=14_336,
    max_position_embeddings=32_768,
)
_QWEN15_MOE = ModelConfig(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    attention_bias=True,
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    router_gate="raw",
    shared_expert_intermediate_size=5632,
    shared_expert_gate=True,
    max_position_embeddings=8192,
)

SHAPES: dict[str, ModelConfig] = {
    "bam-small": _bam(_BAM_SMALL, 4, shared_kv=False),  # BAM itself, under its short name
    "bam-small-dense": _BAM_SMALL,
    "bam-small-btx": _mixture_of_ffn(_BAM_SMALL, 4, 1),
    "bam-small-btx-6e-top3": _mixture_of_ffn(_BAM_SMALL, 6, 3),
    "bam-small-expert-kv": _bam(_BAM_SMALL, 4, shared_kv=False),
    "bam-small-shared-kv": _bam(_BAM_SMALL, 4, shared_kv=True),
    "bam-large": _bam(_BAM_LARGE, 4, shared_kv=False),
    "bam-large-dense": _BAM_LARGE,
    "bam-large-btx": _mixture_of_ffn(_BAM_LARGE, 4, 1),
    "bam-large-expert-kv": _bam(_BAM_LARGE, 4, shared_kv=False),
    "bam-large-shared-kv": _bam(_BAM_LARGE, 4, shared_kv=True),
    "mixtral-8x7b": _MIXTRAL_8X7B,
    "qwen1.5-moe-a2.7b": _QWEN15_MOE,
}


def named_shape(name: str) -> ModelConfig:
    """The configuration of a published model.

    Raises:
        ValueError: the name is not in `SHAPES`; the message lists those that are.
    """
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name, SHAPES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(SHAPES)
    raise ValueError(f"no shape is named {name!r}; {hint}")
