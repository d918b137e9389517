"""The comparison of a mixture with its dense twin: recipe, questions, and a whole run of tiny models."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dense_models import save_dense

import moe_runtime.flan
import upcycle as upcycle_package
from moe_runtime.cli import main
from moe_runtime.errors import RunError
from moe_runtime.flan.check import check_comparison
from moe_runtime.flan.questions import write_questions
from moe_runtime.flan.recipe import FlanTask, load_recipe
from moe_runtime.flan.run import Comparison, make_stages, measuring_cost, tuning_cost

RECIPE = """
mixture: {folder}/mixture
dense: {dense}
output: {folder}/out
instructions: [{folder}/mixed.jsonl]
tasks:
  - {{name: choose, train: {folder}/choose.train.jsonl, test: {folder}/choose.test.jsonl}}
  - {{name: repeat, train: {folder}/repeat.train.jsonl, test: {folder}/repeat.test.jsonl}}
instruction_tuning: {{steps: 3, batch_size: 2, log_every: 1, learning_rate: 1.0e-3}}
task_tuning: {{steps: 2, batch_size: 2, log_every: 1, learning_rate: 1.0e-3}}
max_length: 64
shots: 1
"""


def lines(count: int, *, choices: bool) -> str:
    rows = []
    for i in range(count):
        row = {"task": "choose" if choices else "repeat", "prompt": f"Say {i}: ", "completion": f"{i}"}
        rows.append(row | ({"choices": [f"{i}", "no"], "answer": 0} if choices else {}))
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_checkpoint):
    from upcycle import recipe_from_dict, upcycle

    folder = tmp_path_factory.mktemp("flan")
    for name, target in (("mixture", "moe_runtime"), ("mixtral", "mixtral")):
        recipe = {"method": "copy", "base": str(tiny_checkpoint), "output": str(folder / name)}
        recipe |= {"target": target, "experts": 4, "experts_per_token": 2}
        upcycle(recipe_from_dict(recipe))
    for task in ("choose", "repeat"):
        for part, count in (("train", 12), ("test", 4)):
            (folder / f"{task}.{part}.jsonl").write_text(lines(count, choices=task == "choose"))
    both = lines(1, choices=True) + lines(1, choices=False)
    (folder / "both.jsonl").write_text(both)
    (folder / "mixed.jsonl").write_text(lines(30, choices=False))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, dense=tiny_checkpoint))
    return folder


@pytest.fixture(autouse=True)
def _precision():
    """The command sets that of the process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def changed(folder, tmp_path):
    """Write the recipe with one text for another."""

    def write(old: str, new: str):
        text = (folder / "recipe.yaml").read_text()
        assert old in text
        (tmp_path / "recipe.yaml").write_text(text.replace(old, new))
        return tmp_path / "recipe.yaml"

    return write


def test_a_whole_run_and_its_resumption(folder, capsys):
    assert main(["flan", str(folder / "recipe.yaml"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((folder / "out" / "report.json").read_text())
    setups = {(row["model"], row["setup"], row["shots"], row["task"]) for row in report["rows"]}
    for model in ("mixture", "dense"):
        for task in ("choose", "repeat"):
            for setup, shots in (("untuned", 0), ("untuned", 1), ("instructions", 0), ("instructions", 1)):
                assert (model, setup, shots, task) in setups
            assert (model, "task", 0, task) in setups
            assert (model, "instructions-task", 0, task) in setups
    assert len(setups) == len(report["rows"]) == 24
    by_key = {
        (r["model"], r["setup"], r["task"]): r["training_flops"] for r in report["rows"] if not r["shots"]
    }
    for model in ("mixture", "dense"):
        alone, first = by_key[model, "task", "repeat"], by_key[model, "instructions", "repeat"]
        assert by_key[model, "instructions-task", "repeat"] == alone + first > max(alone, first) > 0
        assert by_key[model, "untuned", "repeat"] == 0
    # a copy computes what its dense source does
    untuned = {
        (r["model"], r["task"], r["shots"]): r["score"] for r in report["rows"] if r["setup"] == "untuned"
    }
    for task, shots in (("choose", 0), ("repeat", 1)):
        assert untuned["mixture", task, shots] == untuned["dense", task, shots]
    models = report["models"]
    ratio = models["mixture"]["training_flops_per_token"] / models["dense"]["training_flops_per_token"]
    assert ratio > 1.05
    assert models["dense"]["instruction_steps"] == round(3 * ratio)
    assert sorted(path.name for path in (folder / "out" / "models").iterdir()) == [
        "dense-instructions",
        "mixture-instructions",
    ]
    page = (folder / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "Instruction tuning, then task tuning: mean score" in page

    assert main(["flan", str(folder / "recipe.yaml")]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall("done before", shown)) == 2 * (3 + 2 * 2)
    assert "Scores of held-out tasks" in shown


def test_only_what_depends_on_a_change_is_done_again(folder, tmp_path):
    for name in ("mixed.jsonl", "repeat.test.jsonl"):
        shutil.copy(folder / name, tmp_path / name)
    shutil.copytree(folder / "mixture", tmp_path / "mixture")
    text = (folder / "recipe.yaml").read_text()
    for name in ("mixture\n", "mixed.jsonl", "repeat.test.jsonl"):
        text = text.replace(f"{folder}/{name}", f"{tmp_path}/{name}")
    (tmp_path / "recipe.yaml").write_text(text)

    def settings():
        stages = make_stages(Comparison(load_recipe(tmp_path / "recipe.yaml")))
        return {stage.name: json.dumps(stage.settings, sort_keys=True) for stage in stages}

    def appended(name: str) -> set[str]:
        """Stages whose settings change with a file."""
        before = settings()
        with (tmp_path / name).open("ab") as file:
            file.write(b" ")
        return {stage for stage, text in settings().items() if text != before[stage]}

    models = ("mixture", "dense")
    assert appended("mixed.jsonl") == {f"{model}-instructions" for model in models}
    setups = ("untuned", "after-instructions", "task-repeat", "instructions-task-repeat")
    assert appended("repeat.test.jsonl") == {f"{model}-{setup}" for model in models for setup in setups}
    assert appended("mixture/model.safetensors") == {
        f"mixture-{setup}"
        for setup in (
            "untuned",
            "instructions",
            *(f"{start}-{task}" for start in ("task", "instructions-task") for task in ("choose", "repeat")),
        )
    }


def test_worked_examples_stand_in_front_of_the_question(folder, tmp_path):
    task = FlanTask(
        name="choose", train=str(folder / "choose.train.jsonl"), test=str(folder / "choose.test.jsonl")
    )
    file = write_questions(task, 2, 0, tmp_path)
    first = json.loads(file.read_text().splitlines()[0])
    assert re.fullmatch(r"Say (\d+): \1\n\nSay (\d+): \2\n\nSay 0: ", first["prompt"])
    assert first["choices"] == ["0", "no"]
    assert file.read_text() == write_questions(task, 2, 0, tmp_path).read_text()
    with pytest.raises(RunError, match=r"shots must be at most the lines .* which are 12, got 13"):
        write_questions(task, 13, 0, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shots: 1", "shot: 1", "unknown key 'shot'; did you mean 'shots'?"),
        (
            "steps: 3",
            "epochs: 3",
            "instruction_tuning.steps must be given, because the twin's follow from it",
        ),
        ("steps: 2,", "steps: 2, freeze: gate,", "task_tuning must have neither lora nor freeze"),
        (
            "name: repeat",
            "name: choose",
            "tasks.name must be another for each task, got ['choose', 'choose']",
        ),
        (
            "shots: 1",
            "shots: 1\nmeasure_precision: half",
            "measure_precision must be one of 'float32', 'bfloat16', got 'half'",
        ),
        ("name: repeat", "name: ../x", "tasks.name must be fit for a folder's name, got '../x'"),
    ],
)
def test_recipes_that_are_wrong(changed, old, new, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(changed(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("/mixture\n", "/nothing\n", "must be a checkpoint folder with a config.json, and has none"),
        ("mixed.jsonl", "none.jsonl", "none.jsonl"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(changed, old, new, message):
    with pytest.raises(RunError, match=re.escape(message)):
        Comparison(load_recipe(changed(old, new)))


def test_models_in_the_wrong_places_are_refused(folder, changed):
    dense = load_recipe(folder / "recipe.yaml").dense
    with pytest.raises(RunError, match="mixture must have experts"):
        Comparison(load_recipe(changed(f"{folder}/mixture", dense)))
    with pytest.raises(RunError, match="dense must have no experts"):
        Comparison(load_recipe(changed(f"dense: {dense}", f"dense: {folder}/mixture")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "/mixture\n",
            "/mixtral\n",
            "moe.expert_dropout must be left out for models of transformers, got one for MixtralForCausalLM",
        ),
        (
            "learning_rate: 1.0e-3}\nmax",
            "learning_rate: 1.0e-3, restarts: [2]}\nmax",
            "train.restarts must lie below train.steps (2), got 2",
        ),
        ("max_length: 64", "max_length: 2000000", "data.max_length must be at most"),
        ("max_length: 64", "max_length: 2", "data must hold samples with tokens that count"),
        ("shots: 1", "shots: 13", "shots must be at most the lines with 'prompt' and 'completion'"),
        ("repeat.test.jsonl", "both.jsonl", "both.jsonl must hold one task, got choose, repeat"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    changed, folder, tmp_path, capsys, old, new, message
):
    path = changed(old, new)
    path.write_text(path.read_text().replace(f"output: {folder}/out", f"output: {tmp_path}/out"))
    assert main(["flan", str(path)]) != 0
    shown = capsys.readouterr()
    assert message in shown.err
    assert "measure it as it is" not in shown.out
    assert not (tmp_path / "out" / "stages").exists()


def test_the_example_fits_what_its_upcycling_recipe_writes(tmp_path, monkeypatch):
    """Both files as they are, on a tiny checkpoint in the place of the real one."""
    from upcycle import load_recipe as load_upcycling
    from upcycle import upcycle

    example = Path(moe_runtime.flan.__file__).with_name("example.yaml")
    granular = Path(upcycle_package.__file__).with_name("recipes") / "granular.yaml"
    monkeypatch.chdir(tmp_path)
    dense = tmp_path / ".cache" / "smollm2-135m"
    dense.mkdir(parents=True)
    byte_tokenizer().save_pretrained(dense)
    save_dense(dense, "llama", vocab_size=VOCAB_SIZE, max_position_embeddings=512)
    upcycle(load_upcycling(granular))
    recipe = load_recipe(example)
    Path("runs/tasks").mkdir()
    for file in recipe.instructions:
        Path(file).write_text(lines(3, choices=False))
    for task in recipe.tasks:
        for file in (task.train, task.test):
            Path(file).write_text(lines(3, choices=True))
    comparison = Comparison(recipe)
    check_comparison(comparison)
    assert comparison.steps("dense", recipe.task_tuning) == recipe.task_tuning.steps


def test_the_costs_of_stages_grow_with_their_work(folder):
    comparison = Comparison(load_recipe(folder / "recipe.yaml"))
    recipe = comparison.recipe
    one, two = (measuring_cost(comparison, "mixture", recipe.tasks, shots) for shots in (0, 1))
    assert two == 2 * one
    assert measuring_cost(comparison, "dense", recipe.tasks, 0) < one
    costs = {
        steps: tuning_cost(
            comparison, "mixture", recipe.instructions, replace(recipe.task_tuning, steps=steps)
        )
        for steps in (1, 2, 3)
    }
    assert costs[3] - costs[2] == pytest.approx(costs[2] - costs[1])
    assert costs[2] > costs[1]
