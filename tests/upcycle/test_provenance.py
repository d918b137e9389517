"""What an output says about itself, and that it can be published."""

import json
import os
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM


def test_the_record_names_sources_hashes_and_what_was_averaged(dense, run):
    sources = [dense("llama", seed=seed) for seed in range(2)]
    record = json.loads((run(method="btx", sources=sources, router={"seed": 5}) / "upcycle.json").read_text())
    assert (record["method"], record["seed"], record["base"]) == ("btx", 5, 0)
    for source, entry in zip(sources, record["sources"], strict=True):
        files = {path.name: sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")}
        config = json.dumps(json.loads((source / "config.json").read_text()), sort_keys=True)
        assert entry == {
            "path": str(source),
            "model_type": "llama",
            "dtypes": ["float32"],
            "config": sha256(config.encode()).hexdigest(),
            "files": files,
        }
    assert record["dtype"] == "float32"
    assert record["recipe"]["experts_per_token"] == 2
    assert record["recipe"]["router"]["gate"] == "renorm"
    assert "output" not in record["recipe"]
    assert record["assignment"] == {"feed_forward": [0, 1], "attention": None, "rest": [0, 1]}
    assert "model.layers.*.self_attn.q_proj.weight" in record["averaged"]
    assert "model.norm.weight" in record["averaged"]
    assert not any("mlp" in name for name in record["averaged"])
    assert set(record["versions"]) == {"moe-runtime", "numpy", "python"}


def test_a_copy_averages_nothing(dense, run):
    assert (
        json.loads((run(method="copy", base=dense("llama"), experts=2) / "upcycle.json").read_text())[
            "averaged"
        ]
        == []
    )


def card_of(folder):
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_model_card_has_what_hubs_read(dense, dense_copy, run):
    named = dense_copy()
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps({**config, "_name_or_path": "someone/dense"}))
    front, text = card_of(run(method="btx", sources=[named, dense("llama", seed=1)], target="mixtral"))
    assert front["base_model"] == ["someone/dense", dense("llama", seed=1).name]
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["moe", "upcycled", "btx"]
    assert "trust_remote_code" not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["experts_per_token"] == 2


def test_the_model_card_loads_narrow_experts_as_transformers_can(dense, run):
    recipe = {"method": "shared_expert", "base": dense("llama"), "experts": 2}
    recipe |= {"router": {"gate": "raw"}, "target": "qwen2_moe"}
    narrow, wide = (run(f"w{w}", **recipe, shared_expert={"expert_width": w}) for w in (7, 8))
    _, text = card_of(narrow)
    assert "refuses rows of 7 numbers in F32, which are no multiple of 16 bytes; load" in text
    assert '("path/to/this/folder", experts_implementation="eager")' in text
    assert "eager" not in card_of(wide)[1]
    tokens = torch.arange(5)[None]
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        AutoModelForCausalLM.from_pretrained(narrow)(tokens)
    for folder, chosen in ((narrow, {"experts_implementation": "eager"}), (wide, {})):
        assert AutoModelForCausalLM.from_pretrained(folder, **chosen)(tokens).logits.isfinite().all()


def test_a_sequential_bam_says_that_it_is_not_the_papers_block(dense, run):
    for family, said in (("llama", True), ("cohere", False)):
        _, text = card_of(run(family, method="bam", sources=[dense(family)] * 2))
        assert ("not the block of the BAM paper" in text) == said
        assert "trust_remote_code=True" in text


def test_our_own_model_loads_from_its_folder_alone(dense, run, tmp_path):
    folder = run(method="bam", sources=[dense("cohere")] * 2, attention={"kv": "shared"})
    code = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
assert not any(name.startswith("moe_runtime") for name in sys.modules)
model, report = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
print(type(model).__name__, model.num_parameters())
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "upcycle.json").read_text())
    assert done.stdout.split() == ["MoeRuntimeForCausalLM", str(record["parameters"])]
