"""Perplexities and tasks equal loops by hand, and what cannot be used is named."""

import json
import math
from pathlib import Path

import pytest
import torch
from byte_tokenizer import END, VOCAB_SIZE, byte_tokenizer
from moe_families import tiny_family
from tiny_models import MOE, tiny_model

from moe_runtime.cli import main
from moe_runtime.evaluation import run, scoring
from moe_runtime.evaluation.run import evaluate_model
from moe_runtime.evaluation.tasks import read_examples

TEXT = "Déjà vu: " + "the quick brown fox jumps over the lazy dog. " * 9
CHOICES = [
    {"prompt": "1 + 1 =", "choices": [" 2", " three hundred", " 4"], "answer": 0},
    {"prompt": "A longer question, so that rows are padded:", "choices": ["a", "bc"], "answer": 1},
    {"prompt": "?", "choices": [" no", " yes", " or", " and"], "answer": 3, "completion": " and"},
]
COMPLETIONS = [{"prompt": "p" * n, "completion": "c" * (n % 3 + 1), "task": "say"} for n in range(1, 9)]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def file(tmp_path):
    def write(content, name="task.jsonl"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
        return str(path)

    return write


def model_of(family):
    options = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64}
    return tiny_model(MOE, **options) if family == "moe_runtime" else tiny_family(family, **options)


@torch.no_grad()
def log_p(model, ids, start):
    """log p of each token from `start` on, one by one, from a sequence alone."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logits[i - 1, ids[i]].item() for i in range(start, len(ids))]


def ids_of(text):
    return byte_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("family", ["moe_runtime", "mixtral"])
def test_perplexity_equals_a_loop_by_hand(family, tokenizer, file, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 3 * 64 * VOCAB_SIZE)
    model = model_of(family)
    (figures,) = evaluate_model(model, tokenizer, {"a": file(TEXT, "a.txt")}, [])["texts"].values()
    ids = ids_of(TEXT)
    rows = [ids[start : start + 64] for start in range(0, len(ids), 64)]
    assert len(rows) == 7
    values = [value for row in rows for value in log_p(model, row, 1)]
    nats = -sum(values) / len(values)
    assert figures["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert figures["tokens"] == figures["bytes"] == len(TEXT.encode()) == len(ids)  # a token is a byte
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5)


def test_a_text_is_read_to_its_limit(tokenizer, file):
    model = model_of("moe_runtime")
    figures = evaluate_model(model, tokenizer, {"a": file(TEXT, "a.txt")}, [], max_tokens=30)["texts"]["a"]
    alone = evaluate_model(model, tokenizer, {"a": file(TEXT.encode()[:30].decode(), "b.txt")}, [])
    assert figures == alone["texts"]["a"]
    assert figures["bytes"] == 30


def test_choices_equal_a_loop_by_hand(tokenizer, file):
    model = model_of("moe_runtime")
    (figures,) = evaluate_model(model, tokenizer, {}, [file(CHOICES)])["tasks"].values()
    right = right_per_byte = 0
    for line in CHOICES:
        prompt = ids_of(line["prompt"])
        sums = [sum(log_p(model, prompt + ids_of(text), len(prompt))) for text in line["choices"]]
        per_byte = [value / len(text) for value, text in zip(sums, line["choices"], strict=True)]
        right += sums.index(max(sums)) == line["answer"]
        right_per_byte += per_byte.index(max(per_byte)) == line["answer"]
    assert figures == {
        "kind": "choice",
        "examples": 3,
        "accuracy": right / 3,
        "accuracy_per_byte": right_per_byte / 3,
        "chance": pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3),
    }


def test_longer_choices_are_not_at_a_disadvantage_per_byte(tokenizer, file, monkeypatch):
    """-4 for two bytes is less than -3 for one, and more per byte."""
    line = {"prompt": "p", "choices": ["a", "bb"], "answer": 1}
    made = [scoring.Score(-3.0, 1, 0), scoring.Score(-4.0, 2, 0)]
    monkeypatch.setattr(run, "score_endings", lambda *_: [made])
    figures = evaluate_model(model_of("moe_runtime"), tokenizer, {}, [file([line])])["tasks"]["task"]
    assert (figures["accuracy"], figures["accuracy_per_byte"]) == (0.0, 1.0)


def test_completions_equal_a_loop_by_hand(tokenizer, file):
    model = model_of("moe_runtime")
    figures = evaluate_model(model, tokenizer, {}, [file(COMPLETIONS)])["tasks"]["say"]
    values, right = [], 0
    for line in COMPLETIONS:
        prompt, completion = ids_of(line["prompt"]), [*ids_of(line["completion"]), END]
        values += log_p(model, prompt + completion, len(prompt))
        with torch.no_grad():
            best = model(input_ids=torch.tensor([prompt + completion])).logits[0].argmax(-1).tolist()
        right += sum(a == b for a, b in zip(best[len(prompt) - 1 :], completion, strict=False))
    nats = -sum(values) / len(values)
    assert figures["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert figures["tokens"] == len(values) == sum(len(line["completion"]) + 1 for line in COMPLETIONS)
    assert figures["token_accuracy"] == right / len(values)
    size = sum(len(line["completion"]) for line in COMPLETIONS)
    assert figures["bits_per_byte"] == pytest.approx(nats * len(values) / size / math.log(2), rel=1e-5)


def test_a_batch_says_what_each_prompt_alone_leads_to(tokenizer, file):
    model = model_of("moe_runtime")
    lines = [{"prompt": prompt, "answer": "abc"} for prompt in ("a", "some longer prompt", "xyz")]
    said = run._say(model, tokenizer, list(read_examples(Path(file(lines)), tokenizer)))
    for line, text in zip(lines, said, strict=True):
        ids = torch.tensor([ids_of(line["prompt"])])
        alone = model.generate(ids, max_new_tokens=3 + 8, do_sample=False, eos_token_id=END, pad_token_id=END)
        assert text == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_said_within_the_models_positions(tokenizer, file, monkeypatch):
    """A long prompt with a short answer is not in a batch with a long answer; each may use all positions."""
    lengths = [(10, 40), (55, 2), (58, 1)]
    lines = [{"prompt": "p" * prompt, "answer": "a" * answer} for prompt, answer in lengths]
    model, made = model_of("moe_runtime"), []
    generate = model.generate

    def seen(**options):
        made.append((*options["input_ids"].shape, options["max_new_tokens"]))
        return generate(**options)

    monkeypatch.setattr(model, "generate", seen)
    evaluate_model(model, tokenizer, {}, [file(lines)])
    assert made == [(1, 10, 48), (2, 58, 6)]


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        (" Paris \n\nand more", "Paris", 1.0),
        ("\nParis", "Paris", 1.0),
        ("Paris, France", "Paris", 0.0),
        ("paris", "Paris", 0.0),
        ("Rome", ["Paris", "Rome"], 1.0),
        ("a\nb", "a\nb\n", 1.0),
        ("a\nb\nc", "a\nb", 0.0),
    ],
)
def test_exact_answers(said, answer, right, tokenizer, file, monkeypatch):
    monkeypatch.setattr(run, "_say", lambda *_: [said])
    figures = evaluate_model(
        model_of("moe_runtime"), tokenizer, {}, [file([{"prompt": "p", "answer": answer}])]
    )
    assert figures["tasks"] == {"task": {"kind": "exact", "examples": 1, "exact_match": right}}


def test_a_model_in_training_is_left_in_it(tokenizer, file):
    model = model_of("moe_runtime").train()
    state = torch.get_rng_state()
    evaluate_model(model, tokenizer, {"a": file(TEXT, "a.txt")}, [file(CHOICES)])
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "task.jsonl must have a line, and is empty"),
        ("{", "task.jsonl, line 1: must be one JSON object"),
        ([{"prompt": "p"}], "line 1: must have 'choices' and 'answer', 'answer', or 'completion'"),
        ([{"prompt": "", "completion": "c"}], "line 1: 'prompt' must have a token, got an empty text"),
        ([{"completion": "c"}], "line 1: must have 'prompt', a text, or 'messages' with 'role' and"),
        ([{"messages": [{"role": "user", "content": "a"}], "answer": "c"}], "need a chat template"),
        ([{"prompt": "\ud800", "answer": "c"}], r"line 1: must be text that UTF-8 can hold, .* '\\ud800'"),
        (
            [{"prompt": "p", "choices": ["a"], "answer": 0}],
            r"'choices' must be two or more texts, .* \['a'\]",
        ),
        ([{"prompt": "p", "choices": ["a", "b"], "answer": 2}], "place of the right choice, 0 to 1, got 2"),
        (
            [{"prompt": "p", "answer": []}],
            r"'answer' must be a text or a list of texts, none empty, got \[\]",
        ),
        ([{"prompt": "p", "completion": "c", "task": 3}], "'task' must be a text, got 3"),
        (
            [{"prompt": "p" * 64, "completion": "c"}],
            r"line 1: has 66 tokens, more than the model takes \(64\)",
        ),
        (
            [{"prompt": "p", "answer": "a"}, {"prompt": "p" * 60, "answer": ["a", "bcde"]}],
            r"line 2: has 65 tokens, more than the model takes \(64\)",
        ),
        (
            [{"prompt": "p", "completion": "c"}, {"prompt": "p", "answer": "c"}],
            r"line 2: must ask as the other lines of task 'task' do \(completion\), got exact",
        ),
    ],
)
def test_tasks_that_cannot_be_used(lines, sentence, tokenizer, file):
    with pytest.raises(ValueError, match=sentence):
        evaluate_model(model_of("moe_runtime"), tokenizer, {}, [file(lines)])


def test_texts_that_cannot_be_used(tokenizer, file, tmp_path, monkeypatch):
    model = model_of("moe_runtime")
    with pytest.raises(ValueError, match=r"a\.txt must give at least 2 tokens, got 1"):
        evaluate_model(model, tokenizer, {"a": file("x", "a.txt")}, [])
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"b.txt must be UTF-8 text, and is not"):
        evaluate_model(model, tokenizer, {"a": str(tmp_path / "b.txt")}, [])
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="--text needs a fast tokenizer, which tells where tokens end, and"):
        evaluate_model(model, tokenizer, {"a": file(TEXT, "a.txt")}, [])


# --- the command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model(MOE, vocab_size=VOCAB_SIZE, max_position_embeddings=64).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def test_the_command_prints_tables_and_json(folder, file, capsys):
    words = ["eval", folder, "--text", f"fox={file(TEXT, 'a.txt')}", "--task", file(CHOICES)]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["texts"]["fox"]["tokens"] == len(TEXT.encode())
    assert report["tasks"]["task"]["examples"] == 3
    assert report["machine"]["versions"]["torch"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "Texts: " in table
    assert "bits per byte" in table
    assert "accuracy per byte" in table
    assert "exact match" not in table


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--text or --task must be given, got neither"),
        (["--text", "nowhere.txt"], "--text: there is no file nowhere.txt"),
        (["--task", "nowhere.jsonl"], "--task: there is no file nowhere.jsonl"),
        (["--text", __file__, "--max-tokens", "1"], "--max-tokens must be at least 2, got 1"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(words, sentence, folder, capsys):
    assert main(["eval", folder, *words]) == 2
    assert sentence in capsys.readouterr().err
