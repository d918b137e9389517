"""Saving, loading and publishing: a saved folder loads anywhere the package is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BAM, DENSE, KINDS, MOE, tiny_model, tokens
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe_runtime import publishing
from moe_runtime.hf import MoeRuntimeConfig, MoeRuntimeForCausalLM, MoeRuntimeModel
from moe_runtime.hf.loading import load_causal_lm, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    model, ids = tiny_model(KINDS[kind]), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path)
    assert type(loaded) is MoeRuntimeForCausalLM
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_tied_embeddings_are_saved_once(tmp_path):
    model = tiny_model(DENSE, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_causal_lm(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_selection_bias_stays_float32_in_a_bfloat16_model(tmp_path):
    model = tiny_model(MOE, router_selection_bias=True)
    for layer in model.model.layers:
        layer.mlp.router.selection_bias += 0.001
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.layers[0].mlp.router.weight.dtype == torch.bfloat16
    bias = loaded.model.layers[0].mlp.router.selection_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, model.model.layers[0].mlp.router.selection_bias)
    assert loaded(tokens(1, 5)).logits.dtype == torch.bfloat16


def test_tensors_missing_from_a_checkpoint_start_as_in_a_new_model(tmp_path):
    """transformers builds the model without memory, so whatever nothing initialises is garbage."""
    options = {"norm": "layer_norm", "norm_bias": True, "qk_norm": "layer_norm", "mlp_bias": True}
    options |= {"attention_output_bias": True, "router_selection_bias": True}
    model = tiny_model(BAM, **options)
    model.save_pretrained(tmp_path)
    save_file({"model.norm.weight": model.model.norm.weight.detach()}, tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        if name == "model.norm.weight":
            assert torch.equal(value, model.model.norm.weight)
        elif name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert 0.1 < value.std() < 0.3, name
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_auto_classes_know_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is MoeRuntimeForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is MoeRuntimeModel
    assert type(AutoModelForCausalLM.from_config(MoeRuntimeConfig(**MOE))) is MoeRuntimeForCausalLM


def run_elsewhere(code: str, tmp_path: Path) -> dict:
    """Run code in a fresh interpreter that has the package, but imports nothing of it by hand."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_published_folder_loads_without_importing_the_package(tmp_path):
    model, folder = tiny_model(BAM), tmp_path / "published"
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["auto_map"] == publishing.AUTO_MAP
    assert saved["architectures"] == [publishing.ARCHITECTURE]
    assert saved["model_type"] == publishing.MODEL_TYPE
    for file in publishing.published_files():
        assert (folder / file.name).read_text() == file.read_text()
    code = f"""
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
options = dict(trust_remote_code=True)
config = AutoConfig.from_pretrained({str(folder)!r}, **options)
base = AutoModel.from_pretrained({str(folder)!r}, **options)
model, report = AutoModelForCausalLM.from_pretrained({str(folder)!r}, output_loading_info=True, **options)
logits = model(torch.arange(7)[None]).logits
model.save_pretrained({str(tmp_path / "again")!r})
print(json.dumps(dict(
    classes=[type(x).__name__ for x in (config, base, model)],
    home=type(model).__module__.split(".")[0],
    by_hand="moe_runtime.hf" in sys.modules,
    missing=sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]),
    logits=logits.tolist(),
)))
"""
    seen = run_elsewhere(code, tmp_path)
    assert seen["classes"] == ["MoeRuntimeConfig", "MoeRuntimeModel", "MoeRuntimeForCausalLM"]
    assert seen["home"] == "transformers_modules"
    assert seen["missing"] == []
    assert not seen["by_hand"]
    torch.testing.assert_close(torch.tensor(seen["logits"]), model(torch.arange(7)[None]).logits)
    # saved once more by its reader, it is still publishable
    again = tmp_path / "again"
    assert json.loads((again / "config.json").read_text())["auto_map"] == publishing.AUTO_MAP
    assert torch.equal(load_causal_lm(again)(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_publishing_facts_need_no_torch(tmp_path):
    code = """
import json, sys
from moe_runtime.publishing import AUTO_MAP, published_files
files = [str(file) for file in published_files()]
print(json.dumps(dict(torch="torch" in sys.modules, files=files, names=AUTO_MAP)))
"""
    seen = run_elsewhere(code, tmp_path)
    assert not seen["torch"]
    sources = {Path(file).stem: Path(file).read_text() for file in seen["files"]}
    for name in seen["names"].values():
        module, cls = name.split(".")
        assert f"class {cls}(" in sources[module]


class TestLoading:
    def test_any_family(self, tmp_path):
        config = LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path)
        loaded = load_causal_lm(tmp_path, dtype=torch.bfloat16, attention="eager")
        assert loaded.dtype == torch.bfloat16
        assert loaded.config._attn_implementation == "eager"

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere must be a checkpoint folder"):
            load_causal_lm(tmp_path / "nowhere")

    def test_missing_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"must hold a config\.json"):
            load_causal_lm(tmp_path)

    def test_unreadable_config(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json must be a JSON object"):
            load_causal_lm(tmp_path)

    def test_unknown_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
        with pytest.raises(ValueError, match=r"model_type in .*config\.json .* got 'abacus'"):
            load_causal_lm(tmp_path)

    def test_model_type_that_is_no_name(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": ["llama"]}')
        with pytest.raises(ValueError, match=r"model_type in .*config\.json .* got \['llama'\]"):
            load_causal_lm(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"model\.safetensors\.index\.json must be a JSON object"),
            ("{}", r"model\.safetensors\.index\.json must have a 'weight_map'"),
        ],
    )
    def test_unreadable_index(self, text, message, tmp_path):
        tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_causal_lm(tmp_path)

    def test_no_memory_is_not_called_a_wrong_shape(self, tmp_path, monkeypatch):
        def allocate(*args, **kwargs):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        tiny_model().save_pretrained(tmp_path)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", allocate)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            load_causal_lm(tmp_path)

    def test_missing_weights(self, tmp_path):
        MoeRuntimeConfig(**MOE).save_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="must hold model weights"):
            load_causal_lm(tmp_path)

    def test_missing_tokenizer(self, tmp_path):
        MoeRuntimeConfig(**MOE).save_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="must hold a tokenizer"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("model.norm.weight"), r"lack tensors: model\.norm\.weight"),
            (lambda w: w.update(extra=torch.ones(1)), "hold tensors without a place in the model: extra"),
            (lambda w: w.update({"model.norm.weight": torch.ones(3)}), "do not have the shapes"),
        ],
        ids=["missing", "unexpected", "wrong-shape"],
    )
    def test_weights_that_are_not_those_of_the_config(self, change, message, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_causal_lm(tmp_path)
