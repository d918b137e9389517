"""Whole runs: what they leave, that they go on where they stopped, and what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from dense_models import tensors_of
from upit_runs import change_tensor, experts_of, small_recipe, write_instructions

import upcycle
import upcycle.upit.fit
from moe_runtime.cli import main
from moe_runtime.hf.loading import load_causal_lm, load_tokenizer
from upcycle.errors import UpcycleError
from upcycle.upit import run_upit

ROOT = Path(__file__).resolve().parents[3]
STAGES = ["prepare", "expand", "route", "assemble", "post_train"]


def weights(recipe):
    return {path.name: path.read_bytes() for path in Path(recipe.output).glob("*.safetensors")}


@pytest.mark.parametrize("paradigm", ["full", "lora"])
def test_a_run_leaves_a_trained_mixture(paradigm, finished):
    recipe, results = finished(paradigm=paradigm)
    assert list(results) == STAGES
    assert [c["step"] for c in results["prepare"]["checkpoints"]] == [2, 4]
    assert [origin["parents"] for origin in results["expand"]["experts"][:2]] == [None, None]
    assert sum(results["route"]["bucket_sizes"]) == results["route"]["seed_samples"] == 12
    losses = [*results["post_train"]["losses"].values()]
    assert len(losses) == 4
    assembled, trained = (
        load_causal_lm(folder) for folder in (Path(recipe.work) / "assemble" / "model", recipe.output)
    )
    assert (trained.config.num_experts, trained.config.num_experts_per_tok) == (4, 2)
    ids = load_tokenizer(recipe.output)("12 1212", return_tensors="pt")["input_ids"]
    assert trained(ids, labels=ids).loss < assembled(ids, labels=ids).loss - 0.01
    record = json.loads((Path(recipe.output) / "upcycle.json").read_text())
    assert record["upit"]["route"]["epochs"] == 2
    assert record["post_training"] == results["post_train"]
    assert "trained for 1 epochs since" in (Path(recipe.output) / "README.md").read_text()


@pytest.mark.parametrize("non_expert", ["mean", "base"])
def test_everything_else_is_the_mean_or_the_bases(non_expert, finished):
    recipe, _ = finished(non_expert=non_expert, post_train={"epochs": 0})
    name = "model.layers.1.self_attn.q_proj.weight"
    of_base = tensors_of(Path(recipe.base))[name]
    of_mean = tensors_of(Path(recipe.work) / "prepare" / "rest-0002")[name]
    assert not torch.equal(of_base, of_mean)
    assert torch.equal(tensors_of(Path(recipe.output))[name], of_mean if non_expert == "mean" else of_base)


def test_verify_knows_that_the_mixture_was_trained(finished):
    recipe, _ = finished()
    verification = upcycle.verify(recipe.output)
    assert verification.passed
    assert "it was trained after it was assembled" in verification.not_equal_because


def test_a_finished_run_does_nothing_again(finished):
    recipe, results = finished()
    lines = []
    assert run_upit(recipe, tell=lines.append) == results
    assert lines == [f"{stage}: done before" for stage in STAGES]


STOPS = [
    "prepare: running",
    "  epoch 0.5, step 2",
    "prepare: done",
    "expand: running",
    "route: done",
    "assemble: running",
    "post_train: running",
    "  epoch 0.5, step 2",
]


@pytest.mark.parametrize("seconds", [0.0, 300.0])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(seconds, finished, recipe, monkeypatch):
    """Between stages and within them: at each stop the run is begun anew from what it left."""
    monkeypatch.setattr(upcycle.upit.fit, "STATE_SECONDS", seconds)
    whole, results = finished()
    made = recipe()
    for stop in STOPS:

        def interrupt(line, stop=stop):
            if line.startswith(stop):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_upit(made, tell=interrupt)
    again = run_upit(made)
    assert weights(made) == weights(whole)
    for stage in ("prepare", "route", "post_train"):
        assert again[stage] == results[stage]


CHILD = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/kernels", sys.argv[1] + "/tests"]
import torch
torch.set_num_threads(int(sys.argv[3]))
from upcycle.upit import load_upit_recipe, run_upit
def tell(line):
    if line.startswith("  samples per expert"):
        os.kill(os.getpid(), signal.SIGKILL)
run_upit(load_upit_recipe(sys.argv[2]), tell=tell)
"""


def test_another_process_that_is_killed_goes_on_to_the_same_bits(finished, recipe, tmp_path):
    """U3: equal under a seed whatever the process; killed for good, not by an exception."""
    whole, _ = finished()
    made = recipe()
    path = write(made, tmp_path / "recipe.yaml")
    command = [sys.executable, "-c", CHILD, str(ROOT), path, str(torch.get_num_threads())]
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (Path(made.work) / "route" / "result.json").exists()
    run_upit(made)
    assert weights(made) == weights(whole)


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_output_has_the_bases_type_and_is_rounded_once(epochs, dense, base, data, tmp_path):
    """Training starts from what the experts are, not from their rounding."""
    half = shutil.copytree(dense("llama", vocab_size=257, dtype=torch.bfloat16), tmp_path / "half")
    load_tokenizer(base).save_pretrained(half)
    made = small_recipe(half, data, tmp_path, post_train={"epochs": epochs})
    run_upit(made)
    dtypes = [
        {tensor.dtype for tensor in tensors_of(folder).values()}
        for folder in (Path(made.work) / "assemble" / "model", Path(made.output))
    ]
    assert dtypes == [{torch.float32 if epochs else torch.bfloat16}, {torch.bfloat16}]
    assert load_causal_lm(made.output).dtype == torch.bfloat16
    assert not [*Path(made.work).rglob("state-*")]


def test_another_seed_gives_another_mixture(finished):
    assert weights(finished()[0]) != weights(finished(seed=1)[0])


def test_a_stage_runs_alone_after_those_before_it(recipe):
    made = recipe(route={"init": "normal"}, post_train={"epochs": 0})
    with pytest.raises(UpcycleError, match="stage 'expand' needs the result of 'prepare'; run that first"):
        run_upit(made, only="expand")
    assert list(run_upit(made, only="prepare")) == ["prepare"]
    assert list(run_upit(made, only="expand")) == ["prepare", "expand"]
    with pytest.raises(UpcycleError, match="has no stage 'route'; its stages are prepare, expand, assemble"):
        run_upit(made, only="route")
    results = run_upit(made)
    assert results["post_train"] == {"epochs": 0, "losses": {}}
    router = tensors_of(Path(made.output))["model.layers.0.mlp.router.weight"]
    assert router.std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(
    ("stage", "section", "key", "value", "sentence"),
    [
        ("prepare", "prepare", "lr", 0.5, "made with prepare.lr 0.001, but now it is 0.5"),
        ("route", "route", "epochs", 9, "made with route.epochs 2, but now it is 9; remove the folders"),
    ],
)
def test_changed_settings_of_a_stage_are_refused(stage, section, key, value, sentence, finished):
    recipe, _ = finished()
    changed = replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})
    with pytest.raises(UpcycleError, match=f"work.{stage} was {sentence}"):
        run_upit(changed)


def test_changed_data_is_refused(finished, tmp_path):
    recipe, _ = finished()
    other = tmp_path / "other.txt"
    other.write_text("a" * 5000)
    with pytest.raises(UpcycleError, match="was made with data"):
        run_upit(replace(recipe, data=(str(other),)))


def test_data_in_another_order_or_twice_is_refused(base, data, tmp_path):
    """Which samples make up a step depends on it."""
    other = write_instructions(tmp_path / "other.jsonl", 30)
    made = replace(small_recipe(base, data, tmp_path), data=(str(data), str(other)))
    run_upit(made, only="prepare")
    for changed in ((str(other), str(data)), (str(data), str(other), str(data))):
        with pytest.raises(UpcycleError, match="was made with data"):
            run_upit(replace(made, data=changed), only="prepare")
    assert list(run_upit(made, only="prepare")) == ["prepare"]


def test_a_base_that_has_changed_anywhere_is_refused(base, data, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    made = small_recipe(own, data, tmp_path)
    run_upit(made, only="prepare")
    change_tensor(own, "model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(UpcycleError, match=r"work.prepare was made with base.sha256 '[0-9a-f]{64}', but now"):
        run_upit(made)


def test_checkpoints_that_have_changed_between_stages_are_refused(recording, recipe, tmp_path):
    own = shutil.copytree(recording.folder, tmp_path / "recording")
    made = recipe(checkpoints=str(own))
    run_upit(made, only="expand")
    shutil.copytree(own / "0003", own / "0004")
    values = json.loads((own / "index.json").read_text())
    grown = [*values["checkpoints"], {**values["checkpoints"][2], "folder": "0004", "step": 9}]
    (own / "index.json").write_text(json.dumps({**values, "checkpoints": grown}))
    with pytest.raises(UpcycleError, match=r"work.expand was made with recording.sha256 '"):
        run_upit(made)


def test_checkpoints_of_a_trainer_take_the_first_stages_place(recording, recipe):
    made = recipe(checkpoints=str(recording.folder), route={"freeze_experts": True}, post_train={"epochs": 0})
    results = run_upit(made)
    assert "prepare" not in results
    sources = [origin["folder"] for origin in results["expand"]["experts"][:3]]
    assert sources == [str(folder) for folder in experts_of(recording)]
    assert (Path(made.output) / "tokenizer.json").is_file()


def test_checkpoints_of_another_kind_or_base_are_refused(
    recording, low_rank_recording, dense, data, recipe, tmp_path
):
    with pytest.raises(UpcycleError, match="of kind 'lora', which paradigm 'full' does not take"):
        run_upit(recipe(checkpoints=str(low_rank_recording.folder)))
    base = dense("llama", vocab_size=257, seed=3)
    load_tokenizer(recording.base).save_pretrained(base)
    with pytest.raises(UpcycleError, match="they were made from another base"):
        run_upit(small_recipe(base, data, tmp_path, checkpoints=str(recording.folder)))


def test_a_seed_fraction_without_a_sample_for_each_expert_is_refused_before_training(recipe):
    made = recipe(route={"seed_fraction": 0.1})
    with pytest.raises(UpcycleError, match=r"0.1 of 24 samples are 2; set it to 0.166667 or more"):
        run_upit(made)
    made = recipe(route={"min_per_expert": 4})
    with pytest.raises(
        UpcycleError, match=r"for each of the 4 experts, but 0.5 of 24 samples are 12; set it"
    ):
        run_upit(made)
    assert not (Path(made.work) / "prepare").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_length": 65}, r"at most the base's max_position_embeddings \(64\), got 65"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, sentence, recipe):
    made = recipe(**changes)
    with pytest.raises(UpcycleError, match=sentence):
        run_upit(made)
    assert not (Path(made.work) / "prepare").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(recipe):
    with pytest.raises(UpcycleError, match="device must be cpu where there is no CUDA GPU, got 'cuda:1'"):
        run_upit(recipe(device="cuda:1"))


def test_a_tokenizer_of_another_model_is_refused(dense, base, data, tmp_path):
    narrow = shutil.copytree(dense("llama"), tmp_path / "narrow")
    load_tokenizer(base).save_pretrained(narrow)
    with pytest.raises(UpcycleError, match=r"tokens below its vocab_size \(64\), got 256"):
        run_upit(small_recipe(narrow, data, tmp_path))


def test_an_output_that_exists_is_refused(recipe):
    made = recipe()
    Path(made.output).mkdir()
    with pytest.raises(UpcycleError, match="out exists already and is not this run's; choose another output"):
        run_upit(made)


def test_an_output_written_just_before_a_kill_counts(recipe, finished):
    whole, results = finished()
    assert (Path(whole.work) / "post_train" / "result.json").is_file()
    (Path(whole.work) / "post_train" / "result.json").unlink()
    before = weights(whole)
    assert run_upit(whole) == results
    assert weights(whole) == before


def test_a_finished_run_whose_output_is_elsewhere_says_so(recipe):
    made = recipe(route={"init": "normal"}, post_train={"epochs": 0})
    run_upit(made)
    moved = replace(made, output=f"{made.output}-moved")
    with pytest.raises(
        UpcycleError, match=r"its output is not at .*out-moved; move it there, or remove .*work"
    ):
        run_upit(moved)
    Path(made.output).rename(moved.output)
    assert run_upit(moved)["post_train"] == {"epochs": 0, "losses": {}}
    with pytest.raises(UpcycleError, match=r"its output is not at .*out; move it there"):
        run_upit(made)
    shutil.rmtree(Path(made.work) / "post_train")
    run_upit(made)
    assert weights(made) == weights(moved)


@pytest.mark.parametrize("stopped", [True, False])
def test_anothers_output_is_refused(stopped, recipe, base, finished):
    """Before a run has said that it is done and after; empty, of another method, of another UpIT run."""
    made = recipe(route={"init": "normal"}, post_train={"epochs": 0})
    run_upit(made)
    if stopped:
        (Path(made.work) / "post_train" / "result.json").unlink()
    output = Path(made.output)
    values = {"method": "copy", "base": str(base), "experts": 2, "output": str(output)}
    others = [
        output.mkdir,
        lambda: upcycle.upcycle(upcycle.recipe_from_dict(values)),
        lambda: shutil.copytree(finished()[0].output, output),
    ]
    for write_other in others:
        shutil.rmtree(output)
        write_other()
        with pytest.raises(UpcycleError, match="out exists already and is not this run's; choose another"):
            run_upit(made)


def test_two_runs_in_one_work_folder_are_refused(recipe):
    made = recipe()
    second = []

    def begin_again(line):
        if line == "prepare: running":
            with pytest.raises(UpcycleError, match="work is being written by another run"):
                run_upit(made)
            second.append(line)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_upit(made, tell=begin_again)
    assert second


def test_native_targets_are_trained_with_the_same_balance_loss(finished):
    """A mixture in our format and one in Mixtral's are trained alike."""
    ours, theirs = finished()[1]["post_train"], finished(target="mixtral")[1]["post_train"]
    assert [*theirs["losses"].values()] == pytest.approx([*ours["losses"].values()], rel=1e-4)


# --- the command ---


def write(recipe, path):
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    return str(path)


def test_the_command_runs_a_stage_and_prints_json(recipe, tmp_path, capsys):
    path = write(recipe(), tmp_path / "recipe.yaml")
    assert main(["upit", path, "--stage", "prepare", "--json"]) == 0
    output = capsys.readouterr()
    printed = json.loads(output.out)
    assert printed["stages"]["prepare"]["samples"] == 24
    assert "prepare: done" in output.err


def test_a_dry_run_says_what_would_be_done(recipe, tmp_path, capsys):
    made = recipe()
    path = write(made, tmp_path / "recipe.yaml")
    assert main(["upit", path, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["samples"], planned["steps_per_epoch"], planned["seed_samples"]) == (24, 4, 12)
    assert [row["stage"] for row in planned["stages"]] == STAGES
    assert main(["upit", path, "--dry-run"]) == 0
    assert f"Would write {planned['parameters']:,} parameters" in capsys.readouterr().out
    assert not Path(made.work).exists()
    assert not Path(made.output).exists()


def test_the_command_explains_mistakes(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: x\ndata: [y]\noutput: z\nexperts: 1\n")
    assert main(["upit", str(path)]) == 2
    assert capsys.readouterr().err == f"moe-runtime: {path}: experts must be at least 2, got 1\n"
