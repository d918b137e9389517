"""The two commands, as `moe-runtime` mounts them."""

import json

import pytest
import typer
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from upcycle import UpcycleError
from upcycle.cli import upcycle_command, verify_command

app = typer.Typer()
app.command("upcycle")(upcycle_command)
app.command("verify")(verify_command)


@pytest.fixture
def recipe(dense, tmp_path):
    path = tmp_path / "recipe.yaml"
    sources = [str(dense("llama", seed=seed)) for seed in range(2)]
    values = {"method": "bam", "sources": sources, "output": str(tmp_path / "out"), "layers": [0, 2]}
    path.write_text(yaml.safe_dump(values))
    return path


def invoke(*arguments, exit_code=0):
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result.stdout


def test_a_dry_run_prints_where_every_tensor_comes_from(recipe, tmp_path):
    text = invoke("upcycle", recipe, "--dry-run")
    for expected in (
        "model.layers.*.self_attn.router.weight",
        "2 x 96 x 32",
        "mean of model.norm.weight from source 0, 1",
        "copy of mlp.gate_proj.weight",
        "normal, std 0.02, seed 0",
        "Would write",
        "At most 0.30 GB of memory; about 0 s at the",
        "source 1:",
    ):
        assert expected in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_disk_that_cannot_be_written_is_named_by_a_dry_run(recipe, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = CliRunner().invoke(app, ["upcycle", str(recipe), "--dry-run", "--output", str(blocked / "out")])
    assert isinstance(result.exception, UpcycleError)
    assert f"{blocked} cannot be written: Not a directory" in str(result.exception)


CHANGED = [
    pytest.param(
        {"method": "granular", "experts": 4, "granular": {"shards": 2, "shuffle": True}, "drop": {}},
        {
            "router.weight": "normal, std 0.02, seed 0, each row 2 times",
            "experts.down_proj": "copy of mlp.down_proj.weight from source 0, shuffled, "
            "12 of 24 columns drawn anew, seed 0, times 2",
        },
        id="granular",
    ),
    pytest.param(
        {"method": "noise", "experts": 2, "noise": {"std": 0.5, "share": 0.25, "seed": 3}},
        {"experts.down_proj": "copy of mlp.down_proj.weight from source 0, noise of std 0.5 on 25%, seed 3"},
        id="noise",
    ),
]


@pytest.mark.parametrize(("values", "made_from"), CHANGED)
def test_a_dry_run_says_how_pieces_are_changed(values, made_from, dense, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "base": str(dense("llama")), "output": str(tmp_path / "out")}))
    rows = json.loads(invoke("upcycle", path, "--dry-run", "--json"))["plan"]
    made = {row["name"].removeprefix("model.layers.*.mlp."): row["from"] for row in rows}
    assert {name: made[name] for name in made_from} == made_from


@pytest.mark.parametrize(("target", "said"), [("qwen2_moe", True), ("moe_runtime", False)])
def test_a_dry_run_says_which_experts_transformers_can_run_only_eagerly(target, said, dense, tmp_path):
    path = tmp_path / "recipe.yaml"
    values = {"method": "shared_expert", "base": str(dense("llama")), "experts": 2, "target": target}
    values |= {"shared_expert": {"expert_width": 7}, "output": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**values, "router": {"gate": "raw"}}))
    text = invoke("upcycle", path, "--dry-run")
    assert ('load this model with experts_implementation="eager".' in text) == said


def test_json_for_programs(recipe, tmp_path):
    planned = json.loads(invoke("upcycle", recipe, "--dry-run", "--json"))
    written = json.loads(invoke("upcycle", recipe, "--json", "--output", tmp_path / "there"))
    same = ("method", "target", "tensors", "parameters", "bytes", "dtype", "files", "sources")
    assert {key: planned[key] for key in same} == {key: written[key] for key in same}
    assert (planned["dry_run"], written["dry_run"]) == (True, False)
    rows = {row["name"]: row for row in planned["plan"]}
    assert rows["model.layers.*.mlp.experts.gate_up_proj"]["count"] == 2
    assert sum(row["count"] for row in planned["plan"]) == planned["tensors"]
    assert sum(row["bytes"] for row in planned["plan"]) == planned["bytes"]
    cost = planned["estimate"]
    assert cost["memory_bytes"] == 2 * 4 * 2 * 96 * 32 + 300_000_000  # a stack of gates and ups
    assert cost["seconds"] == pytest.approx(planned["bytes"] / cost["bytes_per_s"])
    assert "estimate" not in written
    assert (tmp_path / "there" / "model.safetensors").exists()
    verified = json.loads(invoke("verify", tmp_path / "there", "--json"))
    assert verified["passed"]
    assert "the sources differ" in verified["not_equal_because"]


def test_tables_for_people(recipe, tmp_path):
    assert "Wrote" in invoke("upcycle", recipe)
    text = invoke("verify", tmp_path / "out")
    assert "no: the sources differ; router.gate 'raw'" in text
    assert "passed" in text


def test_it_says_where_the_bases_type_holds_less_than_its_tensors(dense_copy, tmp_path):
    folder = dense_copy(shard="1GB")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    save_file(tensors, weights, metadata={"format": "pt"})
    path = tmp_path / "recipe.yaml"
    values = {"method": "copy", "base": str(folder), "experts": 2, "output": str(tmp_path / "out")}
    for dtype, said, types in ((None, True, ["F32"]), ("bfloat16", False, ["F32"]), ("float32", False, [])):
        path.write_text(yaml.safe_dump({**values, "dtype": dtype}))
        assert ("Tensors of type F32 are rounded to BF16" in invoke("upcycle", path, "--dry-run")) == said
        assert json.loads(invoke("upcycle", path, "--dry-run", "--json"))["rounded_types"] == types
    path.write_text(yaml.safe_dump(values))
    invoke("upcycle", path)
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert (record["dtype"], record["sources"][0]["dtypes"]) == ("bfloat16", ["bfloat16", "float32"])


def test_a_path_that_looks_like_markup_is_printed_as_it_is(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # with a progress bar
    output = tmp_path / "[/red][bold]x"
    path = tmp_path / "recipe.yaml"
    values = {"method": "copy", "base": str(dense("llama")), "experts": 2, "output": str(output)}
    path.write_text(yaml.safe_dump(values))
    assert f"{output}:" in invoke("upcycle", path).replace("\n", "")
    assert f"{output} (copy, moe_runtime)" in invoke("verify", output).replace("\n", "")


def test_a_failed_verification_has_exit_code_1(dense, run):
    folder = run(method="copy", base=dense("llama"), experts=2)
    record = json.loads((folder / "upcycle.json").read_text())
    other = dense("llama", seed=1)
    files = json.loads((run("other", method="copy", base=other, experts=2) / "upcycle.json").read_text())[
        "sources"
    ]
    (folder / "upcycle.json").write_text(json.dumps({**record, "sources": files}))
    assert "FAILED" in invoke("verify", folder, exit_code=1)


def test_mistakes_reach_the_caller_as_one_exception(tmp_path):
    result = CliRunner().invoke(app, ["upcycle", str(tmp_path / "none.yaml")])
    assert isinstance(result.exception, UpcycleError)
