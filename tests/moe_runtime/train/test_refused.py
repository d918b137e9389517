"""What a run refuses, and how it stops: one sentence, and nothing that was there is overwritten."""

import dataclasses
import re
import resource
from pathlib import Path

import pytest
import torch
from moe_families import tiny_family
from training_runs import VOCAB_SIZE, a_recipe, save_model, stopped_at

from moe_runtime import cli
from moe_runtime.errors import RunError
from moe_runtime.train import packages
from moe_runtime.train import run as run_module
from moe_runtime.train.data.load import load_train_data
from moe_runtime.train.model import attention_of, prepare_model
from moe_runtime.train.run import run_training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "dense",
            {"moe": {}},
            "moe must be left out for a model without experts, and MoeRuntimeForCausalLM has none",
        ),
        ("dense", {"train": {"freeze": "gate"}}, "train.freeze must be left out for a model without experts"),
        ("dense", {"train": {"lora": {}}}, "train.lora must be left out for a model without experts"),
        (
            "mixtral",
            {"moe": {"expert_dropout": 0.1}},
            "moe.expert_dropout must be left out for models of transformers",
        ),
        ("mixtral", {"moe": {"gate": "raw"}}, "moe.gate must be left out for models of transformers"),
        (
            "mixtral",
            {"moe": {"bias_update": 0.1}},
            "moe.bias_update must be 0 where routers have no selection bias",
        ),
        (
            "deepseek_v3",
            {"moe": {"bias_update": 0.1}, "train": {"freeze": "gate"}},
            "moe.bias_update must be 0 where train.freeze leaves routers as they are, got 0.1",
        ),
        (
            "ours",
            {"train": {"lora": {}, "router_learning_rate": 0.1}},
            "train.router_learning_rate must be left out where no router is trained, got 0.1",
        ),
        (
            "ours",
            {"train": {"freeze": "moe", "expert_learning_rate": 0.1}},
            "train.expert_learning_rate must be left out where no expert is trained, got 0.1",
        ),
        (
            "mixtral",
            {"train": {"recompute_experts": True}},
            "train.recompute_experts must be left out for models of",
        ),
        (
            "ours",
            {"moe": {"gate": "straight_through"}},
            "experts_per_token must be 1 with gate 'straight_through', got 2",
        ),
        (
            "ours",
            {"train": {"steps": None, "epochs": 1}, "data": {"streaming": True}},
            "train.steps must be given with",
        ),
        ("ours", {"data": {"max_length": 4096}}, "data.max_length must be at most 2048"),
        (
            "ours",
            {"train": {"lora": {"target_modules": ["nothing"]}}},
            "train.lora does not fit the model: Target modules {'nothing'} not found",
        ),
    ],
)
def test_what_a_model_has_not_is_refused(kind, changes, message, models, data, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_training(a_recipe(models[kind], data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_one_expert_with_a_constant_gate_is_refused_before_data_is_read(tmp_path):
    model = save_model("ours", tmp_path / "one", num_experts_per_tok=1)
    recipe = a_recipe(model, tmp_path / "missing.jsonl", tmp_path / "out")
    with pytest.raises(
        RunError, match=r"^moe.gate must not be 'renorm' with one expert per token, as model.layers.0"
    ):
        run_training(recipe)
    for changes in ({"moe": {"gate": "straight_through"}}, {"train": {"freeze": "gate"}}):
        prepare_model(a_recipe(model, tmp_path / "missing.jsonl", tmp_path / "out", **changes))


@pytest.mark.parametrize(
    ("precision", "packing", "on_gpu", "has_flash", "expected"),
    [
        ("bfloat16", True, True, True, "flash_attention_2"),
        ("float32", True, True, True, None),
        ("bfloat16", False, True, True, None),
        ("bfloat16", True, False, True, None),
        ("bfloat16", True, True, False, None),
    ],
)
def test_flash_attention_is_for_packed_rows_in_half_precision(
    precision, packing, on_gpu, has_flash, expected, tmp_path
):
    changes = {"train": {"precision": precision}, "data": {"packing": packing}}
    recipe = a_recipe(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out", **changes)
    assert attention_of(recipe, on_gpu, has_flash) == expected


def test_one_expert_of_mixtral_is_refused(tmp_path):
    folder = tmp_path / "one"
    tiny_family("mixtral", vocab_size=VOCAB_SIZE, num_experts_per_tok=1).save_pretrained(folder)
    with pytest.raises(RunError, match=r"^moe.gate must not be 'renorm' with one expert per token"):
        prepare_model(a_recipe(folder, tmp_path / "missing.jsonl", tmp_path / "out"))


def test_an_output_with_files_is_refused(models, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(
        RunError, match=r"^output must be a new or empty folder, got .*; --resume goes on with its run"
    ):
        run_training(a_recipe(models["ours"], data, tmp_path / "out"))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"optimizer": "adamw_8bit"},
            "train.optimizer 'adamw_8bit' needs bitsandbytes, which is missing; run:",
        ),
        (
            {"optimizer": "adamw_torch_4bit"},
            "needs torchao, which is missing; run: pip install torchao",
        ),
        (
            {"report_to": ["wandb"]},
            "train.report_to 'wandb' needs a package that is not installed; run: pip install",
        ),
        ({"report_to": ["paper"]}, "train.report_to must name some of "),
    ],
)
def test_a_missing_package_is_named(train, message, models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda name: name == "accelerate")
    monkeypatch.setattr(packages, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(RunError, match=re.escape(message)):
        run_training(a_recipe(models["ours"], data, tmp_path / "out", train=train))


def test_training_needs_accelerate(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda _: None)
    with pytest.raises(
        RunError, match=r"^training needs accelerate, .* run: pip install 'moe-runtime\[train\]'"
    ):
        run_training(a_recipe(models["ours"], data, tmp_path / "out"))


def test_there_must_be_a_run_to_go_on_with(models, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(
        RunError, match=r"^output must hold a run to go on with, got .*, which has files but no"
    ):
        run_training(a_recipe(models["ours"], data, tmp_path / "out"), resume=True)


def test_several_processes_need_a_layout(models, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RunError, match=r"^parallel.data must be 'ddp' or 'fsdp' with 2 processes, got 'none'"
    ):
        run_training(a_recipe(models["ours"], data, tmp_path / "out"))


def test_a_loss_that_is_not_finite_stops_the_run(models, data, tmp_path):
    # a rate that takes the weights away in the second step
    train = {"learning_rate": 1e30, "optimizer": "sgd", "save_every": 1, "max_grad_norm": 0}
    recipe = a_recipe(models["ours"], data, tmp_path / "out", train=train)
    with pytest.raises(RunError) as caught:
        run_training(recipe)
    message = str(caught.value)
    assert message.startswith("the loss or its gradient is not finite in step 2, in the samples ")
    assert len(re.findall(r"\d+", message.partition("samples")[2].partition("(")[0])) == 4
    assert (
        f"the last good checkpoint is {tmp_path / 'out/checkpoints/checkpoint-1'}, and nothing was" in message
    )
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert not (tmp_path / "out" / "training.json").exists()


def test_a_step_without_labels_is_named(models, data, tmp_path, monkeypatch):
    def without_labels(*arguments):
        loaded = load_train_data(*arguments)

        def collate(rows):
            batch = loaded.collator(rows)
            return batch | {"labels": torch.full_like(batch["labels"], -100)}

        return dataclasses.replace(loaded, collator=collate)

    monkeypatch.setattr(run_module, "load_train_data", without_labels)
    with pytest.raises(
        RunError, match=r"^no label counts in step 1, in the samples \d+, \d+, \d+, \d+ \(losses nan,"
    ):
        run_training(a_recipe(models["ours"], data, tmp_path / "out"))


def test_a_full_disk_leaves_the_checkpoint_before(models, data, tmp_path):
    """A limit on the size of files stands for the disk."""
    recipe = a_recipe(models["ours"], data, tmp_path / "out", train={"save_every": 1, "keep": 1})
    stopped_at(2, recipe)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            RunError, match=r"^the checkpoint of step 3 could not be written \(.*File too large"
        ) as caught:
            run_training(recipe, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    assert str(caught.value).endswith(f"the one before it, {kept}, is whole")
    assert [path.name for path in Path(kept.parent).iterdir()] == ["checkpoint-2"]
    assert run_training(recipe, resume=True).steps == 4


def test_the_command_says_a_mistake_in_one_sentence(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("model: a\noutput: b\n")
    assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err == f"moe-runtime: {tmp_path / 'recipe.yaml'}: key 'data' is missing\n"
