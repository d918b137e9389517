"""Tiny dense models of every supported family, saved as real checkpoints and made once per run."""

import shutil

import pytest
import torch
import transformers

import upcycle

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


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """`dense(family, seed=…, …)` -> folder of a checkpoint; treat it as read-only."""
    made = {}

    def make(family, **options):
        key = (family, *sorted(options.items(), key=str))
        if key not in made:
            made[key] = save_dense(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture
def dense_copy(dense, tmp_path):
    """Like `dense`, but the test may damage it."""

    def make(family="llama", name="damaged", **options):
        return shutil.copytree(dense(family, **options), tmp_path / name)

    return make


@pytest.fixture
def run(tmp_path):
    """`run(method=…, sources=[…], …)` -> folder of the upcycled model."""

    def make(name="out", **recipe):
        recipe = {key: str(value) if key == "base" else value for key, value in recipe.items()}
        if "sources" in recipe:
            recipe["sources"] = [str(source) for source in recipe["sources"]]
        values = {"output": str(tmp_path / name), **recipe}
        return upcycle.upcycle(upcycle.recipe_from_dict(values)).output

    return make


@pytest.fixture(scope="session")
def smollm2():
    """The real dense checkpoint, converted once and kept in `.cache`."""
    from moe_runtime.demo.checkpoint import smollm2_checkpoint

    return smollm2_checkpoint()
