"""Whole runs: what they write, and how they go on."""

import contextlib
import errno
import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from byte_tokenizer import byte_tokenizer
from moe_families import tiny_family
from rich.console import Console
from tiny_models import tiny_model
from training_runs import VOCAB_SIZE, a_recipe, nats_per_label, recipe_values, stopped_at

from moe_runtime import cli
from moe_runtime.errors import RunError
from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.train import checkpoints, export, figures
from moe_runtime.train.model import prepare_model
from moe_runtime.train.output import load_whole
from moe_runtime.train.recipe import load_recipe, recipe_from_dict
from moe_runtime.train.run import run_training
from moe_runtime.train.trainer import MoeTrainer

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
    assert [entry["step"] for entry in result["log"] if "eval_words_loss" in entry] == [2, 4]
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
    assert planned["checkpoint"] is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("train", "message"),
    [({"report_to": ["paper"]}, "train.report_to must name"), ({}, "output must be a new or empty folder")],
)
def test_a_dry_run_refuses_what_a_run_refuses(train, message, models, data, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe_values(models["ours"], data, tmp_path, train=train))
    )
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


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
    said = Console(file=io.StringIO())
    # a run that was killed before its first checkpoint
    assert run_training(recipe, resume=True, console=said).steps == 3  # 24 rows, 2 · 2 a step
    assert said.file.getvalue().startswith(f"no checkpoint in {tmp_path / 'out'} yet: begins anew\n")


def test_evaluation_and_checkpoints_take_no_time_of_training(models, data, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(figures, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slower(owner, name, seconds):
        of_owner = getattr(owner, name)

        def call(*arguments):
            now[0] += seconds
            return of_owner(*arguments)

        monkeypatch.setattr(owner, name, call)

    slower(MoeTrainer, "after_update", 1.0)
    slower(MoeTrainer, "get_eval_dataloader", 10.0)
    slower(checkpoints, "write", 100.0)
    changes = {"train": {"steps": 2, "save_every": 1, "eval_every": 1}, "data": {"eval": [str(data)]}}
    result = run_training(a_recipe(models["ours"], data, tmp_path / "out", **changes))
    first, second = result.values("tokens")
    assert result.values("tokens_per_s") == [first, second - first]


def test_a_whole_model_is_loaded_and_nothing_else():
    model = tiny_model(tie_word_embeddings=True)
    state = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert "lm_head.weight" not in state
    load_whole(model, state)
    assert not model.lm_head.weight.any()
    name = "model.layers.0.mlp.router.weight"
    for other in ({key: value for key, value in state.items() if key != name}, state | {"more": state[name]}):
        with pytest.raises(RunError, match=rf"differs in ({name}|more)$"):
            load_whole(model, other)


def test_a_stream_tells_at_its_end_what_it_dropped(models, data, tmp_path):
    changes = {"train": {"steps": 2}, "data": {"streaming": True, "too_long": "drop", "max_length": 20}}
    said = Console(file=io.StringIO())
    run_training(a_recipe(models["ours"], data, tmp_path / "out", **changes), console=said)
    read = json.loads((tmp_path / "out" / "training.json").read_text())["data"]["read"]
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    lengths = [len(sample["prompt"] + sample["completion"]) + 1 for sample in samples]
    seen = lengths[: read["samples"] + read["dropped"]]
    assert read["samples"] >= 8  # 2 steps of 2 · 2, and what is read ahead
    assert read["dropped"] == sum(length > 20 for length in seen) > 0
    assert f"samples read {read['samples']}, dropped {read['dropped']}\n" in said.file.getvalue()


def test_what_is_left_out_is_told_before_a_training(models, tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [{"prompt": "p" * 9, "completion": "c" * count} for count in (1, 30, 2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"train": {"steps": 1}, "data": {"too_long": "drop", "max_length": 20}}
    said = Console(file=io.StringIO())
    run_training(a_recipe(models["ours"], file, tmp_path / "out", **changes), console=said)
    assert said.file.getvalue().startswith("samples read 2, dropped 1\n")


# --- kinds of models ---


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dense", {}),
        ("attention", {}),
        ("mixtral", {"train": {"gradient_checkpointing": True}, "moe": {"z_loss": 0.1}}),
        ("deepseek_v3", {"moe": {"balance_loss": 0, "bias_update": 1e-2}}),
        (
            "ours",
            {"train": {"precision": "bfloat16", "recompute_experts": True, "gradient_checkpointing": True}},
        ),
        ("ours", {"train": {"schedule": "cosine", "restarts": [2], "optimizer": "adafactor"}}),
    ],
    ids=["dense", "attention", "mixtral", "deepseek", "bfloat16", "adafactor"],
)
def test_the_loss_falls(kind, changes, models, data, tmp_path):
    losses = run_training(a_recipe(models[kind], data, tmp_path / "out", **changes)).values("lm_loss")
    assert losses[-1] < losses[0]


def test_a_bias_moves_by_the_counts_of_the_whole_step(models, data, tmp_path, monkeypatch):
    gamma = 0.125
    moe = {"balance_loss": 0, "balance_over": "global_batch", "bias_update": gamma}
    # a loss without weight is not worth a forward pass
    monkeypatch.delattr(MoeTrainer, "_count_whole_batch")
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


def test_adapters_depend_on_the_seed_alone(models, data, tmp_path):
    def adapters(seed):
        torch.rand(seed + 1)  # what ran before in this process
        recipe = a_recipe(models["ours"], data, tmp_path / "out", train={"lora": {"rank": 2}}, seed=seed)
        model = prepare_model(recipe).model
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    first, again, other = adapters(0), adapters(0), adapters(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_adapters_belong_to_the_weights_they_were_trained_for(models, data, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(models["ours"], model)
    recipe = a_recipe(model, data, tmp_path / "out", train={"steps": 1, "lora": {"rank": 2}})
    run_training(recipe)
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-1"

    def fill(folder, *_):
        folder.mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "fill", fill)
    with pytest.raises(RunError, match=r"plain could not be written \(.*No space left on device\)$"):
        export.export_checkpoint(checkpoint, tmp_path / "exported" / "plain")
    with pytest.raises(RunError, match=r"run.json must say what the checkpoint is of: No such file or dir"):
        export.export_checkpoint(model, tmp_path / "exported" / "plain")
    assert not list((tmp_path / "exported").iterdir())
    tiny_model(vocab_size=VOCAB_SIZE, seed=1).save_pretrained(model)
    for call in (run_training, lambda recipe, _: export.export_checkpoint(checkpoint, tmp_path / "plain")):
        with pytest.raises(RunError, match=r"^model must hold the weights that the adapters in .* changed$"):
            call(recipe, True)


# --- going on ---


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
    changes = {"data": {"eval": [str(data)]}, "train": {"precision": "bfloat16"}}
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
        ({"moe": {"z_loss": 0.5}}, "moe.z_loss must be 0.0 as in the checkpoint"),
        ({"seed": 5}, "seed must be 0 as in the checkpoint"),
        (
            {"train": {"accumulate": 3}},
            "train.batch_size times train.accumulate times processes must be 4 as in",
        ),
        ({"train": {"steps": 1}}, "train.steps must be at least 2, the step of"),
    ],
    ids=["rate", "losses", "seed", "rows", "fewer-steps"],
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
    with pytest.raises(RunError, match=re.escape(message)):
        run_training(recipe, resume=True)


def test_what_may_change_goes_on_with_the_same_losses(finished, models, data, tmp_path, capsys):
    def values(**changes):
        return recipe_values(
            models["ours"], data, tmp_path / "out", data={"eval": [f"words={data}"]}, **changes
        )

    stopped_at(2, recipe_from_dict(values(train={"save_every": 1})))
    otherwise = {"save_every": 3, "keep": 1, "log_every": 3, "batch_size": 4, "accumulate": 1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values(train=otherwise, moe={})))  # a section without keys is none
    assert cli.main(["train", str(recipe), "--resume", "--dry-run"]) == 0
    assert f"Would go on from {tmp_path / 'out/checkpoints/checkpoint-2'}\n" in capsys.readouterr().out
    resumed = run_training(load_recipe(recipe), resume=True).values("lm_loss")
    straight = [entry["lm_loss"] for entry in json.loads(finished[2])["log"] if "lm_loss" in entry]
    assert resumed[:3] == pytest.approx(straight[:3], rel=1e-5)
    # the balance of micro-batches of another size is another loss
    assert resumed[3] == pytest.approx(straight[3], rel=1e-3)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_changed_data_is_refused(models, data, tmp_path):
    shutil.copy(data, tmp_path / "data.jsonl")
    recipe = a_recipe(models["ours"], tmp_path / "data.jsonl", tmp_path / "out", train={"steps": 1})
    run_training(recipe)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(RunError, match=r"but its files have changed$"):
        run_training(recipe, resume=True)
