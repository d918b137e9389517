"""Adapters: what PEFT computes with them, and a sentence for every adapter that says more."""

import json
import shutil

import numpy as np
import pytest
import torch
from dense_models import tensors_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle import RecipeError, UpcycleError, recipe_from_dict
from upcycle.sources import AdapterSource, open_source

# PEFT asks transformers for an attribute that it is going to drop
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

MODULES = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def save_adapter(base, folder, *, seed=0, **options):
    """A LoRA adapter with random matrices, as PEFT saves one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": MODULES, **options})
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def read(source, name, step):
    shape = source.tensors[name].shape
    width, rows = shape[-1], shape[0]
    with source.open_rows() as reader:
        parts = [reader.rows(name, width, first, min(step, rows - first)) for first in range(0, rows, step)]
    return np.concatenate(parts)


def change_adapter_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"use_rslora": True}, id="rslora"),
    pytest.param(
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"gate_proj": 5, "layers.1.self_attn.q_proj": 7},
        },
        id="patterns",
    ),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_are_those_of_the_model_that_peft_merges(options, dense, tmp_path):
    base = dense("llama")
    source = open_source(save_adapter(base, tmp_path / "adapter", **options))
    expected = merged_by_peft(base, tmp_path / "adapter").state_dict()
    untouched = tensors_of(base)
    changed = 0
    for name in source.tensors:
        if len(source.tensors[name].shape) < 2:
            continue
        rows = torch.from_numpy(read(source, name, step=5))
        # one product of float32 numbers against another in other parts
        assert torch.allclose(rows, expected[name], rtol=0, atol=1e-6), name
        changed += not torch.equal(rows, untouched[name])
    assert changed == 3 * len(MODULES)


def test_a_tensor_may_be_read_in_any_width(dense, tmp_path):
    source = open_source(save_adapter(dense("llama"), tmp_path / "adapter"))
    name = "model.layers.0.mlp.gate_proj.weight"
    whole = read(source, name, step=48).ravel()
    with source.open_rows() as reader:
        assert np.allclose(reader.rows(name, 1, 45, 100).ravel(), whole[45:145], rtol=0, atol=1e-6)
        assert np.allclose(reader.rows(name, 64, 3, 2).ravel(), whole[192:320], rtol=0, atol=1e-6)


def test_experts_from_adapters_are_those_from_merged_models(dense, run, tmp_path):
    base = dense("llama")
    sources = []
    for seed in range(2):
        adapter = save_adapter(base, tmp_path / f"adapter{seed}", seed=seed)
        merged_by_peft(base, adapter).save_pretrained(tmp_path / f"merged{seed}")
        sources.append({"base": str(base), "adapter": str(adapter)})
    values = {"method": "btx", "output": str(tmp_path / "out"), "sources": sources}
    recipe = recipe_from_dict(values)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    result = upcycle.upcycle(recipe)
    merged = tensors_of(
        run("merged", method="btx", sources=[tmp_path / f"merged{seed}" for seed in range(2)])
    )
    for name, tensor in tensors_of(result.output).items():
        assert torch.allclose(tensor, merged[name], rtol=0, atol=1e-6), name
    record = json.loads((result.output / "upcycle.json").read_text())
    for seed, entry in enumerate(record["sources"]):
        assert entry["path"] == str(base)
        assert entry["adapter"]["path"] == str(tmp_path / f"adapter{seed}")
        assert list(entry["adapter"]["files"]) == ["adapter_model.safetensors"]
    assert upcycle.verify(result.output).not_equal_because == ("the sources differ",)


def test_a_copy_of_an_adapted_model_is_verified_against_it(dense, tmp_path):
    adapter = save_adapter(dense("llama"), tmp_path / "adapter")
    values = {"method": "copy", "base": str(adapter), "experts": 2, "output": str(tmp_path / "out")}
    output = upcycle.upcycle(recipe_from_dict(values)).output
    verified = upcycle.verify(output)
    assert verified.must_be_equal
    assert verified.passed
    change_adapter_config(adapter, lora_alpha=7)
    with pytest.raises(UpcycleError, match=r"adapter_config\.json has changed since .*out was made from it"):
        upcycle.verify(output)
    change_adapter_config(adapter, lora_alpha=6)
    assert upcycle.verify(output).passed
    weights = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UpcycleError, match=r"adapter_model\.safetensors has changed since"):
        upcycle.verify(output)


# --- refused ---


@pytest.fixture
def adapter(dense, tmp_path):
    return save_adapter(dense("llama"), tmp_path / "adapter")


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'; merge it into its base"),
        ({"use_dora": True}, "use_dora must be False, got True; merge it"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save must be None, got \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, got 'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out must be False, got True"),
        ({"r": 8}, r"says rank 8 and alpha 6 of \S+, whose matrices have rank 4"),
        ({"lora_alpha": None}, r"says rank 4 and alpha None of \S+"),
        ({"alpha_pattern": {"q.*": 3}}, r"pattern 'q\.\*' in adapter_config.json must be a module's name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_is_more_than_its_matrices_is_refused(changes, message, adapter):
    edit_config(adapter, **changes)
    with pytest.raises(UpcycleError, match=message):
        open_source(adapter)


def test_an_adapter_of_another_base_is_refused(adapter, dense, tmp_path):
    other = shutil.copytree(dense("llama", seed=1), tmp_path / "other")
    message = rf"adapter was trained on {dense('llama')}, not on {other}; where the two are one model, say so"
    with pytest.raises(UpcycleError, match=message):
        open_source(AdapterSource(str(other), str(adapter)))
    edit_config(adapter, base_model_name_or_path="someone/other")
    assert open_source(AdapterSource(str(other), str(adapter))).adapter is not None
    with pytest.raises(
        UpcycleError, match=r"base 'someone/other' is no folder here; write the source as \{base"
    ):
        open_source(adapter)
    edit_config(adapter, base_model_name_or_path=None)
    wider = dense("llama", intermediate_size=64)
    with pytest.raises(
        UpcycleError, match=r"which do not fit \(32, 64\) in .*it was trained on another model"
    ):
        open_source(AdapterSource(str(wider), str(adapter)))
    shallow = dense("llama", num_hidden_layers=2)
    with pytest.raises(
        UpcycleError, match=r"changes model\.layers\.2\.\S+, which .* has not; it was trained on"
    ):
        open_source(AdapterSource(str(shallow), str(adapter)))


def test_damaged_adapters_are_named(adapter, dense, run):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, path)
    with pytest.raises(
        UpcycleError, match=r"lora_B\.weight holds NaN or infinite values; use an adapter whose"
    ):
        run(method="copy", base=adapter, experts=2)
    save_file({k: tensor for k, tensor in tensors.items() if k != name}, path)
    with pytest.raises(UpcycleError, match="has one of its two matrices only"):
        open_source(adapter)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, path)
    with pytest.raises(UpcycleError, match=r"lm_head\.weight is no matrix of a plain LoRA adapter"):
        open_source(adapter)
    path.unlink()
    with pytest.raises(UpcycleError, match=r"holds no adapter_model\.safetensors with tensors in it"):
        open_source(adapter)


def test_an_adapter_on_an_adapter_is_refused(adapter):
    with pytest.raises(UpcycleError, match="the base of an adapter must be a folder of weights"):
        open_source(AdapterSource(str(adapter), str(adapter)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"base": "x"}, "key 'adapter' is missing under 'sources'"),
        ({"base": "x", "adapter": 3}, "adapter under 'sources' must be a text, got 3"),
        ({"base": "x", "adapter": "y", "scale": 2}, "unknown key 'scale' under 'sources'"),
        (3, "sources must be a text, got 3"),
    ],
)
def test_recipes_say_what_a_source_must_be(source, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict({"method": "btx", "output": "x", "sources": [source, "b"]})


def test_a_folder_with_a_model_and_an_adapter_says_not_which_is_meant(dense_copy, tmp_path):
    adapter = save_adapter(dense_copy(), tmp_path / "adapter")
    both = dense_copy(name="both")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, both)
    message = r"both holds a model and an adapter \(adapter_config\.json\); put the adapter into a folder"
    with pytest.raises(UpcycleError, match=message):
        open_source(both)
    for path in both.glob("model*"):
        path.unlink()
    assert open_source(both).adapter is not None  # beside a config.json without weights it is one
