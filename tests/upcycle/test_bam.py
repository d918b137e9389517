"""Attention experts through files: every head reads what it read in its source."""

import pytest
import torch
from close import assert_close_to_exact
from dense_models import tensors_of

from moe_runtime.hf.loading import load_causal_lm
from upcycle import verify

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "cohere"]
# and families whose attention has what a mixture could get wrong: norms over all heads, another scale
ATTENTIONS = [*FAMILIES, "olmo2", "granite"]
LAYER = 1


def attend(model, x_BLD):
    """One layer's attention on its own, in our model or a family's."""
    attention = model.model.layers[LAYER].self_attn
    positions = torch.arange(x_BLD.shape[1])[None]
    rotary = model.model.rotary_emb(x_BLD, positions)
    window = model.config.sliding_window if "sliding_window" in model.config.to_dict() else None
    mask = causal_mask(x_BLD.shape[1], window)
    if hasattr(model.config, "attention_kv"):
        return attention(x_BLD, rotary, attention_mask=mask)
    return attention(hidden_states=x_BLD, position_embeddings=rotary, attention_mask=mask)[0]


def causal_mask(length, window):
    age = torch.arange(length)[:, None] - torch.arange(length)
    return ((age >= 0) & (age < (window or length)))[None, None]


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", ATTENTIONS)
def test_an_attention_expert_alone_is_its_sources_attention(family, kv, dense, run, monkeypatch):
    """T4 through files, with fewer key-value than query heads: a head in the wrong place would show."""
    sources = [dense(family, seed=seed) for seed in range(3)]
    model = load_causal_lm(run(method="bam", sources=sources, attention={"kv": kv}))
    x_BLD = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    router = model.model.layers[LAYER].self_attn.router
    for expert in range(3):
        source = load_causal_lm(sources[expert])
        if kv == "shared":
            average_keys_and_values(source, sources)
        chosen_A = torch.zeros(3)
        chosen_A[expert] = 1.0
        monkeypatch.setattr(router, "forward", lambda x_TD, gate_A=chosen_A: gate_A.expand(len(x_TD), -1))
        with torch.no_grad():
            actual, same = attend(model, x_BLD), attend(source, x_BLD)
            exact = attend(source.double(), x_BLD.double())
        assert_close_to_exact(f"expert {expert}", actual, same, exact)


def average_keys_and_values(model, sources):
    parts = [tensors_of(source) for source in sources]
    prefix = f"model.layers.{LAYER}.self_attn."
    state = model.state_dict()
    for name in state:
        if name.startswith((prefix + "k_", prefix + "v_")):
            state[name].copy_((parts[0][name] + parts[1][name] + parts[2][name]) / 3)


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_sources_keep_the_function(family, kv, dense, run):
    """T1: soft gates sum to 1, whatever the router says. Cohere's blocks are BAM's own, parallel."""
    router = {"gate": "straight_through"}
    folder = run(method="bam", sources=[dense(family)] * 3, attention={"kv": kv}, router=router)
    result = verify(folder)
    assert result.must_be_equal
    assert result.max_abs_diff < 1e-4


def test_renormalised_top_k_attention_keeps_the_function_too(dense, run):
    router = {"gate": "straight_through"}
    for renormalise in (True, False):
        attention = {"top_k": 2, "renormalise_top_k": renormalise}
        folder = run(
            f"{renormalise}", method="bam", sources=[dense("llama")] * 3, attention=attention, router=router
        )
        result = verify(folder)
        assert result.must_be_equal == renormalise
        assert (result.max_abs_diff < 1e-4) == renormalise
        assert result.passed


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_raw_top_1_scales_the_dense_feed_forward(family, dense, run):
    """T2: M = max(p) · FFN(x)."""
    folder = run(method="bam", sources=[dense(family)] * 3)
    assert verify(folder).not_equal_because == ("router.gate 'raw' scales each expert's output by its score",)
    mixture, source = (load_causal_lm(path).model.layers[LAYER].mlp for path in (folder, dense(family)))
    x_BLD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))

    def expected(dtype):
        probability_BLE = (x_BLD.to(dtype) @ mixture.router.weight.to(dtype).T).softmax(-1)
        return probability_BLE.amax(-1, keepdim=True) * source.to(dtype)(x_BLD.to(dtype))

    with torch.no_grad():
        actual = mixture(x_BLD)[0]
        assert_close_to_exact("y", actual, expected(torch.float32), expected(torch.float64))


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_keys_and_values_are_stacked_or_averaged(kv, dense, run):
    """T9."""
    sources = [dense("cohere", seed=seed) for seed in range(2)]
    first, second = (tensors_of(source) for source in sources)
    mixed = tensors_of(run(method="bam", sources=sources, attention={"kv": kv}))
    for part in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight"):
        name = f"model.layers.2.self_attn.{part}"
        own = torch.cat([first[name], second[name]])
        assert torch.equal(mixed[name], own if kv == "expert" else (first[name] + second[name]) / 2), name
    bias = "model.layers.2.self_attn.o_proj.bias"
    assert torch.equal(mixed[bias], torch.stack([first[bias], second[bias]]))


def test_one_norm_for_all_heads_becomes_a_row_per_head(dense, run):
    sources = [dense("qwen3", seed=seed) for seed in range(2)]
    first, second = (tensors_of(source) for source in sources)
    mixed = tensors_of(run(method="bam", sources=sources, attention={"kv": "shared"}))
    query, key = (f"model.layers.0.self_attn.{name}_norm.weight" for name in "qk")
    # Stored [key-value head][expert][head in group]: two heads of one source, then two of the other.
    expected = torch.stack([first[query]] * 2 + [second[query]] * 2).repeat(2, 1)
    assert torch.equal(mixed[query], expected)
    assert torch.equal(mixed[key], ((first[key] + second[key]) / 2).expand(2, -1))


@pytest.mark.checkpoint
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_a_real_model_keeps_its_logits(kv, smollm2, run):
    router = {"gate": "straight_through"}
    result = verify(run(method="bam", sources=[smollm2] * 2, attention={"kv": kv}, router=router))
    assert result.must_be_equal
    # The source itself is up to 2e-4 away from its float64 logits, which reach 36.
    assert result.max_abs_diff < result.tolerance < 1e-3
    assert result.max_abs_diff_float64 < 1e-4
