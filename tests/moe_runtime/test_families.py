"""`model_config` reads a family's config.json as transformers' own configuration class does."""

import json
import re
import subprocess
import sys

import pytest
import transformers

from moe_runtime.config import ModelConfig
from moe_runtime.families import KNOWN_FAMILIES, model_config

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {**EXPERTS, "moe_intermediate_size": 24}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
CASES = [
    pytest.param("Llama", {}, id="llama"),
    pytest.param("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}, id="llama-biases"),
    pytest.param(
        "Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}, id="llama-scaled-rope"
    ),
    pytest.param("Mistral", {}, id="mistral"),
    pytest.param("Mistral", {"sliding_window": None, "hidden_act": "gelu"}, id="mistral-no-window"),
    pytest.param("Qwen2", {}, id="qwen2"),
    pytest.param("Qwen2", {"use_sliding_window": True, "max_window_layers": 2}, id="qwen2-windows"),
    pytest.param("Qwen3", {}, id="qwen3"),
    pytest.param(
        "Qwen3", {"head_dim": 8, "attention_bias": True, "use_sliding_window": True}, id="qwen3-bias"
    ),
    pytest.param("Cohere", {}, id="cohere"),
    pytest.param(
        "Cohere", {"use_qk_norm": True, "logit_scale": 0.5, "attention_bias": True}, id="cohere-qk-norm"
    ),
    pytest.param("Mixtral", EXPERTS, id="mixtral"),
    pytest.param("Mixtral", {**EXPERTS, "sliding_window": 16}, id="mixtral-window"),
    pytest.param("Qwen2Moe", QWEN_EXPERTS, id="qwen2-moe"),
    pytest.param(
        "Qwen2Moe",
        {
            **QWEN_EXPERTS,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
        id="qwen2-moe-dense-layers",
    ),
    pytest.param(
        "Qwen2Moe", {**QWEN_EXPERTS, "use_sliding_window": True, "sliding_window": 8}, id="qwen2-moe-window"
    ),
    pytest.param("Qwen3Moe", QWEN_EXPERTS, id="qwen3-moe"),
    pytest.param(
        "Qwen3Moe", {**QWEN_EXPERTS, "use_sliding_window": True, "head_dim": 16}, id="qwen3-moe-window"
    ),
]


def class_of(name):
    return getattr(transformers, f"{name}Config")


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def as_version_4(config_json):
    """The same model as transformers 4 wrote it."""
    old = {
        name: value for name, value in config_json.items() if name not in ("rope_parameters", "layer_types")
    }
    rope = dict(config_json["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    if "num_local_experts" in old and old["model_type"] != "mixtral":
        old["num_experts"] = old.pop("num_local_experts")
    return old


def check_against_class(actual: ModelConfig, config):
    heads = config.num_attention_heads
    assert actual.hidden_size == config.hidden_size
    assert actual.vocab_size == config.vocab_size
    assert actual.num_hidden_layers == config.num_hidden_layers
    assert actual.num_attention_heads == heads
    assert actual.num_key_value_heads == (config.num_key_value_heads or heads)
    assert actual.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // heads)
    assert actual.intermediate_size == config.intermediate_size
    assert actual.max_position_embeddings == config.max_position_embeddings
    assert actual.norm_eps == getattr(config, "rms_norm_eps", getattr(config, "layer_norm_eps", None))
    assert actual.tie_word_embeddings == config.tie_word_embeddings
    assert actual.logit_scale == getattr(config, "logit_scale", 1.0)
    assert actual.hidden_act == config.hidden_act
    rope = {name: value for name, value in config.rope_parameters.items() if name != "type"}
    assert actual.rope_parameters == rope


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_every_family_reads_as_its_own_class(name, changes, tmp_path):
    config = class_of(name)(**{**TINY, **changes})
    config_json = saved(config, tmp_path)
    actual = model_config(config_json)
    check_against_class(actual, config)
    assert model_config(as_version_4(config_json)) == actual


@pytest.mark.parametrize("family", [name for name in KNOWN_FAMILIES if name != "moe_runtime"])
def test_absent_keys_have_the_defaults_of_the_class(family, tmp_path):
    sizes = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    sizes |= {"num_attention_heads": 32, "hidden_size": 4096, "model_type": family}
    if family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        sizes |= {**QWEN_EXPERTS, "shared_expert_intermediate_size": 5632}
    config_class = class_of(
        {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}.get(family, family.capitalize())
    )
    config = config_class(**{key: value for key, value in sizes.items() if key != "model_type"})
    check_against_class(model_config(sizes), config)
    assert model_config(sizes) == model_config(saved(config, tmp_path))


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": LLAMA3_ROPE, "rope_scaling": {**LLAMA3_ROPE, "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 300.0},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 300.0}},
    ],
    ids=["both-styles", "oldest-style", "no-first-length"],
)
def test_rotary_keys_read_as_the_class_reads_them(keys):
    config_json = {**TINY, "model_type": "llama", "max_position_embeddings": 512, **keys}
    check_against_class(model_config(config_json), class_of("Llama").from_dict(config_json))


# --- facts of one family that the class's attributes do not show ---


def test_biases_follow_each_familys_modeling_file():
    qwen2 = model_config({**TINY, "model_type": "qwen2"})
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.mlp_bias) == (True, False, False)
    llama = model_config({**TINY, "model_type": "llama", "attention_bias": True, "mlp_bias": True})
    assert (llama.attention_bias, llama.attention_output_bias, llama.mlp_bias) == (True, True, True)


def test_cohere_is_parallel_with_one_layer_norm():
    cohere = model_config({**TINY, "model_type": "cohere", "use_qk_norm": True})
    assert (cohere.block, cohere.num_norms, cohere.norm, cohere.norm_bias) == (
        "parallel",
        1,
        "layer_norm",
        False,
    )
    assert (cohere.qk_norm, cohere.rope_interleaved, cohere.logit_scale) == ("layer_norm", True, 0.0625)


def test_qwen_windows_only_where_they_are_used():
    qwen2 = {**TINY, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 2}
    assert model_config(qwen2).sliding_window is None
    windowed = model_config({**qwen2, "use_sliding_window": True})
    assert windowed.layer_types == ("full_attention",) * 2 + ("sliding_attention",) * 2
    assert [windowed.attention_config(layer).sliding_window for layer in range(4)] == [None, None, 8, 8]


def test_qwen2_moe_experts():
    config = model_config(
        {
            **TINY,
            **QWEN_EXPERTS,
            "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
        }
    )
    assert config.moe_layers == (1,)
    assert (config.num_experts, config.moe_intermediate_size, config.router_gate) == (4, 24, "raw")
    assert (config.shared_expert_intermediate_size, config.shared_expert_gate) == (40, True)


def test_own_family_round_trips():
    config = ModelConfig(
        **{**TINY, "head_dim": 8}, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16
    )
    assert model_config({"model_type": "moe_runtime", **json.loads(json.dumps(config.to_dict()))}) == config


ERRORS = [
    pytest.param(
        {"model_type": "gpt2"}, r"model_type must be one of llama, .*moe_runtime, got 'gpt2'", id="family"
    ),
    pytest.param({}, "model_type must be one of .*, got None", id="no-family"),
    pytest.param(
        {"model_type": "llama"}, "num_attention_heads is missing from the config.json of a llama", id="size"
    ),
    pytest.param({**TINY, "model_type": "mixtral"}, "num_local_experts is missing", id="experts"),
    pytest.param(
        {**TINY, "model_type": "llama", "hidden_act": "gelu_10"},
        "hidden_act must be .* got 'gelu_10'",
        id="activation",
    ),
    pytest.param(
        {**TINY, "model_type": "qwen3", "layer_types": ["linear_attention"] * 4},
        "got 'linear_attention'",
        id="layers",
    ),
    pytest.param(
        {**TINY, "model_type": "qwen3", "layer_types": ["sliding_attention"] * 4},
        "sliding_window must be set where layer_types",
        id="no-window",
    ),
    pytest.param(
        {**TINY, "model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        "separate values for 'full_attention'",
        id="nested-rope",
    ),
]


ERRORS += [
    pytest.param(
        {**TINY, "model_type": family, name: value},
        f"{name} must be {wanted}, got {re.escape(repr(value))}",
        id=name,
    )
    for family, name, value, wanted in (
        ("llama", "num_attention_heads", "4", "a whole number"),
        ("llama", "num_hidden_layers", True, "a whole number"),
        ("qwen2", "max_window_layers", None, "a whole number"),
        ("llama", "rms_norm_eps", "1e-6", "a number"),
        ("llama", "hidden_act", ["silu"], "a text"),
        ("llama", "tie_word_embeddings", None, "true or false"),
        ("llama", "rope_scaling", "linear", "an object"),
        ("llama", "rope_parameters", [1], "an object"),
        ("qwen3", "layer_types", "full_attention", "a list"),
    )
] + [
    pytest.param(
        {**TINY, "model_type": "llama", "rope_theta": "big"},
        "rope_theta must be a number, got 'big'",
        id="rope-theta",
    ),
    pytest.param(
        {**TINY, "model_type": "llama", "rope_parameters": {"rope_theta": "big"}},
        "rope_theta must be a number, got 'big'",
        id="rope-theta-inside",
    ),
    pytest.param(
        {**TINY, "model_type": "qwen2", "layer_types": ["full_attention"]},
        "layer_types must have num_hidden_layers .4. entries, got 1",
        id="layer-types-length",
    ),
    pytest.param({"model_type": "moe_runtime", "vocab_size": 8}, "hidden_size is missing", id="own-family"),
]


@pytest.mark.parametrize(("config_json", "message"), ERRORS)
def test_unreadable_configurations_are_named(config_json, message):
    with pytest.raises(ValueError, match=message):
        model_config(config_json)


def test_needs_neither_torch_nor_transformers():
    code = (
        "import sys, moe_runtime.families; sys.exit(any(n in sys.modules for n in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
