"""Copies of one feed-forward: the same function as the dense model, in every format that can hold it."""

import json

import pytest
import torch
from close import assert_close_to_exact
from dense_models import tensors_of
from transformers import AutoModelForCausalLM

from moe_runtime.hf.loading import load_causal_lm
from upcycle import verify

# Families and the formats that hold them exactly.
EXACT = [
    ("llama", "moe_runtime"),
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "moe_runtime"),
    ("mistral", "mixtral"),
    ("mistral", "qwen2_moe"),
    ("qwen2", "moe_runtime"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "moe_runtime"),
    ("qwen3", "qwen3_moe"),
    ("cohere", "moe_runtime"),
    ("llama", "granitemoe"),
    ("granite", "granitemoe"),
    ("olmo2", "flex_olmo"),
    ("phi3-mini", "mixtral"),
    ("phi3-long", "mixtral"),
]


@pytest.mark.parametrize(("family", "target"), EXACT)
def test_logits_equal_the_dense_models(family, target, dense, run):
    """S1, through files; `verify` loads with transformers and refuses missing and unexpected tensors."""
    folder = run(method="copy", base=dense(family), experts=4, target=target, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    result = verify(folder)
    assert (result.target, result.not_equal_because) == (target, ())
    assert result.max_abs_diff < 1e-4
    assert result.max_abs_logit > 0.1
    assert result.passed


@pytest.mark.parametrize(("family", "target"), [pair for pair in EXACT if pair[1] != "moe_runtime"])
def test_transformers_saves_the_tensors_it_loaded(family, target, dense, run, tmp_path):
    folder = run(method="copy", base=dense(family), experts=2, target=target)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "again")
    written, again = tensors_of(folder), tensors_of(tmp_path / "again")
    assert written.keys() == again.keys()
    assert all(torch.equal(written[name], again[name]) for name in written)


VARIANTS = [
    pytest.param({"layers": "every_other"}, id="every-other-layer"),
    pytest.param({"layers": [0], "target": "qwen2_moe"}, id="one-layer-qwen2-moe"),
    pytest.param({"experts_per_token": 1, "router": {"gate": "straight_through"}}, id="straight-through"),
    pytest.param(
        {"experts_per_token": 3, "router": {"score": "sigmoid", "selection_bias": True}}, id="sigmoid-bias"
    ),
    pytest.param({"experts_per_token": 4, "router": {"gate": "raw"}}, id="raw-over-all"),
]


@pytest.mark.parametrize("recipe", VARIANTS)
def test_every_way_of_routing_that_keeps_the_function_does(recipe, dense, run):
    result = verify(run(method="copy", base=dense("llama"), experts=4, **recipe))
    assert result.must_be_equal
    assert result.max_abs_diff < 1e-4


def test_biases_and_tied_embeddings_are_kept(dense, run):
    source = dense("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    folder = run(method="copy", base=source, experts=2)
    assert "lm_head.weight" not in tensors_of(folder)
    assert verify(folder).max_abs_diff < 1e-4


def test_scaled_rope_of_either_file_style_is_kept(dense_copy, run):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    folder = dense_copy()
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0, "rope_scaling": rope}))
    for target in ("moe_runtime", "mixtral"):
        result = verify(run(target, method="copy", base=folder, experts=2, target=target))
        assert result.max_abs_diff < 1e-4


@pytest.mark.parametrize("target", ["moe_runtime", "qwen2_moe"])
def test_raw_gates_scale_the_dense_feed_forward(target, dense, run):
    """S2: out = (sum of the chosen scores) · dense(x)."""
    router = {"gate": "raw"}
    folder = run(method="copy", base=dense("llama"), experts=4, target=target, router=router)
    assert verify(folder).not_equal_because == ("router.gate 'raw' scales each expert's output by its score",)
    mixture, source = (
        load_causal_lm(folder).model.layers[1].mlp,
        load_causal_lm(dense("llama")).model.layers[1].mlp,
    )
    x_BLD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    router_ED = (mixture.router if target == "moe_runtime" else mixture.gate).weight

    def expected(dtype):
        probability_BLE = (x_BLD.to(dtype) @ router_ED.to(dtype).T).softmax(-1)
        return probability_BLE.topk(2).values.sum(-1, keepdim=True) * source.to(dtype)(x_BLD.to(dtype))

    with torch.no_grad():
        actual = mixture(x_BLD)
        actual = actual[0] if isinstance(actual, tuple) else actual
        assert_close_to_exact("y", actual, expected(torch.float32), expected(torch.float64))


def test_weights_in_16_bits_pass_through_bit_by_bit(dense, run):
    source = dense("llama", dtype=torch.bfloat16)
    folder = run(method="copy", base=source, experts=2, target="mixtral")
    before, after = tensors_of(source), tensors_of(folder)
    down = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    assert after[down].dtype == torch.bfloat16
    assert torch.equal(
        after[down].view(torch.int16), before["model.layers.1.mlp.down_proj.weight"].view(torch.int16)
    )
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(folder).max_abs_diff < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_chosen_type_rounds_as_torch_does(dtype, dense, run):
    source = dense("llama")
    folder = run(method="copy", base=source, experts=2, dtype=dtype)
    wanted = getattr(torch, dtype)
    after = tensors_of(folder)
    for name, tensor in tensors_of(source).items():
        if ".mlp." not in name:
            assert torch.equal(after[name], tensor.to(wanted)), name
    result = verify(folder)
    assert result.must_be_equal
    assert result.max_abs_diff < 1e-4


@pytest.mark.checkpoint
@pytest.mark.parametrize("target", ["moe_runtime", "mixtral"])
def test_a_real_model_keeps_its_logits(target, smollm2, run):
    folder = run(method="copy", base=smollm2, experts=2, target=target)
    result = verify(folder)
    assert result.max_abs_diff < 1e-4
    assert result.max_abs_diff_equal_gates < 1e-4
    assert result.max_abs_diff_float64 < 1e-4
    assert result.max_abs_logit > 10


@pytest.mark.checkpoint
def test_a_real_model_of_many_experts_keeps_its_logits(smollm2, run):
    result = verify(run(method="copy", base=smollm2, experts=8, target="mixtral"))
    assert result.max_abs_diff_equal_gates < 1e-4
    assert result.max_abs_diff_float64 < 1e-4
    assert result.passed
