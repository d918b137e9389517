"""The demonstration end to end, on a tiny checkpoint and small texts."""

import io
import json
from dataclasses import replace

import pytest
import torch
from byte_tokenizer import END, VOCAB_SIZE, byte_tokenizer
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from moe_runtime.cli import main
from moe_runtime.demo.run import run_demo
from moe_runtime.demo.settings import DemoSettings
from moe_runtime.demo.text import Domain
from moe_runtime.demo.train import TrainSettings

TRAINING = TrainSettings(learning_rates=(("", 1e-2),), rows_per_step=2)
SETTINGS = DemoSettings(
    row_length=32,
    specialist_rows=16,
    tune_rows=8,
    heldout_rows=4,
    specialist=TRAINING,
    dense=TRAINING,
    mixture=TRAINING,
    new_tokens=4,
    latency_prompt=8,
    latency_new_tokens=2,
    latency_repeats=1,
)
MODELS = [
    "dense",
    "specialist-numbers",
    "specialist-letters",
    "average",
    "dense-tuned",
    "copy",
    "copy-tuned",
    "btx-untuned",
    "btx",
    "bam-untuned",
    "bam",
]


def domain(name, pieces):
    documents = tuple("\n".join(pieces[n : n + 8]) for n in range(0, len(pieces), 8))
    return Domain(name=name, title=name, origin="this test", licence="none", documents=documents)


DOMAINS = [
    domain("numbers", [f"{n} plus {n} is {2 * n}" for n in range(400)]),
    domain("letters", [chr(97 + n % 26) * (3 + n % 7) + " " + chr(97 + n % 23) * 4 for n in range(600)]),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=END,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def demo(source, folder, settings=SETTINGS, **options):
    """The report, and the lines that a person without a terminal reads."""
    lines = io.StringIO()
    console = Console(file=lines, width=200, force_terminal=False)
    report = run_demo(
        folder, checkpoint=source, domains=DOMAINS, settings=settings, console=console, **options
    )
    return report, lines.getvalue()


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, *demo(source, folder)


def test_report_holds_every_model_and_every_figure(finished):
    folder, report, _ = finished
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    assert list(report["models"]) == MODELS
    for entry in report["models"].values():
        assert set(entry["perplexity"]) == {"numbers", "letters"}
        assert entry["mean_perplexity"] == pytest.approx(sum(entry["perplexity"].values()) / 2)
    assert set(report["cost"]) == {"dense", "copy", "btx", "bam"}
    assert set(report["latency"]) == {"dense", "btx", "bam"}
    assert set(report["continuations"]) == {"numbers", "letters"}
    assert report["copy_check"]["passed"]
    assert report["machine"]["versions"]["python"]


def test_token_counts_name_the_same_tokens_for_baseline_and_mixtures(finished):
    _, report, _ = finished
    seen = {name: entry["tokens_seen"] for name, entry in report["models"].items()}
    specialist, tuning = 16 * 32, 2 * 8 * 32
    assert seen["dense"] == seen["copy"] == 0
    assert seen["copy-tuned"] == tuning
    assert seen["specialist-numbers"] == specialist
    assert seen["average"] == seen["btx-untuned"] == 2 * specialist
    assert seen["dense-tuned"] == seen["btx"] == seen["bam"] == 2 * specialist + tuning
    assert report["models"]["dense-tuned"]["training"]["tokens"] == seen["dense-tuned"]
    assert report["models"]["btx"]["training"]["tokens"] == tuning


def test_training_lowers_the_perplexity_of_what_was_trained_on(finished):
    _, report, _ = finished
    models = report["models"]
    for name in ("numbers", "letters"):
        assert models[f"specialist-{name}"]["perplexity"][name] < 0.9 * models["dense"]["perplexity"][name]
    # the copies have seen the tuning text only, a third of what the others learned from
    assert models["copy-tuned"]["mean_perplexity"] < 0.6 * models["dense"]["mean_perplexity"]
    for name in ("dense-tuned", "btx", "bam"):
        assert models[name]["mean_perplexity"] < 0.5 * models["dense"]["mean_perplexity"]


def test_copy_has_the_perplexity_of_the_dense_source(finished):
    _, report, _ = finished
    models = report["models"]
    # bfloat16 products are summed in another order by the experts
    assert models["copy"]["mean_perplexity"] == pytest.approx(models["dense"]["mean_perplexity"], rel=5e-3)


def test_conclusions_follow_from_the_numbers(finished):
    _, report, _ = finished
    text = " ".join(report["conclusions"])
    for mixture in ("btx", "bam"):
        mean = report["models"][mixture]["mean_perplexity"]
        assert f"{mixture.upper()}" in text
        assert f"{mean:.2f}" in text
        for other, comparison in report["comparisons"][mixture].items():
            assert comparison["ratio"] == pytest.approx(mean / report["models"][other]["mean_perplexity"])
            assert comparison["error"] > 0


def test_files_are_those_that_the_documentation_names(finished):
    folder, report, _ = finished
    for name in MODELS:
        if name not in ("dense", "average"):
            assert (folder / "models" / name / "model.safetensors").is_file()
            assert (folder / "models" / name / "tokenizer.json").is_file()
    assert sorted(file.name for file in (folder / "recipes").iterdir()) == [
        "bam-untuned.yaml",
        "btx-untuned.yaml",
        "copy.yaml",
    ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "src=" not in page
    for entry in report["models"].values():
        assert entry["title"] in page


def test_a_person_sees_every_stage_and_the_table(finished):
    folder, _, lines = finished
    for title in ("train the specialist for numbers", "upcycle: bam-untuned", "tune btx", "evaluate average"):
        assert f") {title}: " in lines
    assert "left" in lines
    assert "Held-out perplexity" in lines
    assert str(folder / "report.html") in lines


def test_a_second_run_takes_over_every_stage(finished, source):
    folder, report, _ = finished
    again, lines = demo(source, folder)
    assert lines.count("done before") == len(report["stages"])
    assert not any(stage["ran_now"] for stage in again["stages"].values())
    assert again["models"] == report["models"]
    assert again["seconds"] == report["seconds"]


def test_only_what_depends_on_a_change_is_done_again(finished, source):
    folder, report, _ = finished
    longer = replace(SETTINGS, mixture=replace(TRAINING, warmup_steps=1))
    changed, _ = demo(source, folder, longer)
    ran = {name for name, stage in changed["stages"].items() if stage["ran_now"]}
    mixtures = ("copy-tuned", "btx", "bam")
    expected = {f"{stage}-{mixture}" for stage in ("train", "evaluate") for mixture in mixtures}
    assert ran == expected | {"cost", "latency", "continuations"}
    restored, _ = demo(source, folder)
    assert restored["models"]["btx"]["perplexity"] == report["models"]["btx"]["perplexity"]


def test_a_lost_model_is_made_again_and_the_rest_is_kept(finished, source):
    folder, report, _ = finished
    (folder / "models" / "copy" / "model.safetensors").unlink()
    (folder / "models" / "copy").rename(folder / "lost")
    again, _ = demo(source, folder)
    assert again["stages"]["upcycle-copy"]["ran_now"]
    assert not again["stages"]["train-btx"]["ran_now"]
    assert again["models"]["copy"]["perplexity"] == report["models"]["copy"]["perplexity"]


def test_an_interrupted_stage_leaves_no_result(source, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_runtime.demo.pipeline.upcycle", stop)
    with pytest.raises(KeyboardInterrupt):
        demo(source, tmp_path)
    kept = sorted(file.name for file in (tmp_path / "stages").iterdir())
    assert kept == [
        "source.json",
        "train-dense-tuned.json",
        "train-specialist-letters.json",
        "train-specialist-numbers.json",
    ]
    assert not (tmp_path / "report.json").exists()


# --- what a user can get wrong ---


def test_a_text_that_is_empty_or_not_utf8_is_told_in_one_sentence(tmp_path, capsys, source):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes("Straße".encode("latin-1"))
    for argument, sentence in {
        f"mine={empty}": f"moe-runtime: --text mine: {empty} must hold text, and is empty",
        f"mine={latin}": f"moe-runtime: --text mine: {latin} must be UTF-8 text, and is not at byte 4",
        f"mine={tmp_path / 'gone'}": f"moe-runtime: --text mine: there is no file {tmp_path / 'gone'}",
        "mine": "moe-runtime: --text must be NAME=PATH with a name of small letters, digits, - and _, "
        "got 'mine'",
    }.items():
        command = ["demo", "--text", argument, "--output", str(tmp_path / "out"), "--checkpoint", str(source)]
        assert main(command) == 2
        assert capsys.readouterr().err.strip() == sentence
    assert not (tmp_path / "out").exists()


def test_a_text_of_ones_own_that_is_too_short_is_told(tmp_path, source):
    short = tmp_path / "short.txt"
    short.write_text("a few words only")
    with pytest.raises(ValueError, match=r"the text 'mine' .* must give 28 rows of 32 tokens"):
        demo(source, tmp_path / "out", texts=[f"mine={short}"])


def test_two_texts_of_one_name_are_refused(tmp_path, source):
    own = tmp_path / "own.txt"
    own.write_text("word " * 5000)
    with pytest.raises(ValueError, match="two texts have this name"):
        demo(source, tmp_path / "out", texts=[f"numbers={own}"])
