"""Memory: a run holds a few rows, whatever the size of the tensors."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from dense_models import tensors_of
from safetensors.torch import save_file

from moe_runtime.families import model_config
from upcycle.names import dense_shapes
from upcycle.plan import make_plan_for
from upcycle.recipe import recipe_from_dict
from upcycle.stream import chunks

MB = 2**20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
MEASURE = """
import json, sys
# Not ru_maxrss: a child starts with its parent's.
def peak(): return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
interpreter = peak()
import upcycle
imported = peak()
upcycle.upcycle(sys.argv[1])
print(json.dumps({"interpreter": interpreter, "imported": imported, "run": peak()}))
"""


def large_source(folder, seed):
    """About 100 MB in four shards, 64 MB of it the embedding."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dense_shapes(model_config(CONFIG))
    names = list(shapes)
    folder.mkdir()
    weight_map = {}
    for number in range(4):
        file = f"model-{number + 1:05}-of-00004.safetensors"
        shard = {name: torch.randn(shapes[name], generator=generator).bfloat16() for name in names[number::4]}
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


RANDOM = {
    "noise": {"noise": {"std": 0.02, "share": 0.5}},
    "drop": {"drop": {"ratio": 0.4, "shared_indices": False}},
    "granular": {"granular": {"shards": 2, "shuffle": True}},
    "shared_expert": {"shared_expert": {"expert_width": 16, "residual_scale": 0.5}},
}


def recipes(dense):
    """Name -> recipe without output, one for every way of changing a piece."""
    of_base = {"base": str(dense("llama", mlp_bias=True)), "experts": 4, "experts_per_token": 2}
    sources = [str(dense("cohere", seed=seed)) for seed in range(2)]
    bams = {kv: {"method": "bam", "sources": sources, "attention": {"kv": kv}} for kv in ("expert", "shared")}
    return bams | {method: {"method": method, **of_base, **section} for method, section in RANDOM.items()}


@pytest.mark.parametrize("name", ["expert", "shared", *RANDOM])
def test_the_size_of_a_piece_changes_nothing(name, dense, run, monkeypatch):
    values = recipes(dense)[name]
    whole = tensors_of(run("whole", **values))
    monkeypatch.setattr("upcycle.stream.CHUNK_BYTES", 3 * 4 * 2 * 32)  # three rows of two sources
    in_pieces = tensors_of(run("pieces", **values))
    assert whole.keys() == in_pieces.keys()
    assert all(torch.equal(tensor, in_pieces[name]) for name, tensor in whole.items())


def test_another_process_draws_the_same_numbers(dense, run, tmp_path):
    """Random orders, choices and noise come from seeds and names alone."""
    mixture = run("mixture", method="copy", base=dense("llama"), experts=2, target="mixtral")
    grown = {"method": "replicate", "base": str(mixture), "target": "mixtral", "replicate": {"counts": 2}}
    values = {**{name: recipes(dense)[name] for name in RANDOM}, "replicate": grown}
    here = {name: tensors_of(run(name, **value)) for name, value in values.items()}
    there = {name: {**value, "output": str(tmp_path / "there" / name)} for name, value in values.items()}
    code = """
import json, sys, upcycle
for values in json.loads(sys.argv[1]).values():
    upcycle.upcycle(upcycle.recipe_from_dict(values))
"""
    subprocess.run([sys.executable, "-c", code, json.dumps(there)], check=True)
    for name, tensors in here.items():
        again = tensors_of(tmp_path / "there" / name)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items()), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("method", ["copy", "bam", "drop"])
def test_peak_memory_does_not_follow_the_tensors(method, tmp_path):
    sources = [large_source(tmp_path / str(seed), seed) for seed in range(2 if method == "bam" else 1)]
    values = {"method": method, "output": str(tmp_path / "out"), "max_shard_size": "100MB"}
    if method == "bam":
        values |= {"sources": sources * 2, "attention": {"kv": "shared"}}
    else:
        values |= {"base": sources[0], "experts": 8}
    plan = make_plan_for(recipe_from_dict(values))
    largest = max(task.num_bytes for task in plan.tasks)
    assert largest == 64 * MB
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(recipe)], capture_output=True, text=True, check=True
    )
    peak = json.loads(done.stdout)
    assert peak["run"] - peak["interpreter"] <= 2 * largest + 300 * MB
    # What streaming really promises: even one tensor is never whole in memory.
    assert peak["run"] - peak["imported"] <= largest / 2
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_only_the_first_of_equal_experts_goes_through_memory(dense):
    recipe = {"method": "copy", "base": str(dense("llama")), "experts": 3, "target": "mixtral", "output": "x"}
    plan = make_plan_for(recipe_from_dict(recipe))
    (source,) = plan.sources
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    by_expert = [task for expert in range(3) for task in plan.tasks if task.name == name.format(expert)]
    with source.open_rows() as reader:
        first, second, third = (list(chunks(task, [reader])) for task in by_expert)
        assert b"".join(part.tobytes() for part in first) == bytes_of(second)
    assert second == third
    changed = make_plan_for(recipe_from_dict({**recipe, "dtype": "bfloat16"}))
    with source.open_rows() as reader:
        for task in [task for task in changed.tasks if task.name.endswith("w2.weight")]:
            assert all(isinstance(part, np.ndarray) for part in chunks(task, [reader]))


def bytes_of(spans):
    (span,) = spans
    span.file.seek(span.start)
    return span.file.read(span.nbytes)
