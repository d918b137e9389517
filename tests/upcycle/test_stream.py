"""Memory: a run holds a few rows, whatever the size of the tensors."""

import json
import subprocess
import sys

import pytest
import torch
from dense_models import tensors_of
from safetensors.torch import save_file

from moe_runtime.families import model_config
from upcycle.names import dense_shapes
from upcycle.plan import make_plan_for
from upcycle.recipe import recipe_from_dict

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


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_the_size_of_a_piece_changes_nothing(kv, dense, run, monkeypatch):
    values = {
        "method": "bam",
        "sources": [dense("cohere", seed=seed) for seed in range(2)],
        "attention": {"kv": kv},
    }
    whole = tensors_of(run("whole", **values))
    monkeypatch.setattr("upcycle.stream.CHUNK_BYTES", 3 * 4 * 2 * 32)  # three rows of two sources
    in_pieces = tensors_of(run("pieces", **values))
    assert whole.keys() == in_pieces.keys()
    assert all(torch.equal(tensor, in_pieces[name]) for name, tensor in whole.items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("method", ["copy", "bam"])
def test_peak_memory_does_not_follow_the_tensors(method, tmp_path):
    sources = [large_source(tmp_path / str(seed), seed) for seed in range(1 if method == "copy" else 2)]
    values = {"method": method, "output": str(tmp_path / "out"), "max_shard_size": "100MB"}
    if method == "copy":
        values |= {"base": sources[0], "experts": 8}
    else:
        values |= {"sources": sources * 2, "attention": {"kv": "shared"}}
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
