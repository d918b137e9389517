"""Tiny random dense models of every supported family, saved as real checkpoints."""

import torch
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Keys that a family lacks or has by another name; None: it lacks them.
RENAMED = {
    "gpt_neox": {"num_key_value_heads": None},
    "gptj": {"num_key_value_heads": None, "intermediate_size": "n_inner"},
    "falcon": {"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size"},
}

# What makes each family itself: a window shorter than the text, head norms, biases, heads wider than D / H,
# multipliers and caps that change much.
TRAITS = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "cohere": {"use_qk_norm": True, "attention_bias": True},
    "olmo2": {"pad_token_id": None},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.7,
        "logits_scaling": 3.0,
    },
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 5,
        "sliding_window": 8,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 5,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75}},
    "starcoder2": {"sliding_window": 8},
    "cohere2": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True,
    },
    "gpt_neox": {},
    "phi": {},
    "gptj": {"rotary_dim": 4},
    "falcon": {},
}
VARIANTS = {
    "mistral-layers": (
        "mistral",
        {
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "falcon-heads": ("falcon", {"multi_query": False, "num_kv_heads": 4, "bias": True}),
    "falcon-sequential": ("falcon", {"parallel_attn": False}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True}),
    "falcon-new-one-norm": ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "pad_token_id": None}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "starcoder2-no-biases": ("starcoder2", {"use_bias": False}),
    "phi3-mini": ("phi3", {"sliding_window": 8}),
    "phi3-long": (
        "phi3",
        {
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
            },
        },
    ),
}


def dense_model(family, *, seed=0, **changes):
    """A random model whose norms and biases are not the ones and zeros they would start as.

    `family`: of TRAITS, or a variant of VARIANTS.
    """
    family, variant = VARIANTS.get(family, (family, TRAITS.get(family)))
    sizes = {RENAMED.get(family, {}).get(name, name): value for name, value in SIZES.items()}
    values = {**sizes, "pad_token_id": None, **variant, **changes}
    config = CONFIG_MAPPING[family](**{name: value for name, value in values.items() if name is not None})
    return randomised(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config), seed)


def randomised(model, seed=0):
    """Every parameter drawn anew: weights of norms around 1, everything else, biases too, around 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            parameter.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.15)
    return model.eval()


def save_dense(folder, family, *, dtype=torch.float32, shard="30KB", **options):
    """A checkpoint of `dense_model`."""
    dense_model(family, **options).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors_of(folder):
    """Every tensor of a checkpoint folder, whatever its shards."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
