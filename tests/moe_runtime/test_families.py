"""`model_config` reads a family's config.json as transformers' own configuration class does."""

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_runtime.config import ModelConfig
from moe_runtime.families import DENSE_FAMILIES, KNOWN_FAMILIES, model_config

X = torch.linspace(-4, 4, 33)
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
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 64,
    "rope_theta": 100.0,
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
    pytest.param("Olmo2", {"attention_bias": True}, id="olmo2"),
    pytest.param("Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.125}, id="granite"),
    pytest.param("Gemma2", {}, id="gemma2"),
    pytest.param("Gemma2", {"sliding_window": 8, "attn_logit_softcapping": None}, id="gemma2-no-cap"),
    pytest.param("Gemma3Text", {}, id="gemma3"),
    pytest.param("Phi3", {"rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 0.5}}, id="phi3-long"),
    pytest.param("Starcoder2", {"use_bias": False, "sliding_window": 8}, id="starcoder2"),
    pytest.param("Cohere2", {"sliding_window": 8}, id="cohere2"),
    pytest.param("Cohere2", {"sliding_window": 8, "num_hidden_layers": 3}, id="cohere2-all-slide"),
    pytest.param("GPTNeoX", {"hidden_act": "gelu_fast"}, id="gpt-neox"),
    pytest.param("Phi", {"partial_rotary_factor": 0.25}, id="phi"),
    pytest.param("GPTJ", {"rotary_dim": 4, "n_inner": 48}, id="gptj"),
    pytest.param("Falcon", {"ffn_hidden_size": 48, "num_kv_heads": 2}, id="falcon"),
    pytest.param("Olmoe", EXPERTS, id="olmoe"),
    pytest.param("FlexOlmo", {**EXPERTS, "norm_topk_prob": True}, id="flex-olmo"),
    pytest.param("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, id="granitemoe"),
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
    rope = dict(config_json.get("rope_parameters") or {"rope_theta": 10000.0, "rope_type": "default"})
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    theta, part = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}.get(
        config_json["model_type"], ("rope_theta", "partial_rotary_factor")
    )
    old[theta] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old[part] = rope.pop("partial_rotary_factor")
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
    without = {"gpt_neox": "num_attention_heads", "gptj": "num_attention_heads"}  # as many as query heads
    own_key = {"falcon": "num_kv_heads", **without}.get(config.model_type, "num_key_value_heads")
    kv_heads = 1 if getattr(config, "multi_query", False) else getattr(config, own_key, None)
    assert actual.num_key_value_heads == (kv_heads or heads)
    assert actual.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // heads)
    width = first_of(config, "intermediate_size", "ffn_hidden_size", "n_inner") or 4 * config.hidden_size
    assert actual.intermediate_size == width
    assert actual.max_position_embeddings == config.max_position_embeddings
    epsilons = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    assert actual.norm_eps == first_of(config, *epsilons)
    assert actual.tie_word_embeddings == config.tie_word_embeddings
    scale = 1.0 / getattr(config, "logits_scaling", 1.0)
    assert actual.logit_scale == getattr(config, "logit_scale", scale)
    activation = first_of(config, "hidden_activation", "hidden_act", "activation_function", "activation")
    assert ACT2FN[actual.hidden_act.replace("gelu_tanh", "gelu_pytorch_tanh")](X).allclose(
        ACT2FN[activation](X), rtol=0, atol=1e-6
    )
    check_windows_and_rope(actual, config)
    for name in ("embedding_multiplier", "residual_multiplier", "final_logit_softcapping"):
        if hasattr(config, name):
            assert getattr(actual, name) == getattr(config, name), name


def check_windows_and_rope(actual: ModelConfig, config):
    if config.model_type == "gptj":
        part = actual.rope_parameters.get("partial_rotary_factor", 1.0)
        assert int(actual.head_dim * part) == config.rotary_dim
        return
    types = getattr(config, "layer_types", None)
    if types is not None:
        windows = [actual.attention_config(n).sliding_window for n in range(len(types))]
        assert windows == [config.sliding_window if kind == "sliding_attention" else None for kind in types]
    rope = config.rope_parameters
    if "full_attention" in rope:
        assert actual.sliding_rope_parameters == rope["sliding_attention"]
        rope = rope["full_attention"]
    rope = {name: value for name, value in rope.items() if (name, value) != ("partial_rotary_factor", 1.0)}
    rope.pop("type", None)
    assert actual.rope_parameters == rope


def first_of(config, *names):
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


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
    if family not in DENSE_FAMILIES:
        sizes |= {**QWEN_EXPERTS, "num_local_experts": 4, "shared_expert_intermediate_size": 5632}
    if family in ("falcon", "gptj"):
        del sizes["intermediate_size"]
    config = CONFIG_MAPPING[family](**{key: value for key, value in sizes.items() if key != "model_type"})
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


OTHER_FAMILIES_KEYS = [
    ("gemma2", {"hidden_act": "relu"}),
    ("gemma3_text", {"hidden_act": "relu"}),
    ("starcoder2", {"layer_norm_eps": 0.5}),
    ("gpt_neox", {"partial_rotary_factor": 0.5, "rope_theta": 50.0, "num_key_value_heads": 2}),
    (
        "gptj",
        {"hidden_act": "relu", "layer_norm_eps": 0.5, "intermediate_size": 40, "num_key_value_heads": 2},
    ),
    (
        "falcon",
        {"hidden_act": "relu", "layer_norm_eps": 0.5, "intermediate_size": 40, "num_key_value_heads": 2},
    ),
]


@pytest.mark.parametrize(("family", "keys"), OTHER_FAMILIES_KEYS)
def test_keys_that_only_other_families_read_change_nothing(family, keys):
    sizes = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
    if family in ("gptj", "falcon"):
        del sizes["intermediate_size"]
    config_json = {**sizes, "rotary_dim": 4, "new_decoder_architecture": True, "pad_token_id": None}
    config_json["model_type"] = family
    assert model_config({**config_json, **keys}) == model_config(config_json)
    logits = []
    for described in (config_json, {**config_json, **keys}):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family].from_dict({**described, "initializer_range": 0.5})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        logits.append(model(torch.arange(5, 21)[None]).logits)
    assert torch.equal(*logits)


def test_gptj_knows_its_sizes_by_either_name():
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 99}
    common = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    either = dict(zip(common, sizes.values(), strict=True))
    shared = {"model_type": "gptj", "vocab_size": 64, "rotary_dim": 4}
    assert model_config({**shared, **sizes}) == model_config({**shared, **either})
    assert model_config({**shared, **sizes}).max_position_embeddings == 99


def test_rotary_types_are_those_of_transformers():
    known = {"default", *transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS}
    for kind in known:
        rope = {"rope_type": kind, "rope_theta": 100.0, "original_max_position_embeddings": 64}
        config = model_config({**TINY, "model_type": "llama", "rope_parameters": rope})
        assert config.rope_parameters["rope_type"] == kind


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


def test_layers_of_cohere2_rotate_where_they_slide():
    cohere2 = model_config(
        {**TINY, "model_type": "cohere2", "sliding_window_pattern": 2, "num_hidden_layers": 5}
    )
    assert cohere2.rope_layers == (0, 2, 4)
    assert (cohere2.sliding_window, cohere2.layer_types[1]) == (4096, "full_attention")
    alike = {**TINY, "model_type": "cohere2", "sliding_window": 8}
    for kind, window, rotary in (("sliding_attention", 8, None), ("full_attention", None, ())):
        cohere2 = model_config({**alike, "layer_types": [kind] * 4})
        assert (cohere2.sliding_window, cohere2.layer_types, cohere2.rope_layers) == (window, None, rotary)


def test_a_norm_of_gemma_counts_from_one_and_stands_on_both_sides():
    gemma = model_config({**TINY, "model_type": "gemma2", "query_pre_attn_scalar": 16, "head_dim": 16})
    assert (gemma.norm, gemma.norm_placement) == ("offset_rms_norm", "both")
    assert gemma.attention_multiplier is None  # 16 ** -0.5 is what every head of width 16 has
    assert gemma.embedding_multiplier == 32**0.5


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
    pytest.param({"model_type": ["llama"]}, r"model_type must be .*, got \['llama'\]", id="list-of-families"),
    *(
        pytest.param(
            {**TINY, "head_dim": 8, "model_type": family, "num_hidden_layers": 10**9},
            "num_hidden_layers must be at most 10000, got 1000000000",
            id=f"layers-{family}",
        )
        for family in ("gemma2", "moe_runtime")
    ),
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
    *(
        pytest.param(
            {**TINY, "model_type": "gptj", "rotary_dim": width},
            rf"rotary_dim must be an even width of at most that of a head \(8\), got {width}",
            id=f"rotary-dim-{width}",
        )
        for width in (0, 3, 20)
    ),
    *(
        pytest.param(
            {**TINY, "model_type": "phi", "partial_rotary_factor": part},
            rf"partial_rotary_factor'\] must be an even width of at most head_dim \(8\), got {int(8 * part)}",
            id=f"rotated-part-{part}",
        )
        for part in (-1.0, 0.0, 0.4, 1.5)
    ),
    *(
        pytest.param(
            {**TINY, "model_type": "llama", "rope_scaling": {"type": kind, "factor": 2.0}},
            f"rope_type must be one of default, .*, got {re.escape(repr(kind))}",
            id=f"rope-type-{kind}",
        )
        for kind in ("spiral", ["linear"])
    ),
    pytest.param({**TINY, "model_type": "gemma3"}, "got 'gemma3'; it reads images too", id="gemma3-images"),
]


ERRORS += [
    pytest.param(
        {**TINY, "model_type": family, name: value},
        f"{name} must be {wanted} in a {family} model, got {value!r}; other variants are not supported",
        id=f"{family}-{name}",
    )
    for family, name, value, wanted in (
        ("gemma2", "use_bidirectional_attention", True, "False or None"),
        ("gemma3_text", "attn_logit_softcapping", 5.0, "None"),
        ("phi", "qk_layernorm", True, "False"),
        ("falcon", "alibi", True, "False or None"),
        ("falcon", "num_ln_in_parallel_attn", 2, "None or 1"),
        ("olmoe", "clip_qkv", 8.0, "None"),
    )
] + [
    pytest.param(
        {**TINY, "model_type": "cohere2", "sliding_window": None}, "sliding_window is missing", id="no-rope"
    ),
    pytest.param(
        {**TINY, "model_type": "cohere2", "sliding_window_pattern": 0}, "must be above 0, got 0", id="zero"
    ),
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
