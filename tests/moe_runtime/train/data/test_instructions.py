"""Instructions of real text: nothing held out is trained on, and lines serve training and evaluation."""

import json

import pytest
from byte_tokenizer import byte_tokenizer

from moe_runtime.cli import main
from moe_runtime.evaluation.tasks import read_examples
from moe_runtime.train.data import DataRecipe, instructions
from moe_runtime.train.data.load import load_train_data

WORDS = [(f"word{n:03}", [f"meaning number {n:03}", f"other {n:03}"]) for n in range(300)]
VERSES = [
    (f"Book{n % 7}", n // 7, f"verse {n:03} has as many words as are needed to be cut into two halves")
    for n in range(400)
]
CODE = '''
def add_{n}(a, b):
    """Add {n} numbers.

    More about it.
    """
    total = "{n}"
    return a + b + total


class Holder:
    def get_{n}(self):
        "Get it."
        return self.value_{n}

    def bare(self):
        return 0

    def twice(self):
        """The same everywhere."""
        return 2
'''
FILES = [(f"module_{n}.py", CODE.format(n=f"{n:03}")) for n in range(120)] + [("old.py", "print 'no'")]


@pytest.fixture
def sources(monkeypatch):
    monkeypatch.setattr(instructions, "dictionary_entries", lambda: iter(WORDS))
    monkeypatch.setattr(
        instructions, "king_james_verses", lambda: iter([*VERSES, ("Again", 1, VERSES[0][2])])
    )
    monkeypatch.setattr(instructions, "standard_library_files", lambda: iter(FILES))


@pytest.fixture
def folder(sources, tmp_path, capsys):
    path = tmp_path / "made"
    assert main(["instructions", str(path), "--samples", "10000", "--heldout", "10000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((path / "instructions.json").read_text())
    return path


def lines(folder, task, part):
    return [json.loads(line) for line in (folder / f"{task}.{part}.jsonl").read_text().splitlines()]


def test_every_item_is_trained_on_or_held_out(folder):
    counts = json.loads((folder / "instructions.json").read_text())["tasks"]
    expected = {
        "define": 300,
        "find_word": 300,
        "describe_function": 241,  # two in each file, and what is the same everywhere once
        "write_function": 241,
        "continue_verse": 400,
        "find_book": 400,
    }
    assert {task: count["train"] + count["heldout"] for task, count in counts.items()} == expected
    for task, count in counts.items():
        assert 0.02 < count["heldout"] / expected[task] < 0.25
        assert len(lines(folder, task, "train")) == count["train"]
        assert count["licence"] in ("CC BY 4.0", "PSF-2.0", "public domain")


def test_tasks_of_one_source_hold_out_the_same(folder):
    held = {line["completion"] for line in lines(folder, "find_word", "heldout")}
    for line in lines(folder, "define", "train"):
        assert not any(f'"{word}"' in line["prompt"] or f" {word}\n" in line["prompt"] for word in held)
    bodies = {line["completion"] for line in lines(folder, "write_function", "heldout")}
    trained = [line["prompt"] for line in lines(folder, "describe_function", "train")]
    assert bodies
    assert not any(body in prompt for body in bodies for prompt in trained)
    ends = {line["completion"] for line in lines(folder, "continue_verse", "heldout")}
    assert len(ends) == 1  # all verses end alike here: the halves' beginnings tell them apart
    begun = {word for line in lines(folder, "continue_verse", "heldout") for word in line["prompt"].split()}
    held_numbers = {word for word in begun if word.isdigit()}
    for line in lines(folder, "find_book", "train"):
        assert not held_numbers & set(line["prompt"].split())


def test_functions_are_cut_at_their_docstring(folder):
    both = lines(folder, "write_function", "train") + lines(folder, "write_function", "heldout")
    by_prompt = {line["prompt"]: line["completion"] for line in both}
    (prompt,) = (prompt for prompt in by_prompt if "add_017(" in prompt)
    assert 'def add_017(a, b):\n    """Add 017 numbers.\n\n    More about it.\n    """\n' in prompt
    assert by_prompt[prompt] == '    total = "017"\n    return a + b + total'
    (prompt,) = (prompt for prompt in by_prompt if "get_017(" in prompt)
    assert 'def get_017(self):\n    "Get it."' in prompt  # a method is moved to the margin
    summaries = lines(folder, "describe_function", "train") + lines(folder, "describe_function", "heldout")
    (line,) = (line for line in summaries if "add_017(" in line["prompt"])
    assert line["completion"] == "Add 017 numbers."
    assert 'def add_017(a, b):\n    total = "017"\n    return a + b + total' in line["prompt"]
    assert "More about it" not in line["prompt"]


def test_lines_with_choices_have_the_right_one_among_four(folder):
    places = set()
    for line in lines(folder, "find_word", "train"):
        assert len(set(line["choices"])) == 4
        assert line["choices"][line["answer"]] == line["completion"]
        places.add(line["answer"])
    assert places == {0, 1, 2, 3}
    assert (
        len({line["prompt"].replace(line["completion"], "") for line in lines(folder, "define", "train")}) > 3
    )


def test_training_and_evaluation_read_the_lines(folder):
    files = sorted(map(str, folder.glob("*.train.jsonl")))
    data = load_train_data(DataRecipe(train=tuple(files), max_length=4000), byte_tokenizer(), 0)
    assert data.summary["samples"] == sum(len(lines(folder, task, "train")) for task in instructions.TASKS)
    kinds = {
        task: {example.kind for example in read_examples(folder / f"{task}.heldout.jsonl", byte_tokenizer())}
        for task in instructions.TASKS
    }
    assert kinds["find_word"] == kinds["find_book"] == {"choice"}
    assert kinds["define"] == kinds["write_function"] == {"completion"}


def test_the_seed_draws_lines_but_not_what_is_held_out(sources, tmp_path, capsys):
    for seed in ("0", "1"):
        words = ["instructions", str(tmp_path / seed), "--task", "define", "--samples", "20", "--seed", seed]
        assert main(words) == 0
    assert "20" in capsys.readouterr().out
    first, second = (lines(tmp_path / seed, "define", "train") for seed in ("0", "1"))
    assert len(first) == len(second) == 20
    assert first != second
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == [
        "define.heldout.jsonl",
        "define.train.jsonl",
        "instructions.json",
    ]
    held = [
        {line["completion"] for line in lines(tmp_path / seed, "define", "heldout")} for seed in ("0", "1")
    ]
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "sing"], "--task must be one of define, find_word, describe_function, write_function"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--heldout", "0"], "--heldout must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(words, sentence, tmp_path, capsys):
    assert main(["instructions", str(tmp_path / "new"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("mine")
    assert main(["instructions", str(tmp_path)]) == 2
    assert f"FOLDER must be new or empty, and {tmp_path} is not" in capsys.readouterr().err
