"""Tiny random dense models of every supported family, saved as real checkpoints."""

import torch
import transformers
from safetensors.torch import load_file

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

# What makes each family itself: a window shorter than the text, head norms, biases, heads wider than D / H.
TRAITS = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "cohere": {"use_qk_norm": True, "attention_bias": True},
}


def save_dense(folder, family, *, seed=0, dtype=torch.float32, shard="30KB", **changes):
    """A random model whose norms and biases are not the ones and zeros they would start as."""
    config_class = getattr(transformers, f"{family.capitalize()}Config")
    model_class = getattr(transformers, f"{family.capitalize()}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **TRAITS[family], **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors_of(folder):
    """Every tensor of a checkpoint folder, whatever its shards."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
