"""Whole runs: what they write, how they go on, and what they refuse."""

import contextlib
import dataclasses
import io
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from byte_tokenizer import byte_tokenizer
from moe_families import tiny_family
from training_runs import VOCAB_SIZE, a_recipe, nats_per_label, recipe_values, save_model

from moe_runtime import cli
from moe_runtime.errors import RunError
from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.train import packages
from moe_runtime.train import run as run_module
from moe_runtime.train.data.load import load_train_data
from moe_runtime.train.model import attention_of, prepare_model
from moe_runtime.train.recipe import load_recipe
from moe_runtime.train.run import run_training

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(folder):
    return load_causal_lm(folder).state_dict()


def assert_same_weights(folder, other):
    expected, actual = weights(other), weights(folder)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture(autouse=True)
def _precision_of_products():
    """The command changes it, for its process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


# --- what a run writes ---


@pytest.fixture(scope="module")
def finished(models, data, tmp_path_factory):
    """A run by the command, of our model; its recipe file, output and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    values = recipe_values(
        models["ours"],
        data,
        folder / "out",
        train={"save_every": 1, "keep": 2, "eval_every": 2},
        data={"eval": [f"words={data}"]},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert cli.main(["train", str(folder / "recipe.yaml"), "--json"]) == 0
    return folder / "recipe.yaml", folder / "out", out.getvalue(), err.getvalue()


def test_the_command_trains_and_prints_one_object(finished):
    recipe, output, printed, lines = finished
    result = json.loads(printed)
    assert result == json.loads((output / "training.json").read_text())["result"]
    assert result["steps"] == 4
    assert result["flops"] > 0
    expected = nats_per_label(output, load_recipe(recipe))  # what is evaluated is what was trained on
    assert result["metrics"] == {"eval_words_loss": pytest.approx(expected, rel=1e-5)}
    assert "step 4/4, lm loss " in lines
    logged = [entry for entry in result["log"] if "lm_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    assert sum("eval_words_loss" in entry for entry in result["log"]) >= 2
    assert logged[-1]["lm_loss"] < logged[0]["lm_loss"]
    assert logged[-1]["tokens"] == result["tokens"]
    for name in (
        "tokens_per_s",
        "tflops_per_s",
        "mfu",
        "memory_gb",
        "load_cv",
        "router_entropy",
        "router_margin",
    ):
        assert logged[0][name] > 0, name
    assert 0 < logged[0]["padding_share"] < 1
    # the weighted sum that is trained on
    assert logged[0]["loss"] == pytest.approx(
        logged[0]["lm_loss"] + 0.01 * 2 * logged[0]["balance_loss"], rel=1e-5
    )
    checkpoints = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-3", "checkpoint-4"]
    assert len(json.loads((output / "training.json").read_text())["load"]) == 2


def test_the_output_is_a_checkpoint_for_everything_else(finished, capsys):
    output = finished[1]
    assert cli.main(["generate", str(output), "--prompt", "ab", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] > 0
    assert_same_weights(output, output / "checkpoints" / "checkpoint-4")
    config = json.loads((output / "config.json").read_text())
    assert (config["router_aux_loss_coef"], config["router_z_loss_coef"]) == (0.01, 0.0)
    card = (output / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["ours"]
    assert "trained for 4 steps" in card


def test_a_finished_run_is_only_read(finished, capsys):
    recipe, output = finished[:2]
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["train", str(recipe), "--resume"]) == 0
    assert "4 steps" in capsys.readouterr().out
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_a_dry_run_writes_nothing(models, data, tmp_path, capsys):
    values = recipe_values(models["ours"], data, tmp_path / "out", train={"freeze": "moe"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["steps"], planned["rows_per_step"]) == (4, 4)
    assert planned["parameters"]["gate"] == {"all": 2 * 5 * 24, "trained": 0}
    assert planned["parameters"]["rest"]["trained"] > 0
    assert not (tmp_path / "out").exists()


def test_a_configuration_of_transformers_is_saved_as_it_was(data, tmp_path):
    folder = tmp_path / "model"
    tiny_family("mixtral", vocab_size=VOCAB_SIZE, output_router_logits=True).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    run_training(a_recipe(folder, data, tmp_path / "out", train={"steps": 1}))
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert after == before
    assert "import moe_runtime" not in (tmp_path / "out" / "README.md").read_text()


def test_epochs_are_counted_in_steps(models, data, tmp_path):
    recipe = a_recipe(models["ours"], data, tmp_path / "out", train={"steps": None, "epochs": 0.5})
    assert run_training(recipe).steps == 3  # 24 rows, 2 · 2 a step


# --- kinds of models ---


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dense", {}),
        ("mixtral", {"train": {"gradient_checkpointing": True}, "moe": {"z_loss": 0.1}}),
        ("deepseek_v3", {"moe": {"balance_loss": 0, "bias_update": 1e-2}}),
        (
            "ours",
            {"train": {"precision": "bfloat16", "recompute_experts": True, "gradient_checkpointing": True}},
        ),
        ("ours", {"train": {"schedule": "cosine", "restarts": [2], "optimizer": "adafactor"}}),
    ],
    ids=["dense", "mixtral", "deepseek", "bfloat16", "adafactor"],
)
def test_the_loss_falls(kind, changes, models, data, tmp_path):
    losses = run_training(a_recipe(models[kind], data, tmp_path / "out", **changes)).values("lm_loss")
    assert losses[-1] < losses[0]


def test_a_bias_moves_by_the_counts_of_the_whole_step(models, data, tmp_path):
    gamma = 0.125
    moe = {"balance_loss": 0, "bias_update": gamma}
    recipe = a_recipe(models["ours"], data, tmp_path / "out", train={"steps": 1}, moe=moe)
    run_training(recipe)
    load = torch.tensor(json.loads((tmp_path / "out" / "training.json").read_text())["load"])
    trained = load_causal_lm(tmp_path / "out")
    for layer, load_E in zip(trained.model.layers, load, strict=True):
        expected = gamma * torch.sign(1 / len(load_E) - load_E)
        assert torch.equal(layer.mlp.router.selection_bias, expected)


def test_dropout_falls_on_the_experts_of_a_run_only(models, data, tmp_path):
    changes = {"moe": {"expert_dropout": 0.5}, "train": {"steps": 1}}
    dropped = run_training(a_recipe(models["ours"], data, tmp_path / "dropped", **changes))
    plain = run_training(a_recipe(models["ours"], data, tmp_path / "plain", train={"steps": 1}))
    assert dropped.values("lm_loss") != plain.values("lm_loss")
    assert load_causal_lm(tmp_path / "dropped").config.expert_dropout == 0.5


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_adapters_are_trained_saved_and_merged(kind, models, data, tmp_path):
    lora = {"lora": {"rank": 2, "target_modules": ["q_proj"] if kind == "mixtral" else []}}
    run_training(a_recipe(models[kind], data, tmp_path / "out", train=lora))
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    before, after = weights(models[kind]), weights(tmp_path / "out")
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    expected = ("mlp.experts.", "q_proj") if kind == "mixtral" else ("mlp.experts.",)
    assert changed
    assert all(any(part in name for part in expected) for name in changed)


# --- going on ---


def stopped_at(step, recipe):
    """Run until the checkpoint of a step is written, as if the process ended there."""

    class EndedError(Exception):
        pass

    write = run_module.checkpoints.write

    def write_and_end(output, at, *others):
        write(output, at, *others)
        if at == step:
            raise EndedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.checkpoints, "write", write_and_end)
        with pytest.raises(EndedError):
            run_training(recipe)


@pytest.mark.parametrize("kind", ["ours", "mixtral", "adapters", "stream"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(kind, models, data, tmp_path):
    changes = {
        "train": {"save_every": 1, "schedule": "linear", "accumulate": 1},
        "moe": {"balance_over": "global_batch"},
    }
    if kind == "ours":
        changes["moe"] |= {"expert_dropout": 0.3, "bias_update": 1e-3}
    if kind == "adapters":
        changes["train"]["lora"] = {"rank": 2}
    if kind == "stream":
        changes["data"] = {"streaming": True, "packing": True}
    model = models.get(kind, models["ours"])
    straight = run_training(a_recipe(model, data, tmp_path / "straight", **changes))
    stopped = a_recipe(model, data, tmp_path / "stopped", **changes)
    stopped_at(3, stopped)
    resumed = run_training(stopped, resume=True)
    assert_same_weights(tmp_path / "stopped", tmp_path / "straight")
    for name in ("loss", "learning_rate", "tokens"):
        assert resumed.values(name) == straight.values(name), name
    assert resumed.flops == straight.flops


def test_a_run_that_was_stopped_after_its_last_step_only_writes_the_model(models, data, tmp_path):
    changes = {"data": {"eval": [str(data)]}}
    straight = run_training(a_recipe(models["ours"], data, tmp_path / "straight", **changes))
    stopped = a_recipe(models["ours"], data, tmp_path / "stopped", **changes)
    stopped_at(4, stopped)
    resumed = run_training(stopped, resume=True)
    assert_same_weights(tmp_path / "stopped", tmp_path / "straight")
    assert (resumed.steps, resumed.tokens, resumed.flops) == (4, straight.tokens, straight.flops)
    assert resumed.metrics == straight.metrics
    loads = [
        json.loads((tmp_path / name / "training.json").read_text())["load"]
        for name in ("straight", "stopped")
    ]
    assert loads[0] == loads[1]


def test_a_longer_run_goes_on_if_its_schedule_begins_anew(models, data, tmp_path):
    short = {"train": {"steps": 2, "schedule": "linear"}}
    run_training(a_recipe(models["ours"], data, tmp_path / "out", **short))
    longer = {"train": {"steps": 4, "schedule": "linear"}}
    with pytest.raises(
        RunError, match=r"must leave the learning rates .* step 1 changes; .* add 2 to train.restarts"
    ):
        run_training(a_recipe(models["ours"], data, tmp_path / "out", **longer), resume=True)
    longer["train"]["restarts"] = [2]
    result = run_training(a_recipe(models["ours"], data, tmp_path / "out", **longer), resume=True)
    assert result.steps == 4
    assert result.values("learning_rate") == pytest.approx([0.01, 0.005, 0.01, 0.005])
    run_training(a_recipe(models["ours"], data, tmp_path / "at-once", **longer))
    assert_same_weights(tmp_path / "out", tmp_path / "at-once")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"learning_rate": 0.5}}, "train.learning_rate must be 0.01 as in the checkpoint"),
        ({"moe": {"z_loss": 0.5}}, "moe.balance_loss must be None as in the checkpoint"),
        ({"seed": 5}, "seed must be 0 as in the checkpoint"),
        (
            {"train": {"accumulate": 3}},
            "train.batch_size times train.accumulate times processes must be 4 as in",
        ),
        ({"train": {"steps": 1}}, "train.steps must be at least 2, the step of"),
        ({"train": {"save_every": 3, "keep": 1, "log_every": 3, "batch_size": 4, "accumulate": 1}}, None),
    ],
    ids=["rate", "losses", "seed", "rows", "fewer-steps", "what-may-change"],
)
def test_a_checkpoint_of_another_recipe_is_refused(changes, message, models, data, tmp_path_factory):
    # one run for all cases, which leave it as it is
    folder = tmp_path_factory.getbasetemp() / "two-steps"
    if not folder.exists():
        run_training(a_recipe(models["ours"], data, folder, train={"steps": 2}))
    recipe = a_recipe(
        models["ours"],
        data,
        folder,
        **{"train": {"steps": 2}, **changes}
        if "train" not in changes
        else {"train": {"steps": 2} | changes["train"]},
    )
    if message is None:
        assert run_training(recipe, resume=True).steps == 2
    else:
        with pytest.raises(RunError, match=re.escape(message)):
            run_training(recipe, resume=True)


def test_changed_data_is_refused(models, data, tmp_path):
    shutil.copy(data, tmp_path / "data.jsonl")
    recipe = a_recipe(models["ours"], tmp_path / "data.jsonl", tmp_path / "out", train={"steps": 1})
    run_training(recipe)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(RunError, match=r"but its files have changed$"):
        run_training(recipe, resume=True)


# --- what is refused ---


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
