"""Tiny random models of the MoE families of transformers, and what each should run on."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from tiny_models import perturb

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "first_k_dense_replace": 0}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LIMITED = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
MAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "mamba_d_state": 4,
}


@dataclass(frozen=True)
class Family:
    """`experts` and `router`: what its experts run on, and whether its routers are swapped."""

    config: str
    model: str
    experts: str = "expert_ffn"
    router: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    since: str = "5.17"


FAMILIES = {
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM"),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", options={"shared_expert_intermediate_size": 16}
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", options={"norm_topk_prob": True}),
    "olmoe": Family("OlmoeConfig", "OlmoeForCausalLM"),
    "flex_olmo": Family("FlexOlmoConfig", "FlexOlmoForCausalLM"),
    "minimax": Family("MiniMaxConfig", "MiniMaxForCausalLM"),
    "granitemoe": Family("GraniteMoeConfig", "GraniteMoeForCausalLM"),
    "gpt_oss": Family("GptOssConfig", "GptOssForCausalLM", experts="grouped_gemm"),
    "deepseek_v2": Family("DeepseekV2Config", "DeepseekV2ForCausalLM", options=LATENT | LIMITED),
    "deepseek_v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", options=LATENT | GROUPS),
    "glm4_moe": Family("Glm4MoeConfig", "Glm4MoeForCausalLM", options=GROUPS),
    "dots1": Family("Dots1Config", "Dots1ForCausalLM", options=GROUPS),
    "exaone_moe": Family("ExaoneMoeConfig", "ExaoneMoeForCausalLM", options=GROUPS),
    "minimax_m2": Family("MiniMaxM2Config", "MiniMaxM2ForCausalLM"),
    "hy_v3": Family("HYV3Config", "HYV3ForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", options={"moe_topk": 2}),
    "ernie4_5_moe": Family("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM"),
    "afmoe": Family("AfmoeConfig", "AfmoeForCausalLM", options={"num_dense_layers": 0}),
    "aria": Family("AriaTextConfig", "AriaTextForCausalLM", experts="grouped_gemm", since="5.23"),
    "jamba": Family("JambaConfig", "JambaForCausalLM", options=MAMBA),
    "nemotron_h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        options=GROUPS | {"layers_block_type": ["moe", "full_attention"]},
    ),
    "phimoe": Family("PhimoeConfig", "PhimoeForCausalLM", router=False),
    "cohere2_moe": Family("Cohere2MoeConfig", "Cohere2MoeForCausalLM", router=False),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        router=False,
        options={"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    ),
    "deepseek_v4": Family("DeepseekV4Config", "DeepseekV4ForCausalLM", experts="grouped_gemm", router=False),
}


def is_at_least(version: str) -> bool:
    return Version(transformers.__version__).release >= Version(version).release


# those that this version of transformers has on its experts interface
HERE = [name for name, family in FAMILIES.items() if is_at_least(family.since)]


def tiny_family(name: str, implementation: str = "eager", **options: Any) -> Any:
    """A random model in eval mode; selection biases are not zero, which would hide that they are used."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**(COMMON | family.options | options))
    torch.manual_seed(0)
    model = getattr(transformers, family.model)._from_config(config, experts_implementation=implementation)
    perturb(model)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2)
    return model.eval()
