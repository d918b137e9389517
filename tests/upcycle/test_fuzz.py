"""Whatever a file holds, its reader answers with tensors inside the file or with one sentence."""

import copy
import dataclasses
import io
import json
import math
import struct
import zipfile
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import upcycle
from upcycle import UpcycleError, load_recipe, make_plan_for, recipe_from_dict
from upcycle.checkpoint import INDEX_NAME, open_checkpoint, read_header
from upcycle.dtypes import STORAGE
from upcycle.method_sections import SECTIONS
from upcycle.recipe import AttentionRecipe, Recipe, RouterRecipe
from upcycle.sources import open_source


def fuzzed(examples):
    """The same examples in every run; the folder of a test is its own, whatever the example."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def answer(call, *arguments):
    """What it returns, or None after one sentence."""
    try:
        return call(*arguments)
    except UpcycleError as error:
        sentence = str(error)
    assert sentence
    assert "\n" not in sentence
    return None


def check_tensors(tensors, size):
    """All lie in the file; those that are read lie where no other does."""
    spans = []
    for tensor in tensors.values():
        assert 0 <= tensor.start <= size
        if tensor.dtype in STORAGE:
            stop = tensor.start + math.prod(tensor.shape) * STORAGE[tensor.dtype].itemsize
            assert stop <= size
            spans += [(tensor.start, stop)] if stop > tensor.start else []
    return sorted(spans)


# --- safetensors ---

WHOLE = save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5)})
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from(
        [2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**40, -(2**63), 0.5, True, None, "4", math.inf]
    ),
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
ENTRY = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "F8_E4M3", "F4", "f32", ""]),
            "shape": st.lists(NUMBERS, max_size=4),
            "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
        }
    ),
    st.fixed_dictionaries({}, optional={"dtype": JUNK, "shape": JUNK, "data_offsets": JUNK}),
    JUNK,
)


@st.composite
def forged_files(draw):
    """A file whose entries follow each other, with one fault or none."""
    entries, position = {}, 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "ä", ""]), unique=True)):
        dtype = draw(st.sampled_from(["F32", "BF16", "F16"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        stop = position + STORAGE[dtype].itemsize * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    fault = draw(st.sampled_from(["none", "entry", "shape", "data_offsets", "one number", "length", "bytes"]))
    longer, more = 0, 0
    if fault == "length":
        longer = draw(st.sampled_from([1, -1, 2**40]))
    elif fault == "bytes":
        more = draw(st.sampled_from([-1, 1, 100]))
    elif fault != "none" and entries:
        name = draw(st.sampled_from(list(entries)))
        if fault == "entry":
            entries[name] = draw(ENTRY)
        elif fault == "one number":
            numbers = entries[name][draw(st.sampled_from(["shape", "data_offsets"]))]
            numbers[:1] = [draw(NUMBERS)]
        else:
            entries[name][fault] = draw(st.lists(NUMBERS, max_size=3))
    text = json.dumps(entries).encode()
    return struct.pack("<Q", max(0, len(text) + longer)) + text + bytes(max(0, position + more))


@fuzzed(250)
@given(forged_files())
def test_forged_headers(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tensors = answer(read_header, path)
    if tensors is not None:
        spans = check_tensors(tensors, len(data))
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


@st.composite
def damaged(draw, whole):
    """A file with bytes changed, put in or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "insert", "remove", "cut"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                data[at:at] = draw(
                    st.sampled_from([b"0", b'"', b"{", b"[" * 3000, b"\xff", b"-", b"9" * 5000])
                )
            case "remove":
                del data[at : at + draw(st.integers(1, 40))]
            case "cut":
                del data[at:]
    return bytes(data)


@fuzzed(150)
@given(damaged(WHOLE))
def test_damaged_safetensors(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    source = answer(open_source, tmp_path)
    if source is not None:
        check_tensors(source.tensors, len(data))
        with source.open_rows() as reader:
            for name, tensor in source.tensors.items():
                if tensor.dtype in STORAGE:
                    reader.rows(name, 1, 0, math.prod(tensor.shape))


@fuzzed(60)
@given(st.one_of(JUNK, st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from("abc"), JUNK)})))
def test_forged_indices(tmp_path, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    answer(open_checkpoint, tmp_path)


# --- PyTorch and GGUF files ---


def torch_file():
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2, 3), "b": torch.ones(4).bfloat16()}, file)
    return file.getvalue()


def repacked(pickled):
    """The file with another pickle, so that damage reaches the unpickler past the zip's checksum."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TORCH)) as whole, zipfile.ZipFile(file, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    return file.getvalue()


TORCH = torch_file()
with zipfile.ZipFile(io.BytesIO(TORCH)) as _archive:
    PICKLE = _archive.read("archive/data.pkl")


@fuzzed(150)
@given(st.one_of(damaged(TORCH), damaged(PICKLE).map(repacked)))
def test_damaged_pytorch_files(tmp_path, data):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    source = answer(open_source, tmp_path)
    if source is not None:
        check_tensors(source.tensors, len(data))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("context", 8), ("embedding", 4), ("feed_forward", 4)):
        getattr(writer, f"add_{name}_length")(value)
    for name, value in (("block_count", 1), ("head_count", 1), ("head_count_kv", 1)):
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((3, 4), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_source(path).tensors
    return path.read_bytes()


@fuzzed(60)
@given(st.data())
def test_damaged_gguf_files(tmp_path, gguf_file, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data.draw(damaged(gguf_file)))
    source = answer(open_source, path)
    if source is not None:
        check_tensors(source.tensors, path.stat().st_size)


# --- recipes ---

VALUES = st.one_of(
    JUNK,
    st.sampled_from(
        ["copy", "btx", "bam", "drop", "granular", "mixtral", "renorm", "raw", "shared", "all", "5GB"]
    ),
    st.sampled_from([1, 2, 4, 0.5, -1, 1e308, math.nan, "a\0b", "\ud800", "nowhere", ["a", "b"], [0, 1]]),
    st.sampled_from([{"base": "a", "adapter": "b"}, {"first_dense": 1}, {"moe_every": 2}, [{"base": 3}]]),
)


METHODS = {
    "copy": {"base": "nowhere", "experts": 4},
    "btx": {"sources": ["a", {"base": "b", "adapter": "c"}]},
    "bam": {"sources": ["a", "b"], "attention": {"kv": "shared"}},
    "noise": {"base": "nowhere", "experts": 4, "noise": {"std": 0.1}},
    "drop": {"base": "nowhere", "experts": 4, "drop": {"ratio": 0.5}},
    "granular": {"base": "nowhere", "experts": 4, "granular": {"shards": 2}},
    "shared_expert": {"base": "nowhere", "experts": 4, "shared_expert": {"expert_width": 8}},
    "replicate": {"base": "nowhere", "replicate": {"counts": 2}},
}
# What is often allowed; alone, values that are not would leave nothing to run.
GOOD = {
    "experts": st.sampled_from([2, 4, 8]),
    "experts_per_token": st.sampled_from([1, 2, 4]),
    "layers": st.sampled_from(["all", "every_other", [0, 2], {"first_dense": 1}, {"moe_every": 2}]),
    "target": st.sampled_from(["moe_runtime", "mixtral", "qwen2_moe", "qwen3_moe"]),
    "dtype": st.sampled_from(["float32", "bfloat16", "float16", None]),
    "max_shard_size": st.sampled_from(["5GB", "1 MiB", "10kb"]),
    "score": st.sampled_from(["softmax", "sigmoid"]),
    "init": st.sampled_from(["normal", "orthogonal", "file"]),
    "scale_mode": st.sampled_from(["exact", "cuberoot", "none"]),
    **dict.fromkeys(("std", "ratio", "share", "scale", "aux_loss_coef", "z_loss_coef"), st.floats(0, 1)),
    **dict.fromkeys(("seed", "shards", "counts", "expert_width"), st.integers(0, 9)),
    **dict.fromkeys(("shuffle", "shared_indices", "selection_bias", "renormalise_top_k"), st.booleans()),
}
KINDS = {**SECTIONS, "router": RouterRecipe, "attention": AttentionRecipe}


@st.composite
def recipes(draw):
    """One that works, with up to three values of it or of a section replaced: by good ones or by any."""
    careful = draw(st.booleans())
    method = draw(st.sampled_from(list(METHODS)))
    recipe = {"method": method, "output": "out", **copy.deepcopy(METHODS[method])}
    for _ in range(draw(st.integers(0, 3))):
        sections = [name for name in KINDS if isinstance(recipe.get(name, {}), dict)]
        kind = draw(st.sampled_from([None, "router", *(name for name in sections if name in recipe)]))
        names = [f.name for f in dataclasses.fields(KINDS[kind] if kind in sections else Recipe)]
        place = recipe.setdefault(kind, {}) if kind in sections else recipe
        if careful:
            name = draw(st.sampled_from([name for name in names if name in GOOD] or ["experts"]))
            place[name] = draw(GOOD[name])
        else:
            place[draw(st.sampled_from([*names, "experts"]))] = draw(VALUES)
    return recipe


@fuzzed(250)
@given(recipes())
def test_any_recipe_is_built_or_refused(tmp_path, values):
    recipe = answer(recipe_from_dict, values)
    if recipe is not None:
        assert recipe_from_dict(recipe.to_dict()) == recipe
        answer(make_plan_for, recipe)
        answer(upcycle.upcycle, dataclasses.replace(recipe, output=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


EXAMPLE = yaml.safe_dump(
    {"method": "bam", "sources": ["a", "b"], "output": "out", "router": {"std": 0.02}, "layers": [0, 2]}
).encode()
BOMB = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (i, i, i - 1, i - 1) for i in range(98, 118))


@fuzzed(100)
@given(
    st.one_of(damaged(EXAMPLE), st.binary(max_size=40), st.text(max_size=40).map(lambda text: text.encode()))
)
def test_any_text_is_a_recipe_or_refused(tmp_path, data):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    answer(load_recipe, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "with aliases written out, at most 10000 values"),
        (b"method: &a [*a]", "with aliases written out, at most 10000 values"),
        (b"method: 0x" + b"f" * 5000, "the recipe must have numbers of at most 64 bits"),
        (b"[" * 5000, "the recipe is nested too deeply"),
        (b"method: 2020-13-45", "the recipe is not valid YAML: month must be in"),
        (b"method: " + b"9" * 5000, "the recipe is not valid YAML: Exceeds the limit"),
        (
            b"method: !!python/object/apply:os.system [ls]",
            "the recipe is not valid YAML: could not determine a",
        ),
        (b'method: copy\nbase: x\noutput: "a\\0b"\nexperts: 2', "output must be a text of whole characters"),
    ],
    ids=["bomb", "loop", "hexadecimal", "deep", "date", "number", "code", "zero-byte"],
)
def test_what_a_recipe_could_do_to_its_reader(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(UpcycleError, match=message):
        load_recipe(path)
