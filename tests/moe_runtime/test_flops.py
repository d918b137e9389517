"""Parameters and FLOPs against published counts, the algebra of matching, and PyTorch's counter."""

from dataclasses import replace

import pytest
import torch
from moe_runtime_kernels.flop_formulas import register_flop_formulas
from torch.utils.flop_counter import FlopCounterMode

from moe_runtime.config import ModelConfig
from moe_runtime.flops import (
    attention_pairs,
    compute_matched_tokens,
    decode_bytes,
    decode_flops,
    expected_experts,
    kv_cache_bytes,
    layer_flops,
    match_dense,
    matched_regimes,
    model_cost,
    model_flops,
    model_parameters,
    six_n,
    training_flops,
)
from moe_runtime.flops_report import describe_block
from moe_runtime.hf import MoeRuntimeConfig, MoeRuntimeForCausalLM
from moe_runtime.shapes import SHAPES, named_shape

TOTAL = {
    "bam-small-dense": 587_209_728,
    "bam-small-expert-kv": 776_002_560,
    "bam-small-shared-kv": 738_253_824,
    "bam-small-btx": 700_480_512,
    "bam-large-dense": 1_991_289_600,
    "bam-large-expert-kv": 6_195_886_848,
    "mixtral-8x7b": 46_702_792_704,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
}
ACTIVE = {
    "bam-small-dense": 587_209_728,
    "bam-small-btx": 587_234_304,
    # The paper prints 662,731,776: it counts one of the two routers of each block, 6 * 4 * 1024 fewer.
    "bam-small-expert-kv": 662_756_352,
    # The paper prints 612,400,128: no shared keys and values (2 * 6 * 1024 * 1024) and one router, 24,576.
    "bam-small-shared-kv": 625_007_616,
    "bam-large-expert-kv": 2_756_033_280,
    "mixtral-8x7b": 12_879_925_248,
    "qwen1.5-moe-a2.7b": 2_689_173_504,
}
# Forward FLOPs per token and layer at 256 tokens in the paper's table, "half" convention.
PAPER_LAYER = {
    "bam-small-btx": 21_510_144,
    "bam-small-expert-kv": 48_257_024,
    "bam-small-btx-6e-top3": 46_692_352,
}


@pytest.mark.parametrize("name", TOTAL)
def test_total_parameters_are_the_published_ones(name):
    assert model_parameters(named_shape(name)).total() == TOTAL[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_the_published_ones(name):
    assert model_parameters(named_shape(name), active=True).total() == ACTIVE[name]


def test_the_paper_s_active_counts_differ_by_what_they_leave_out():
    router = 6 * 4 * 1024
    assert ACTIVE["bam-small-expert-kv"] - router == 662_731_776
    assert ACTIVE["bam-small-shared-kv"] - router - 6 * 2 * 1024 * 1024 == 612_400_128


@pytest.mark.parametrize(
    ("name", "expected"),
    [("btx", 8_912_896), ("expert-kv", 35_651_584), ("shared-kv", 23_068_672)],
)
def test_attention_flops_of_a_bam_layer(name, expected):
    flops = layer_flops(named_shape(f"bam-small-{name}"), 0, 256, "half")
    assert flops["attention"] + flops["attention_scores"] == expected


def test_router_and_expert_flops_of_a_bam_layer():
    flops = layer_flops(named_shape("bam-small-expert-kv"), 0, 256, "half")
    assert flops["router"] == flops["attention_router"] == 8_192
    assert flops["experts"] == 12_582_912
    assert layer_flops(named_shape("bam-small-btx-6e-top3"), 0, 256)["experts"] == 3 * 12_582_912


@pytest.mark.parametrize("name", PAPER_LAYER)
def test_layer_flops_are_the_paper_s_without_its_unexplained_term(name):
    config = named_shape(name)
    unexplained = (
        6_144 * config.num_experts_per_tok
    )  # the paper adds this to its experts and does not say why
    assert layer_flops(config, 0, 256, "half").total() + unexplained == PAPER_LAYER[name]


@pytest.mark.parametrize("context", [1, 2, 7, 256])
def test_conventions_against_their_formulas(context):
    config = named_shape("bam-small-dense")
    n, width = context, 8 * 128
    expected = {"full": 4 * n * width, "causal": 2 * (n + 1) * width, "half": 2 * n * width}
    assert {c: layer_flops(config, 0, n, c)["attention_scores"] for c in expected} == expected


@pytest.mark.parametrize(("context", "window"), [(1, 1), (5, 1), (5, 3), (5, 5), (5, 9), (64, 17)])
def test_causal_pairs_with_a_window_are_those_a_mask_leaves(context, window):
    pairs = sum(1 for q in range(context) for k in range(context) if q - window < k <= q)
    assert attention_pairs(context, "causal", window) == pairs
    assert attention_pairs(context, "full", window) == context**2
    # `half` leaves out half of the diagonal, and of the far edge nothing
    assert attention_pairs(context, "half", window) == pairs - min(window, context) / 2


def test_sliding_layers_cost_less_than_full_ones():
    config = replace(
        named_shape("bam-small-dense"),
        sliding_window=32,
        layer_types=("sliding_attention", "full_attention") * 3,
    )
    sliding, full = layer_flops(config, 0, 256), layer_flops(config, 1, 256)
    assert full["attention_scores"] == 2 * 257 * 1024
    assert sliding["attention_scores"] == round(4 * 1024 * (32 * 256 - 31 * 16) / 256)
    assert kv_cache_bytes(config, 256) == 3 * (32 + 256) * 2 * 1024 * 2
    assert decode_flops(config, 256)["attention_scores"] == 3 * 4 * (32 + 256) * 1024


@pytest.mark.parametrize(("name", "heads"), [("expert-kv", 4 * 8), ("shared-kv", 8), ("btx", 8)])
def test_cache_bytes_count_every_key_value_head(name, heads):
    assert kv_cache_bytes(named_shape(f"bam-small-{name}"), 1, 2) == 6 * 2 * heads * 128 * 2


def test_training_is_three_or_four_times_forward_and_near_six_n():
    config = named_shape("mixtral-8x7b")
    forward = model_flops(config, 128).total()
    assert training_flops(config, 128) == 3 * forward
    assert training_flops(config, 128, recompute=True) == 4 * forward
    assert six_n(config) == 6 * (ACTIVE["mixtral-8x7b"] - 32_000 * 4096)
    assert training_flops(config, 128) == pytest.approx(six_n(config), rel=0.01)
    tied = replace(config, tie_word_embeddings=True)  # one table, and it is the head
    assert six_n(tied) == six_n(config)


def test_components_add_up_over_layers():
    config = replace(named_shape("qwen1.5-moe-a2.7b"), moe_layers=(1, 3), num_hidden_layers=4)
    flops = model_flops(config, 64)
    assert flops["feed_forward"] == 2 * 6 * 2048 * 5632
    assert flops["experts"] == 2 * 4 * 6 * 2048 * 1408
    assert flops["shared_expert"] == 2 * (6 * 2048 * 5632 + 2 * 2048)
    assert flops.total() == sum(layer_flops(config, layer, 64).total() for layer in range(4)) + flops["head"]


# --- decoding ---


def test_expected_experts_is_exact_where_it_can_be():
    assert expected_experts(8, 2, 0) == 0
    assert expected_experts(8, 2, 1) == pytest.approx(2)
    assert expected_experts(4, 4, 1) == 4
    # two tokens, one of two experts each: the same half of the time
    assert expected_experts(2, 1, 2) == pytest.approx(1.5)


def test_one_token_reads_its_active_weights_and_a_large_batch_all():
    config = named_shape("mixtral-8x7b")
    unread = 32_000 * 4096  # the input table, but for one row per sequence
    one = decode_bytes(config, 1000, batch_size=1, bytes_per_value=2)
    assert one.weights == 2 * (ACTIVE["mixtral-8x7b"] - unread + 4096)
    assert one.cache_read == 1000 * one.cache_written == 1000 * kv_cache_bytes(config)
    many = decode_bytes(config, 1000, batch_size=4096, bytes_per_value=2)
    assert many.weights == 2 * (TOTAL["mixtral-8x7b"] - unread + 4096 * 4096)
    assert many.total == many.weights + 4096 * (one.cache_read + one.cache_written)


def test_a_tied_table_is_read_once_as_the_head():
    config = named_shape("bam-large-dense")
    assert decode_bytes(config, 1, 1, 1).weights == TOTAL["bam-large-dense"] + config.hidden_size


def test_decode_flops_are_full_attention_of_one_query():
    config = named_shape("bam-small-expert-kv")
    full = model_flops(config, 512, "full")
    assert decode_flops(config, 512) == full


# --- dense baselines ---


@pytest.mark.parametrize("name", [name for name in SHAPES if "dense" not in name])
@pytest.mark.parametrize("on", ["active_flops", "active_parameters", "total_parameters"])
def test_matched_dense_model_is_the_nearest_one(name, on):
    config = named_shape(name)

    def miss(dense):
        cost = model_cost(dense, 256), model_cost(config, 256)
        field = "forward_flops" if on == "active_flops" else on
        return getattr(cost[0], field) - getattr(cost[1], field)

    match = match_dense(config, on, context=256)
    width = match.config.intermediate_size
    assert match.config.num_experts == 0
    assert match.config.num_attention_experts == 1
    assert match.residual == miss(match.config)
    for neighbour in (width - 1, width + 1):
        assert abs(match.residual) <= abs(miss(replace(match.config, intermediate_size=neighbour)))


def test_width_match_is_the_dense_model_that_upcycling_started_from():
    for name in ("btx", "expert-kv", "shared-kv"):
        match = match_dense(named_shape(f"bam-small-{name}"), "width")
        assert model_parameters(match.config) == model_parameters(named_shape("bam-small-dense"))


def test_a_dense_model_matches_itself():
    config = named_shape("bam-large-dense")
    for on in ("active_flops", "active_parameters", "total_parameters", "width"):
        match = match_dense(config, on)
        assert match.config.intermediate_size == config.intermediate_size
        assert match.residual == 0


def test_biases_norms_and_odd_parts_are_counted():
    config = ModelConfig(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=5,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_attention_experts=2,
        attention_bias=True,
        attention_output_bias=True,
        qk_norm="rms_norm",
        gated_mlp=False,
        mlp_bias=True,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=7,
        norm="layer_norm",
        norm_bias=True,
    )
    assert dict(model_parameters(config)) == {
        "attention": 2 * 6 * 16 + 2 * 6 * 8 + (16 + 8 + 8) + 2 * 6,
        "attention_router": 2 * 6,
        "router": 3 * 6,
        "experts": 3 * (2 * 6 * 7 + 7 + 6),
        "norms": 3 * 12 + 16 + 8,
        "embedding": 66,
        "head": 66,
    }


# --- regimes ---


def test_regimes_name_what_is_equal():
    config = named_shape("bam-small-expert-kv")
    flops, width = match_dense(config, context=256).config, match_dense(config, "width").config
    total = match_dense(config, "total_parameters").config
    regimes = {
        "flops": matched_regimes(config, 1000, flops, 1000, context=256),
        "width": matched_regimes(config, 1000, width, 1000, context=256),
        "total": matched_regimes(config, 1000, total, 900, context=256),
    }
    assert regimes["flops"] == ("data_matched", "compute_matched", "active_parameter_matched")
    assert regimes["width"] == ("data_matched",)
    assert regimes["total"] == ("total_parameter_matched",)


def test_compute_matched_tokens_spend_the_same_flops():
    config, dense = named_shape("bam-small-expert-kv"), named_shape("bam-small-dense")
    tokens = compute_matched_tokens(config, 1_000_000, dense, context=256)
    spent, budget = tokens * training_flops(dense, 256), 1_000_000 * training_flops(config, 256)
    assert 0 <= budget - spent < training_flops(dense, 256)
    assert "compute_matched" in matched_regimes(config, 1_000_000, dense, tokens, context=256, tolerance=1e-6)


# --- PyTorch's counter on real models ---

DENSE = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
MOE = replace(DENSE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
BAM = replace(
    MOE,
    num_experts_per_tok=1,
    router_gate="raw",
    num_attention_experts=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)
TOP_2_OF_3 = {
    "num_attention_experts": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "attention_top_k": 2,
}
SHARED_KV = {"attention_kv": "shared", "num_key_value_heads": 2}
PARALLEL = {"block": "parallel", "num_norms": 1, "norm": "layer_norm"}
MODELS = {
    "dense": DENSE,
    "dense-parallel-tied": replace(DENSE, **PARALLEL, tie_word_embeddings=True),
    "dense-biases-no-gate": replace(
        DENSE,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        hidden_act="gelu",
    ),
    "moe": MOE,
    "moe-some-layers": replace(MOE, moe_layers=(1,), qk_norm="rms_norm"),
    "moe-shared": replace(MOE, shared_expert_intermediate_size=20, shared_expert_gate=True, mlp_bias=True),
    "bam-expert-kv": BAM,
    "bam-expert-kv-parallel": replace(BAM, **PARALLEL),
    "bam-expert-kv-top-k": replace(BAM, **TOP_2_OF_3),
    "bam-expert-kv-top-k-biases": replace(BAM, **TOP_2_OF_3, attention_bias=True, attention_output_bias=True),
    "bam-shared-kv": replace(BAM, attention_kv="shared", num_key_value_heads=2),
    "bam-shared-kv-top-k": replace(BAM, **TOP_2_OF_3 | SHARED_KV, qk_norm="rms_norm"),
    "bam-shared-kv-top-all": replace(BAM, **SHARED_KV, attention_top_k=2, attention_output_bias=True),
    "bam-shared-kv-parallel": replace(BAM, **PARALLEL, attention_kv="shared", num_key_value_heads=2),
    "bam-some-layers-biases": replace(
        BAM,
        attention_mixture_layers=(0, 2),
        attention_bias=True,
        attention_output_bias=True,
        norm="layer_norm",
        norm_bias=True,
    ),
    "sliding-window": replace(MOE, sliding_window=4),
}
BATCH, LENGTH = 2, 9


def build(config, attention):
    torch.manual_seed(0)
    config = MoeRuntimeConfig.from_model_config(config)
    config._attn_implementation = attention
    return MoeRuntimeForCausalLM(config).train()


def counted(model, *, backward):
    register_flop_formulas()
    token_ids = torch.randint(DENSE.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        logits = model(token_ids, use_cache=False).logits
        if backward:
            logits.backward(torch.randn(logits.shape))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name):
    model = build(MODELS[name], "sdpa")
    assert model_parameters(MODELS[name]).total() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_are_those_pytorch_counts(name, attention):
    tokens = BATCH * LENGTH
    expected = tokens * model_flops(MODELS[name], LENGTH, "full").total()
    assert counted(build(MODELS[name], attention), backward=False) == expected


@pytest.mark.parametrize("name", MODELS)
def test_training_flops_are_those_pytorch_counts(name):
    expected = BATCH * LENGTH * training_flops(MODELS[name], LENGTH, "full")
    assert counted(build(MODELS[name], "eager"), backward=True) == expected


@pytest.mark.parametrize("name", MODELS)
def test_fused_attention_computes_its_scores_again_in_backward(name):
    """Backward is 5 products for the 2 of forward, where 4 are charged: half of the scores' FLOPs more."""
    config, tokens = MODELS[name], BATCH * LENGTH
    again = model_flops(config, LENGTH, "full")["attention_scores"] // 2
    expected = tokens * (training_flops(config, LENGTH, "full") + again)
    assert counted(build(config, "sdpa"), backward=True) == expected


@pytest.mark.parametrize("name", ["dense", "moe-shared", "bam-shared-kv-parallel"])
def test_checkpointing_recomputes_the_layers(name):
    """Not the head, and not a dense layer's last product: PyTorch stops when backward has what it needs."""
    config = MODELS[name]
    model = build(config, "eager")
    # the new name from transformers 5.18 on, where the old one warns
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    not_again = model_flops(config, LENGTH)["head"]
    if config.num_experts == 0:
        not_again += config.num_hidden_layers * 2 * config.hidden_size * config.intermediate_size
    expected = BATCH * LENGTH * (training_flops(config, LENGTH, "full", recompute=True) - not_again)
    assert counted(model, backward=True) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dense", "sequential, 4 heads, dense 28"),
        ("bam-expert-kv-parallel", "parallel, 2 x 4 heads (expert kv), experts 1 of 5 x 12"),
        ("bam-shared-kv-top-k", "sequential, 2 of 3 x 4 heads (shared kv), experts 1 of 5 x 12"),
    ],
)
def test_a_layer_in_words(name, words):
    assert describe_block(MODELS[name].block_config(0)) == words


# --- errors ---


def test_errors_name_the_argument():
    config = named_shape("bam-small-dense")
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        model_flops(config, 0)
    with pytest.raises(ValueError, match="convention must be one of full, causal, half, got 'exact'"):
        model_flops(config, 8, "exact")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        decode_bytes(config, 8, 0)
    with pytest.raises(ValueError, match=r"on must be one of active_flops, .*, got 'flops'"):
        match_dense(config, "flops")
    with pytest.raises(ValueError, match="no shape is named 'mixtral-8x7'; did you mean 'mixtral-8x7b'"):
        named_shape("mixtral-8x7")
    with pytest.raises(ValueError, match="no shape is named 'zz'; known: bam-small, bam-small-dense, "):
        named_shape("zz")
