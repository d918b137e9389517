"""`verify` fails what it should fail, and says why where it has no right to."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_runtime.hf.loading
from moe_runtime.config import ModelConfig
from upcycle import UpcycleError, recipe_from_dict, upcycle, verify
from upcycle.verify import differences

SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def record(*files, assignment=None):
    sources = [{"path": "x", "files": {"model.safetensors": file}} for file in files]
    rest = list(range(len(files)))
    return {
        "sources": sources,
        "base": 0,
        "assignment": assignment or {"feed_forward": rest, "attention": None, "rest": rest},
    }


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, 0),
        ({"router_gate": "straight_through", "num_experts_per_tok": 1}, 0),
        ({"router_gate": "raw", "num_experts_per_tok": 4}, 0),
        ({"router_gate": "raw"}, 1),
        ({"router_gate": "raw", "num_experts_per_tok": 4, "router_score": "sigmoid"}, 1),
        ({"router_scale": 2.0}, 1),
        ({"num_attention_experts": 2, "attention_top_k": 1}, 1),
        ({"num_attention_experts": 2, "attention_top_k": 2}, 0),
        ({"num_attention_experts": 2, "attention_top_k": 1, "attention_top_k_renorm": True}, 0),
    ],
)
def test_gates_that_sum_to_one_keep_the_function(changes, reasons):
    assert len(differences(record("same", "same"), ModelConfig(**{**SIZES, **changes}))) == reasons


def test_sources_are_equal_by_their_hashes():
    model = ModelConfig(**SIZES)
    assert differences(record("a", "b"), model) == ("the sources differ",)
    only_first = {"feed_forward": [0, 0], "attention": None, "rest": [0]}
    assert differences(record("a", "b", assignment=only_first), model) == ()


def test_a_changed_weight_fails(dense, run):
    folder = run(method="copy", base=dense("llama"), experts=2)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.experts.down_proj"][0, 0, 0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    result = verify(folder)
    assert result.must_be_equal
    assert result.max_abs_diff > result.tolerance
    assert result.max_abs_diff_float64 > 1e-4
    assert not result.passed
    as_rounded = replace(result, max_abs_diff=0.0)  # as if float32 had hidden it
    assert not as_rounded.passed
    assert not replace(result, max_abs_diff_float64=0.0).passed


@pytest.mark.parametrize("tensor", ["mlp.experts.down_proj", "mlp.router.weight", "self_attn.q_proj.weight"])
@pytest.mark.parametrize("method", ["drop", "btx"])
def test_a_tensor_that_the_recipe_does_not_make_fails_where_logits_may_differ(method, tensor, dense, run):
    if method == "drop":
        folder = run(method="drop", base=dense("llama"), experts=2, drop={"ratio": 0.5})
    else:
        folder = run(method="btx", sources=[dense("llama", seed=seed) for seed in range(2)])
    assert verify(folder).other_tensors == ()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.1.{tensor}"
    tensors[name].view(-1)[-1] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    result = verify(folder)
    assert not result.must_be_equal
    assert result.other_tensors == (name,)
    assert not result.passed


def test_experts_of_any_width_are_compared(dense, run):
    folder = run(
        method="shared_expert",
        base=dense("llama"),
        experts=2,
        target="qwen2_moe",
        shared_expert={"expert_width": 7},
    )
    assert verify(folder).passed


def test_a_recipe_with_relative_paths_is_found_again(dense, tmp_path, monkeypatch):
    source = dense("llama")
    monkeypatch.chdir(source.parent)
    recipe = {"method": "copy", "base": source.name, "experts": 2, "output": str(tmp_path / "out")}
    folder = upcycle(recipe_from_dict(recipe)).output
    monkeypatch.chdir(tmp_path)
    assert verify(folder).other_tensors == ()


def test_equal_gates_show_what_rounding_of_gates_hides(dense, run):
    source = dense("llama")
    folder = run(method="copy", base=source, experts=8, target="mixtral")
    result = verify(folder)
    assert result.passed
    assert result.max_abs_diff > 0
    assert result.max_abs_diff_equal_gates < 1e-5
    assert not replace(result, max_abs_diff_equal_gates=0.1).passed


def test_equal_gates_of_another_sum_are_another_function(dense, run):
    result = verify(run(method="copy", base=dense("llama"), experts=4, router={"gate": "raw"}))
    assert result.max_abs_diff_equal_gates > 1e-2  # two gates of a quarter each


def test_products_are_precise_whatever_the_process_asked_for(dense, run, monkeypatch):
    seen, products = set(), torch.backends.mkldnn.matmul
    load = moe_runtime.hf.loading.load_causal_lm

    def spy(*arguments, **options):
        seen.add(products.fp32_precision)
        return load(*arguments, **options)

    monkeypatch.setattr(moe_runtime.hf.loading, "load_causal_lm", spy)
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        assert verify(run(method="copy", base=dense("llama"), experts=2)).passed
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = before
    assert seen == {"ieee"}


def test_logits_that_are_not_finite_fail_where_no_equality_is_asked(dense, run):
    folder = run(method="btx", sources=[dense("llama", seed=seed) for seed in range(2)])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    result = verify(folder)
    assert not result.must_be_equal
    assert not result.passed


def test_missing_tensors_are_named(dense, run):
    folder = run(method="copy", base=dense("llama"), experts=2)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.router.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack tensors: model\.layers\.1\.mlp\.router\.weight"):
        verify(folder)


def test_a_folder_of_another_kind_is_named(dense, tmp_path):
    with pytest.raises(UpcycleError, match="nowhere: there is no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(
        UpcycleError, match=r"holds no upcycle\.json; verify takes a folder that upcycle wrote"
    ):
        verify(dense("llama"))


@pytest.mark.parametrize("content", ["{}", '{"sources": [], "base": 0}', '{"sources": 3, "base": "a"}'])
def test_a_damaged_record_is_named(content, dense, run):
    folder = run(method="copy", base=dense("llama"), experts=2)
    (folder / "upcycle.json").write_text(content)
    with pytest.raises(UpcycleError, match=r"upcycle\.json is damaged; run the recipe again"):
        verify(folder)


def test_the_base_is_found_from_another_folder(dense, run, tmp_path, monkeypatch):
    source = dense("llama")
    monkeypatch.chdir(source.parent)
    folder = run(method="copy", base=source.name, experts=2)
    monkeypatch.chdir(tmp_path)
    assert verify(folder).passed


def test_a_base_that_changed_or_went_is_named(dense_copy, run):
    source = dense_copy(shard="1GB")
    folder = run(method="copy", base=source, experts=2)
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, path)
    with pytest.raises(UpcycleError, match=r"model\.safetensors has changed since .*out was made from it"):
        verify(folder)
    path.rename(source / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UpcycleError, match=r"model\.safetensors has changed since .*out was made from it"):
        verify(folder)
    source.rename(source.with_name("moved"))
    with pytest.raises(UpcycleError, match="damaged: there is no such checkpoint folder"):
        verify(folder)


def test_the_result_is_plain_values(dense, run):
    result = verify(run(method="copy", base=dense("llama"), experts=2)).to_dict()
    assert json.loads(json.dumps(result)) | {"not_equal_because": (), "other_tensors": ()} == result
    assert (result["passed"], result["must_be_equal"], result["method"]) == (True, True, "copy")
