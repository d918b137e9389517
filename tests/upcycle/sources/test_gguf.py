"""GGUF files: the numbers transformers reads from them, row by row and without it."""

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dense_models import tensors_of
from tiny_models import assert_equal_up_to_rounding
from transformers import AutoModelForCausalLM

import upcycle
from moe_runtime.families import model_config
from upcycle import UpcycleError
from upcycle.dtypes import to_float32
from upcycle.sources import open_source

FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}}
KINDS = gguf.GGMLQuantizationType
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{kind}_proj": f"attn_{kind}" for kind in "qkv"},
    **{f"self_attn.{kind}_norm": f"attn_{kind}_norm" for kind in "qk"},
    **{f"mlp.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")},
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name):
    module, kind = name.rsplit(".", 1)
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, _, number, rest = module.split(".", 3)
    return f"blk.{number}.{NAMES[rest]}.{kind}"


def interleaved(weight, heads):
    """What a converter does to queries and keys of the Llama family: the halves of a head in turns."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def save_gguf(folder, path, kind=KINDS.F32, change=lambda writer: None):
    """A checkpoint as a GGUF file, its matrices of the given type, with a byte tokenizer."""
    config = model_config(json.loads((folder / "config.json").read_text()))
    family = json.loads((folder / "config.json").read_text())["model_type"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors_of(folder).items():
        values = tensor.float().numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleaved(values, heads)
        stored = KINDS.F32 if values.ndim == 1 else kind
        writer.add_tensor(
            gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored
        )
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense_of(dense, family, **changes):
    window = {"use_sliding_window": False} if family == "qwen2" else {}
    return dense(family, vocab_size=VOCAB_SIZE, **window, **FAMILIES[family], **changes)


def read(source, name, step):
    shape = source.tensors[name].shape
    rows, width = (shape[0], shape[1]) if len(shape) > 1 else (1, shape[0])
    with source.open_rows() as reader:
        parts = [reader.rows(name, width, first, min(step, rows - first)) for first in range(0, rows, step)]
    return to_float32(np.concatenate(parts), source.tensors[name].dtype).reshape(shape)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16], ids=lambda kind: kind.name)
def test_unquantised_tensors_are_those_that_were_stored(family, kind, dense, tmp_path):
    folder = dense_of(dense, family)
    source = open_source(save_gguf(folder, tmp_path / "model.gguf", kind))
    dtype = {KINDS.F32: torch.float32, KINDS.F16: torch.float16, KINDS.BF16: torch.bfloat16}[kind]
    expected = tensors_of(folder)
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        rounded = tensor.to(dtype).float() if tensor.ndim > 1 else tensor
        assert np.array_equal(read(source, name, step=5), rounded.numpy()), name
    described = model_config(source.config_json)
    assert described == model_config(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_0, KINDS.Q5_1], ids=lambda kind: kind.name)
def test_quantised_tensors_are_those_that_transformers_reads(kind, dense, tmp_path):
    path = save_gguf(
        dense("llama", vocab_size=VOCAB_SIZE, intermediate_size=64), tmp_path / "model.gguf", kind
    )
    source = open_source(path)
    assert {tensor.dtype for tensor in source.tensors.values()} == {"F32"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        assert np.array_equal(read(source, name, step=5), tensor.numpy()), name


def test_a_copy_of_a_gguf_file_has_its_tokenizer_and_is_verified(dense, tmp_path, run):
    path = save_gguf(dense_of(dense, "llama", intermediate_size=64), tmp_path / "model.gguf", KINDS.Q8_0)
    (tmp_path / "tokenizer.json").write_text("of another model")
    output = run(method="copy", base=path, experts=2, dtype="bfloat16")
    assert json.loads((output / "tokenizer.json").read_text())["model"]["vocab"]
    record = json.loads((output / "upcycle.json").read_text())
    assert record["sources"][0]["path"] == str(path)
    assert list(record["sources"][0]["files"]) == ["model.gguf"]
    verified = upcycle.verify(output)
    assert verified.must_be_equal
    assert verified.passed


def test_routers_from_prompts_are_those_of_the_model_in_the_file(dense_copy, tmp_path, run):
    """Weights and tokenizer both come out of it."""
    folder = dense_copy("llama", vocab_size=VOCAB_SIZE)
    byte_tokenizer().save_pretrained(folder)
    path = save_gguf(folder, tmp_path / "model.gguf")
    router = {"init": "centroid", "data": [["abcdef ghi"], ["0123456789"]]}
    expected, actual = (
        tensors_of(run(f"of-{base.stem}", method="copy", base=base, experts=2, router=router))
        for base in (folder, path)
    )
    name = "model.layers.1.mlp.router.weight"
    # not to the last bit: weights lie elsewhere in memory, which may change the order of a product's sums
    assert_equal_up_to_rounding(name, actual[name], expected[name])


def rope_scaling(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def extra_tensor(writer):
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))


REFUSED = [
    pytest.param(rope_scaling, r"scales its rotary positions \(yarn\), which is not read; use", id="rope"),
    pytest.param(extra_tensor, "tensor rope_freqs.weight has no place in a plain dense model", id="tensor"),
    pytest.param(lambda writer: writer.add_expert_count(8), "is a mixture of 8 experts", id="experts"),
    pytest.param(lambda writer: writer.add_sliding_window(64), "has a sliding window, which", id="window"),
    pytest.param(
        lambda writer: writer.add_float32("llama.rope.scaling.factor", 4.0),
        r"scales its rotary positions \(by 4.0\), which is not read",
        id="rope-factor",
    ),
    pytest.param(
        lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0),
        r"scales its rotary positions \(by 2.0\), which is not read",
        id="rope-linear",
    ),
    pytest.param(
        lambda writer: writer.add_rope_dimension_count(4),
        "rotates a part of each head, which",
        id="rope-part",
    ),
    pytest.param(lambda writer: writer.add_causal_attention(False), "is no causal model; use", id="causal"),
    pytest.param(
        lambda writer: writer.add_float32("llama.attention.clamp_kqv", 8.0),
        "says llama.attention.clamp_kqv, which is not read; use the model as safetensors",
        id="unknown",
    ),
    pytest.param(
        lambda writer: writer.add_uint16("split.count", 3), "is one part of several; join", id="split"
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_a_plain_model_has_not_is_refused(change, message, dense, tmp_path):
    path = save_gguf(dense_of(dense, "llama"), tmp_path / "model.gguf", change=change)
    with pytest.raises(UpcycleError, match=message):
        open_source(path)


def test_what_describes_a_plain_model_is_read(dense, tmp_path):
    def change(writer):
        writer.add_rope_dimension_count(8)
        writer.add_rope_scaling_factor(1.0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_finetuned(False)
        writer.add_vocab_size(VOCAB_SIZE)
        writer.add_expert_count(0)
        writer.add_causal_attention(True)

    plain, described = (
        open_source(save_gguf(dense_of(dense, "llama"), tmp_path / name, change=how)).config_json
        for name, how in (("plain.gguf", lambda writer: None), ("described.gguf", change))
    )
    assert plain == described
    assert plain["head_dim"] == 8


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_tokenizer_that_cannot_be_read_is_named_before_weights_are_written(
    dry_run, dense, tmp_path, monkeypatch
):
    path = save_gguf(dense_of(dense, "llama"), tmp_path / "model.gguf")
    data = path.read_bytes()
    assert data.count(b"gpt2") == 1
    path.write_bytes(data.replace(b"gpt2", b"none"))
    run = sys.modules["upcycle.run"]
    monkeypatch.setattr(run, "write_shard", lambda *_: pytest.fail("a weight was written"))
    values = {"method": "copy", "base": str(path), "experts": 2, "output": str(tmp_path / "out")}
    message = r"model\.gguf: the tokenizer in it cannot be read: .*; use the model as safetensors"
    with pytest.raises(UpcycleError, match=message):
        upcycle.upcycle(upcycle.recipe_from_dict(values), dry_run=dry_run)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.gguf"]


def test_other_families_and_damaged_files_are_named(dense, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = (
        "general.architecture must be one of llama, qwen2, qwen3, got 'gemma2'; use the model as safetensors"
    )
    with pytest.raises(UpcycleError, match=message):
        open_source(path)
    path.unlink()
    with pytest.raises(UpcycleError, match=r"model\.gguf cannot be read: No such file"):
        open_source(path)
    whole = save_gguf(dense_of(dense, "llama"), path).read_bytes()
    for damaged in (b"", b"GGUF", whole[:1000], whole[:-5000]):
        path.write_bytes(damaged)
        with pytest.raises(UpcycleError, match=r"model\.gguf"):
            open_source(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        UpcycleError, match="needs the package gguf to be read; install it with: python -m pip"
    ):
        open_source(path)
