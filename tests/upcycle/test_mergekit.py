"""Configurations of mergekit-moe: the experts it would make, told with what is done otherwise."""

import json
from pathlib import Path

import pytest
import torch
import typer
import yaml
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dense_models import tensors_of
from typer.testing import CliRunner

from upcycle import UpcycleError
from upcycle.cli import upcycle_command
from upcycle.mergekit import translate
from upcycle.plan import make_plan_for

app = typer.Typer()
app.command("upcycle")(upcycle_command)


@pytest.fixture
def branches(dense):
    return [str(dense("llama", seed=seed)) for seed in range(2)]


def configuration(branches, **changes):
    experts = [{"source_model": path, "positive_prompts": [f"p{n}"]} for n, path in enumerate(branches)]
    return {"base_model": branches[0], "gate_mode": "random", "experts": experts, **changes}


def test_a_configuration_runs_as_it_is(branches, tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(configuration(branches, dtype="bfloat16")))
    output = tmp_path / "out"
    result = CliRunner().invoke(app, [str(path), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "Otherwise than mergekit-moe: router weights have standard deviation 0.02, not 1" in result.output
    config = json.loads((output / "config.json").read_text())
    assert (config["model_type"], config["num_experts_per_tok"], config["dtype"]) == (
        "mixtral",
        2,
        "bfloat16",
    )
    written = tensors_of(output)
    name = "model.layers.1.{}.weight"
    for expert, path in enumerate(branches):
        branch = tensors_of(Path(path))
        for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            stored = written[name.format(f"block_sparse_moe.experts.{expert}.{ours}")]
            assert torch.equal(stored, branch[name.format(f"mlp.{theirs}")].bfloat16())
    # everything else is the base's alone
    query = name.format("self_attn.q_proj")
    assert torch.equal(written[query], tensors_of(Path(branches[0]))[query].bfloat16())


def test_it_names_no_output(branches, tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(configuration(branches)))
    result = CliRunner().invoke(app, [str(path)])
    assert isinstance(result.exception, UpcycleError)
    assert "is a configuration of mergekit-moe, which names no output; give --output" in str(result.exception)


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", None])
def test_prompts_become_the_texts_of_routers(mode, branches, tmp_path, dense):
    changes = {} if mode is None else {"gate_mode": mode}
    values = configuration(branches, **changes)
    if mode is None:
        del values["gate_mode"]
    recipe, notes = translate(values, "out")
    assert (recipe.router.init, recipe.router.data) == ("centroid", (("p0",), ("p1",)))
    assert len(notes) == 1
    assert "the mean of what it will read on an expert's prompts" in notes[0]
    values["experts"][1]["negative_prompts"] = ["no"]
    with pytest.raises(UpcycleError, match="negative_prompts have no counterpart; leave them out"):
        translate(values, "out")


def test_prompts_start_the_routers(dense, tmp_path):
    base = dense("llama", vocab_size=VOCAB_SIZE)
    copied = tmp_path / "base"
    copied.mkdir()
    for path in base.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    byte_tokenizer().save_pretrained(copied)
    values = configuration([str(copied)] * 2, gate_mode="hidden")
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, [str(path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    router = tensors_of(tmp_path / "out")["model.layers.0.block_sparse_moe.gate.weight"]
    assert router.shape == (2, 32)
    assert not torch.equal(router[0], router[1])


def test_experts_that_are_all_the_base_are_copies(branches):
    same = [branches[0]] * 4
    recipe, _ = translate(configuration(same, experts_per_token=1 + 1), "out")
    assert (recipe.method, recipe.experts) == ("copy", 4)
    values = configuration(same)
    for expert in values["experts"]:
        expert["noise_scale"] = 0.01
    recipe, _ = translate(values, "out")
    assert (recipe.method, recipe.experts, recipe.noise.std) == ("noise", 4, 0.01)


@pytest.mark.parametrize(
    ("family", "target"),
    [("mistral", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("cohere", "moe_runtime")],
)
def test_the_format_follows_the_family(family, target, dense):
    sources = [str(dense(family, seed=seed)) for seed in range(2)]
    recipe, _ = translate(configuration(sources), "out")
    assert recipe.target == target
    assert make_plan_for(recipe).num_bytes > 0
    recipe, _ = translate(configuration(sources, architecture="Qwen3"), "out")
    assert recipe.target == "qwen3_moe"


def test_random_routers_keep_the_spread_of_uniform_ones(branches):
    recipe, notes = translate(configuration(branches, gate_mode="uniform_random"), "out")
    assert recipe.router.std == pytest.approx((1 / 32) ** 0.5 / 3**0.5)
    assert notes == ("router weights are normal with the standard deviation of mergekit's uniform ones",)


def test_models_with_adapters_are_sources(branches):
    values = configuration(branches)
    values["experts"][0]["source_model"] = f"{branches[0]}+lora"
    values["experts"][1]["source_model"] = {"model": {"path": branches[0]}, "lora": {"path": "other"}}
    recipe, _ = translate(values, "out")
    assert [(source.base, source.adapter) for source in recipe.sources] == [
        (branches[0], "lora"),
        (branches[0], "other"),
    ]


def test_unread_keys_are_noted(branches):
    values = configuration(branches, tokenizer_source="base")
    values["experts"][1]["weight"] = 2
    _, notes = translate(values, "out")
    assert notes[:2] == ("key 'tokenizer_source' is not read", "key 'weight' of an expert is not read")


REFUSED = [
    ({"gate_mode": "best"}, "x.yml: gate_mode must be one of 'random', 'uniform_random', .*, got 'best'"),
    (
        {"gate_mode": "hidden", "experts": [{"source_model": "a"}]},
        "gate_mode 'hidden' needs 'positive_prompts'",
    ),
    ({"experts": []}, "each of the experts must be a section with 'source_model'"),
    ({"experts": ["a", "b"]}, "each of the experts must be a section with 'source_model'"),
    ({"experts": [{"source_model": 3}]}, "source_model must be the path of a model, got 3"),
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ({"architecture": "deepseek"}, "architecture must be one of mixtral, qwen, qwen3, got 'deepseek'"),
    (
        {"shared_experts": [{"source_model": "a"}]},
        "shared_experts have no counterpart; method 'shared_expert'",
    ),
    ({"experts_per_token": 5}, r"experts_per_token must be at most the number of experts \(2\), got 5"),
    ({"experts_per_token": 0}, "x.yml: experts_per_token must be at least 1, got 0"),
    ({"gate_mode": ["random"]}, r"gate_mode must be one of .*, got \['random'\]"),
    ({"base_model": "nowhere"}, "nowhere: there is no such checkpoint folder"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    REFUSED,
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_has_no_counterpart_is_refused(changes, message, branches):
    with pytest.raises(UpcycleError, match=message):
        translate(configuration(branches, **changes), "out", where="x.yml")


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"residual_scale": 0.5}, "residual_scale has no counterpart"),
        ({"noise_scale": [0.1]}, r"noise_scale must be a number, got \[0\.1\]"),
        (
            {"noise_scale": 0.1},
            "noise_scale must be the same for all experts, and these copies of base_model",
        ),
    ],
)
def test_scales_without_a_counterpart_are_refused(experts, message, branches):
    values = configuration(branches)
    values["experts"][0].update(experts)
    with pytest.raises(UpcycleError, match=message):
        translate(values, "out")
