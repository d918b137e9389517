"""The command as its users meet it: exit codes, one sentence for a mistake, tables in a pipe, JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import END, VOCAB_SIZE, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moe_runtime import cli, flops_report
from moe_runtime.flops import model_parameters
from moe_runtime.shapes import SHAPES, named_shape

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "flops", "generate", "profile", "upcycle", "verify")


@pytest.fixture
def run(capsys):
    """`run("flops", …)` -> (exit code, stdout, stderr), in this process."""

    def run(*words):
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def one_sentence(text):
    return text.startswith("moe-runtime: ") and text.count("\n") == 1 and text.endswith("\n")


# --- help ---


def test_help_lists_every_command():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)


def test_no_arguments_show_the_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "Usage: moe-runtime" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0
    assert f"Example: moe-runtime {name} " in " ".join(result.output.split())


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip()[0].isdigit()


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from moe_runtime.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = result.stderr.split()
    assert "typer" in loaded
    assert {"torch", "transformers", "matplotlib"}.isdisjoint(loaded)


# --- exit codes and errors ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("nope", "No such command 'nope'. See --help."),
        ("flops", "Missing argument 'config'. See --help."),
        ("flops mixtral", "no shape is named 'mixtral'; did you mean 'mixtral-8x7b'?"),
        ("flops no/such.json", "CONFIG: there is no file no/such.json"),
        ("flops bam-small --convention no", "convention must be one of full, causal, half, got 'no'"),
        ("flops bam-small --context x", "Invalid value for '--context': "),
        ("flops bam-small --context 0", "context must be at least 1, got 0"),
        ("flops bam-small --batch-size 0", "batch_size must be at least 1, got 0"),
        ("generate no/such --prompt x", "no/such must be a checkpoint folder, and there is no such folder"),
        ("upcycle no/such.yaml", "no/such.yaml"),
        ("demo --text law=no/such.txt", "no/such.txt"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(run, monkeypatch, tmp_path, words, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert one_sentence(err)
    assert sentence in err


def test_debug_shows_the_traceback_wherever_it_stands():
    for words in (["--debug", "flops", "mixtral"], ["flops", "mixtral", "--debug"]):
        with pytest.raises(ValueError, match="no shape is named"):
            cli.main(words)


def test_a_fault_of_ours_exits_with_1_and_says_how_to_see_more(run, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("in\ntwo lines")

    monkeypatch.setattr(flops_report, "flops_report", fail)
    code, out, err = run("flops", "bam-small")
    assert (code, out) == (1, "")
    assert err == "moe-runtime: ZeroDivisionError: in two lines (run again with --debug for the traceback)\n"


def test_an_interrupt_exits_with_130(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(flops_report, "flops_report", interrupt)
    code, _, err = run("flops", "bam-small")
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "code"), [("flops bam-small", 0), ("flops nope", 2), ("flops bam-small --nope", 2)]
)
def test_the_console_script(words, code):
    script = "import sys; from moe_runtime.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *words.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code
    assert one_sentence(result.stderr) if code else not result.stderr


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "moe_runtime", "flops", "nope"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("moe-runtime: no shape is named 'nope'")


# --- flops ---


@pytest.mark.parametrize("name", SHAPES)
def test_flops_json_of_named_shapes(run, name):
    code, out, _ = run("flops", name, "--json", "--context", "256", "--convention", "half")
    report = json.loads(out)
    assert code == 0
    assert (report["config"], report["context"], report["convention"]) == (name, 256, "half")
    assert report["model"]["total_parameters"] == sum(report["parameters_by_component"].values())
    assert report["model"]["total_parameters"] == model_parameters(named_shape(name)).total()
    assert report["model"]["forward_flops"] == sum(report["forward_flops_by_component"].values())
    assert bool(report["dense"]) == (not name.endswith("-dense"))


def test_flops_of_a_bam_layer_as_in_the_paper(run):
    _, out, _ = run("flops", "bam-small-shared-kv", "--json", "--context", "256", "--convention", "half")
    (layers,) = json.loads(out)["layers"]
    flops = layers["forward_flops_by_component"]
    assert (layers["first"], layers["last"]) == (0, 5)
    assert flops["attention"] + flops["attention_scores"] == 23_068_672


@pytest.mark.parametrize(
    "words", [[], ["--batch-size", "64", "--context", "99999", "--bytes-per-value", "4"]]
)
@pytest.mark.parametrize("name", SHAPES)
def test_tables_keep_every_digit_in_a_pipe(run, name, words):
    _, out, _ = run("flops", name, *words)
    report = json.loads(run("flops", name, *words, "--json")[1])
    assert "…" not in out
    assert "\x1b" not in out
    for model in (report["model"], *report["dense"].values()):
        assert all(f"{figure:,}" in out for key, figure in model.items() if key != "residual")


def test_tables_fit_80_columns_of_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(flops_report, "WIDTH_WITHOUT_TERMINAL", 80)
    cli.main(["flops", "mixtral-8x7b"])
    out = capsys.readouterr().out
    assert "46,702,792,704" in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_layers_that_differ_are_listed_apart(run, tmp_path):
    config = named_shape("qwen1.5-moe-a2.7b").to_dict()
    config |= {"model_type": "moe_runtime", "num_hidden_layers": 6, "moe_layers": [2, 3]}
    config |= {"sliding_window": 128, "layer_types": ["full_attention"] * 5 + ["sliding_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layers = json.loads(run("flops", tmp_path, "--json")[1])["layers"]
    assert [(group["first"], group["last"]) for group in layers] == [(0, 1), (2, 3), (4, 4), (5, 5)]
    assert "experts 4 of 60 x 1408 + shared 5632" in layers[1]["block"]
    assert layers[3]["block"] == "sequential, 16 heads in a window of 128, dense 5632"


def test_flops_of_a_checkpoint_folder_and_of_its_config(run, checkpoint):
    folder = json.loads(run("flops", checkpoint, "--json")[1])
    file = json.loads(run("flops", checkpoint / "config.json", "--json")[1])
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    assert folder["model"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert folder | {"config": ""} == file | {"config": ""}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "config.json must be JSON: "),
        ("[]", "config.json must hold one JSON object, got list"),
        ('{"model_type": "gpt2"}', "config.json: model_type must be one of "),
        ('{"model_type": "llama"}', "config.json: "),
        (b"\xff\xfe", "config.json must be JSON: "),
    ],
)
def test_bad_config_files_are_named(run, tmp_path, content, sentence):
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = run("flops", tmp_path)
    assert code == 2
    assert one_sentence(err)
    assert f"{tmp_path}{os.sep}{sentence}" in err


# --- generate ---


def test_generate_streams_the_prompt_and_its_continuation(run, checkpoint):
    words = ("generate", checkpoint, "--prompt", "ab", "--max-new-tokens", 8)
    code, out, err = run(*words)
    values = json.loads(run(*words, "--json")[1])
    assert code == 0
    assert out == f"ab{values['text']}\n"
    assert "tokens, " in err.splitlines()[-1]
    assert values["prompt"] == "ab"
    assert values["new_tokens"] == 8 or values["stopped_by"] == "end_of_text"


def test_generate_draws_by_seed(run, checkpoint):
    def text(seed):
        words = ("--prompt", "ab", "--max-new-tokens", 20, "--temperature", 1.5, "--seed", seed)
        return json.loads(run("generate", checkpoint, *words, "--static-cache", "--json")[1])["text"]

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "prompt must hold at least one token, got ''"),
        (("--max-new-tokens", 1000), "must fit the model's 64 positions, got 1 and 1000"),
        (("--max-new-tokens", 0), "the number of new tokens must be at least 1, got 0"),
        (("--temperature", -1), "temperature must be at least 0, got -1.0"),
        (("--device", "tpu"), "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_generate_mistakes(run, checkpoint, words, sentence):
    code, out, err = run("generate", checkpoint, "--prompt", "x" if words else "", *words)
    assert code == 2
    assert out == ""
    assert one_sentence(err)
    assert sentence in err


def test_generate_names_truncated_weights(run, checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run("generate", tmp_path, "--prompt", "x")
    assert code == 2
    assert one_sentence(err)
    assert f"the weights in {tmp_path} cannot be read" in err


def test_generate_needs_a_tokenizer(run, checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    code, _, err = run("generate", tmp_path, "--prompt", "x")
    assert code == 2
    assert one_sentence(err)
    assert f"{tmp_path} must hold a tokenizer" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_generate_refuses_a_gpu_that_is_not_there(run, checkpoint):
    code, _, err = run("generate", checkpoint, "--prompt", "x", "--device", "cuda")
    assert code == 2
    assert "device must be cpu where there is no CUDA GPU, got 'cuda'" in err


# --- upcycle and verify ---


def test_upcycle_verify_generate_and_flops_in_turn(run, checkpoint, tmp_path):
    recipe, output = tmp_path / "copy.yaml", tmp_path / "moe"
    lines = {"method": "copy", "base": checkpoint, "output": output, "target": "moe_runtime", "experts": 4}
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))

    assert run("upcycle", recipe, "--dry-run")[0] == 0
    assert not output.exists()
    assert run("upcycle", recipe)[0] == 0
    code, out, _ = run("verify", output, "--json")
    assert code == 0
    assert json.loads(out)["max_abs_diff"] < 1e-4

    words = ("--prompt", "ab", "--max-new-tokens", 6, "--json")
    dense, moe = (json.loads(run("generate", folder, *words)[1])["text"] for folder in (checkpoint, output))
    assert dense == moe
    report = json.loads(run("flops", output, "--json")[1])
    assert report["dense"]["width"]["intermediate_size"] == 48

    code, _, err = run("upcycle", recipe)
    assert code == 2
    assert one_sentence(err)
    assert str(output) in err


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_where_glibc_allocates():
    """In a process of its own: an array made again is not made of fresh pages."""
    code = (
        "import resource, numpy; from moe_runtime.machine import keep_freed_memory;"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "make = lambda: [numpy.ones(1 << 21).sum() for _ in range(8)];"
        "make(); before = faults(); make(); without = faults() - before;"
        "kept = keep_freed_memory(); make(); before = faults(); make();"
        "print(kept, faults() - before, without)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults, without = result.stdout.split()
    if kept == "False":
        pytest.skip("another allocator")
    assert int(faults) < 4096, f"eight arrays of 4096 pages each, which take {without} faults by default"
