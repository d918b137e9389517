"""Every dense family through files: the same function, the same text, whatever its tensors are called."""

import json
import math
from itertools import cycle

import pytest
import torch
from dense_models import SIZES, TRAITS, VARIANTS, dense_model, randomised, tensors_of
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_runtime.families import DENSE_FAMILIES, model_config
from moe_runtime.flops import model_parameters
from moe_runtime.hf.loading import load_causal_lm
from upcycle import UpcycleError, verify
from upcycle.names import dense_shapes
from upcycle.sources import open_source
from upcycle.stored import stored_shapes, under_our_names

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = [*TRAITS, *VARIANTS]
# The first families have these tests, with more targets, in test_sparse_copy.py and test_bam.py.
LATER = [name for name in FAMILIES if name not in ("llama", "mistral", "qwen2", "qwen3", "cohere")]


def test_every_family_is_tested():
    assert set(TRAITS) == set(DENSE_FAMILIES)


@pytest.mark.parametrize("family", LATER)
def test_a_copy_is_the_dense_model(family, dense, run):
    folder = run(method="copy", base=dense(family), experts=3)
    result = verify(folder)
    assert result.not_equal_because == ()
    assert result.max_abs_diff < 1e-4
    assert result.max_abs_diff_float64 < 1e-4
    assert result.max_abs_logit > 0.2
    ids = torch.arange(5, 21)[None]
    for model in (models := [load_causal_lm(path) for path in (dense(family), folder)]):
        model.generation_config.eos_token_id = None
    expected, actual = (model.generate(ids, max_new_tokens=6, do_sample=False) for model in models)
    assert torch.equal(actual, expected)


ALTERNATELY = list(zip([name for name in LATER if name in TRAITS], cycle(["shared", "expert"]), strict=False))


@pytest.mark.parametrize(("family", "kv"), ALTERNATELY)
def test_a_mixture_of_equal_attentions_is_the_dense_model(family, kv, dense, run):
    router = {"gate": "straight_through"}
    folder = run(method="bam", sources=[dense(family)] * 2, attention={"kv": kv}, router=router)
    parallel = ("cohere2", "gpt_neox", "phi", "gptj", "falcon")
    assert json.loads((folder / "config.json").read_text())["block"] == (
        "parallel" if family in parallel else "sequential"
    )
    result = verify(folder)
    assert result.must_be_equal
    assert result.max_abs_diff < 1e-4


METHODS = [
    pytest.param({"method": "granular", "experts": 4, "granular": {"shards": 2}}, id="granular"),
    pytest.param({"method": "drop", "experts": 3, "drop": {"ratio": 0.0}}, id="permuted"),
    pytest.param(
        {"method": "shared_expert", "experts": 3, "shared_expert": {"expert_width": 16}}, id="shared-expert"
    ),
]


@pytest.mark.parametrize("recipe", METHODS)
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_every_method_that_keeps_the_function_keeps_that_of_fused_and_ungated_families(
    family, recipe, dense, run
):
    result = verify(run(base=dense(family), **recipe))
    assert result.must_be_equal
    assert result.max_abs_diff < 1e-4


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "falcon-new"])
def test_branches_of_families_with_fused_tensors_are_averaged_part_by_part(family, dense, run):
    sources = [dense(family, seed=seed) for seed in range(2)]
    mixed = tensors_of(run(method="btx", sources=sources))
    first, second = (ours(source) for source in sources)
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"):
        name = f"model.layers.1.{name}"
        assert torch.equal(mixed[name], (first[name] + second[name]) / 2), name
    up = "model.layers.1.mlp.up_proj.weight"
    width = len(first[up])
    for expert, source in enumerate((first, second)):
        experts = mixed["model.layers.1.mlp.experts.gate_up_proj"]
        assert torch.equal(experts[expert][-width:], source[up])


def ours(folder):
    """Every tensor of a dense checkpoint under our names."""
    source = open_source(folder)
    view = under_our_names(source, model_config(source.config_json))
    with view.open_rows() as reader:
        return {
            name: torch.from_numpy(reader.rows(name, tensor.shape[-1], 0, tensor.shape[0])).view(tensor.shape)
            if len(tensor.shape) == 2
            else torch.from_numpy(reader.rows(name, 1, 0, tensor.shape[0])).flatten()
            for name, tensor in view.tensors.items()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_holds_what_the_family_stores(family, dense):
    """No tensor that transformers writes is without a place, and none is asked for that it does not write."""
    source = open_source(dense(family))
    config = model_config(source.config_json)
    written = {name: tensor.shape for name, tensor in source.tensors.items()}
    assert stored_shapes(source, config) == written
    held = ours(dense(family))
    shapes = dense_shapes(config)
    repeated = config.qk_norm in ("rms_norm", "offset_rms_norm")  # a row for all heads, one per head in ours
    heads = config.num_attention_heads + config.num_key_value_heads - 2 if repeated else 0
    rows = config.num_hidden_layers * heads * config.head_dim
    assert model_parameters(config).total() == sum(map(math.prod, shapes.values())) + rows
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == shapes
    assert sum(t.numel() for t in held.values()) == sum(t.numel() for t in tensors_of(dense(family)).values())


@pytest.mark.parametrize(("width", "first", "count"), [(32, 3, 9), (1, 7, 300), (8, 0, 5), (32, 30, 2)])
def test_rows_of_a_fused_tensor_are_read_from_any_place(width, first, count, dense):
    source = open_source(dense("gpt_neox"))
    view = under_our_names(source, model_config(source.config_json))
    name = "model.layers.2.self_attn.k_proj.weight"
    fused = tensors_of(dense("gpt_neox"))["gpt_neox.layers.2.attention.query_key_value.weight"]
    expected = fused.view(4, 3, 8, 32)[:, 1].reshape(-1, width)[first : first + count]
    with view.open_rows() as reader:
        assert torch.equal(torch.from_numpy(reader.rows(name, width, first, count)), expected)
        assert reader.rows(name, width, first, 0).shape == (0, width)


def test_the_older_name_of_the_head_of_gpt_neox_is_known(dense_copy):
    source = open_source(dense_copy("gpt_neox"))
    names = {"lm_head.weight", "embed_out.weight"} & set(source.tensors)
    assert names == {"embed_out.weight"}  # what transformers writes
    renamed = {name.replace("embed_out", "lm_head"): tensor for name, tensor in source.tensors.items()}
    object.__setattr__(source, "tensors", renamed)
    assert "lm_head.weight" in stored_shapes(source, model_config(source.config_json))


def test_a_fused_tensor_of_another_size_is_named_as_it_is_stored(dense_copy, run):
    folder = dense_copy("phi3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(UpcycleError, match=r"layers.0.mlp.gate_up_proj.weight must have shape \(80, 32\)"):
        run(method="copy", base=folder, experts=2)


def test_a_model_of_images_is_refused_by_name(dense_copy, run):
    folder = dense_copy("gemma3_text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    with pytest.raises(UpcycleError, match="got 'gemma3'; it reads images too; save its text model"):
        run(method="copy", base=folder, experts=2)


def test_a_family_in_16_bits_passes_through_bit_by_bit(dense, run):
    source = dense("gpt_neox", dtype=torch.bfloat16)
    experts = tensors_of(run(method="copy", base=source, experts=2))["model.layers.1.mlp.experts.down_proj"]
    down = tensors_of(source)["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]
    assert torch.equal(experts[1].view(torch.int16), down.view(torch.int16))
    assert dense_model("gpt_neox").num_parameters() == sum(t.numel() for t in tensors_of(source).values())


@pytest.mark.parametrize("family", ["olmoe", "flex_olmo", "granitemoe"])
def test_a_mixture_of_the_family_passes_through_unchanged(family, run, tmp_path):
    """Its names and shapes are read and written as transformers does."""
    config = CONFIG_MAPPING[family](
        **SIZES, pad_token_id=None, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=True
    )
    model = randomised(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path / "mixture")
    folder = run(
        method="replicate", base=tmp_path / "mixture", target=family, replicate={"counts": [1, 1, 1]}
    )
    before, after = tensors_of(tmp_path / "mixture"), tensors_of(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert verify(folder).max_abs_diff == 0
