"""The transformers configuration: its fields, its checks, its way through config.json."""

import json
from dataclasses import MISSING, fields

import pytest
from tiny_models import BAM, BAM_SHARED_KV, DENSE, KINDS, MOE
from transformers import AutoConfig

from moe_runtime.config import (
    LEFT_OUT_DEFAULTS,
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    RouterConfig,
)
from moe_runtime.hf import MoeRuntimeConfig


@pytest.mark.parametrize("kind", KINDS)
def test_describes_the_same_model_as_its_values(kind, tmp_path):
    values = {name: value for name, value in KINDS[kind].items() if name != "initializer_range"}
    described = ModelConfig(**values)
    config = MoeRuntimeConfig.from_model_config(described, eos_token_id=7)
    assert config.model_config() == described.__class__(**values | {"layer_types": ["full_attention"] * 2})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoeRuntimeConfig
    assert loaded.model_config() == config.model_config()
    assert loaded.eos_token_id == 7


def test_every_default_is_that_of_the_model_config():
    config = MoeRuntimeConfig(**DENSE)
    for field in fields(ModelConfig):
        if field.name in DENSE or field.name == "layer_types":
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        assert getattr(config, field.name) == default, field.name


def test_later_fields_are_in_the_file_only_where_they_say_something(tmp_path):
    MoeRuntimeConfig(**MOE).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not LEFT_OUT_DEFAULTS.keys() & written.keys()
    assert not LEFT_OUT_DEFAULTS.keys() & MoeRuntimeConfig(**MOE).model_config().to_dict().keys()
    changed = {"norm_placement": "both", "rope_layers": [1], "final_logit_softcapping": 3.0}
    config = MoeRuntimeConfig(**MOE, **changed)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in LEFT_OUT_DEFAULTS.keys() & written.keys()} == changed
    assert AutoConfig.from_pretrained(tmp_path).model_config() == config.model_config()


@pytest.mark.parametrize("window", [None, 4])
def test_layers_are_always_listed(window):
    """transformers makes masks and caches by this list."""
    kind = "full_attention" if window is None else "sliding_attention"
    assert MoeRuntimeConfig(**DENSE, sliding_window=window).layer_types == [kind, kind]


def test_router_logits_are_offered_only_with_experts():
    """Trainers take the attribute as the sign of a Mixture of Experts, and fail on a dense model with it."""
    assert MoeRuntimeConfig(**MOE).output_router_logits is False
    assert MoeRuntimeConfig(**MOE, output_router_logits=True).output_router_logits is True
    assert not hasattr(MoeRuntimeConfig(**DENSE), "output_router_logits")


@pytest.mark.parametrize("older", [{"rope_parameters": {"rope_theta": 500.0}}, {"rope_theta": 500.0}])
def test_rope_settings_of_older_files_are_understood(older):
    config = MoeRuntimeConfig(**DENSE, **older)
    assert config.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": ...}, "vocab_size must be given in a MoeRuntimeConfig"),
        ({"num_experts_per_tok": 6}, r"experts_per_token must be between 1 and num_experts \(5\), got 6"),
        ({"num_attention_experts": 3}, r"num_attention_heads .* multiple of num_attention_experts \(3\)"),
        ({"hidden_act": "swish"}, "activation must be one of 'silu'"),
        (
            {"layer_types": ["full_attention"]},
            r"layer_types must have num_hidden_layers \(2\) entries, got 1",
        ),
        ({"layer_types": ["full_attention", "chunked"]}, "layer_types must be one of 'full_attention'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window must be a number"),
        ({"norm_bias": True}, "norm_bias must be False with norm 'rms_norm'"),
        ({"norm_placement": "around"}, "norm_placement must be one of 'before', 'after', 'both', got"),
        ({"norm_placement": "after", "block": "parallel"}, "norm_placement must be 'before' in a parallel"),
        ({"rope_layers": [2]}, "rope_layers must name layers between 0 and 1, got 2"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be a number above 0, got 0.0"),
        ({"embedding_multiplier": float("inf")}, "embedding_multiplier must be a number above 0, got inf"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, "must be an even width"),
        ({"partial_rotary_factor": 0.4}, "must be an even width"),
        ({"num_norms": 1}, "num_norms must be 2 in a sequential block, got 1"),
        ({"num_norms": 3}, "num_norms must be one of 1, 2, got 3"),
        ({"moe_layers": [5]}, "moe_layers must name layers between 0 and 1, got 5"),
        ({"num_experts": -1}, "num_experts must be a whole number of at least 1, got -1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a whole number of at least 1, got 0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be a whole number of at least 1, got 0"),
        ({"sliding_window": 0}, "sliding_window must be a whole number of at least 1, got 0"),
        ({"qk_norm": "l2"}, "qk_norm must be one of 'rms_norm', .*'joint_rms_norm', got 'l2'"),
        (
            {"rope_parameters": {"rope_type": "spiral"}},
            r"rope_type.* must be one of .*'default'.*got 'spiral'",
        ),
        (
            {"sliding_rope_parameters": {"rope_theta": 50.0}},
            r"sliding_rope_parameters\['rope_type'\] must be one of .*'default'.*got None",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_named(values, message):
    given = {name: value for name, value in (MOE | values).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        MoeRuntimeConfig(**given)


def test_head_counts_are_totals():
    """Serving engines size their caches from them."""
    own, shared = MoeRuntimeConfig(**BAM).model_config(), MoeRuntimeConfig(**BAM_SHARED_KV).model_config()
    assert (own.heads_per_expert, own.kv_heads_per_expert) == (4, 2)
    assert (shared.heads_per_expert, shared.kv_heads_per_expert) == (4, 2)
    assert own.attention_config(0).total_kv_heads == own.num_key_value_heads
    assert shared.attention_config(0).total_kv_heads == shared.num_key_value_heads


def router(**options) -> RouterConfig:
    return RouterConfig(**({"hidden_size": 8, "num_experts": 6, "experts_per_token": 2} | options))


def feed_forward(**options) -> FeedForwardConfig:
    return FeedForwardConfig(**({"hidden_size": 8, "intermediate_size": 4} | options))


def attention(**options) -> AttentionConfig:
    sizes = {"hidden_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "num_experts": 3}
    return AttentionConfig(**(sizes | options))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (router, {"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
        (
            router,
            {"experts_per_token": True},
            "experts_per_token must be a whole number of at least 1, got True",
        ),
        (router, {"score": "tanh"}, "score must be one of 'softmax', 'sigmoid', got 'tanh'"),
        (
            router,
            {"gate": "straight_through"},
            "experts_per_token must be 1 with gate 'straight_through', got 2",
        ),
        (router, {"num_groups": 4}, r"num_groups must divide num_experts \(6\), got 4"),
        (router, {"num_groups": 2, "groups_kept": 3}, r"groups_kept must be at most num_groups \(2\), got 3"),
        (
            router,
            {"num_groups": 6},
            r"groups_kept must leave at least experts_per_token \(2\) experts, got 1",
        ),
        (feed_forward, {"expert_dropout": 1.0}, r"expert_dropout must be in \[0, 1\), got 1.0"),
        (
            feed_forward,
            {"recompute_experts": True, "expert_dropout": 0.5},
            "recompute_experts must be False with expert_dropout, .*, got expert_dropout=0.5",
        ),
        (
            feed_forward,
            {"shared_intermediate_size": -1},
            "shared_intermediate_size must not be negative, got -1",
        ),
        (feed_forward, {"router": router(hidden_size=9)}, r"must equal hidden_size \(8\), got 9"),
        (attention, {"num_kv_heads": 3}, r"num_kv_heads must divide num_heads \(4\), got 3"),
        (attention, {"top_k": 4}, r"top_k must be between 1 and num_experts \(3\), got 4"),
        (attention, {"kv": "mine"}, "kv must be one of 'expert', 'shared', got 'mine'"),
    ],
)
def test_wrong_layer_settings_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
