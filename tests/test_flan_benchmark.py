"""The report of a comparison among the results: its file, its section of the page and its picture."""

import json
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks.plots import draw
from benchmarks.report import BEGIN, END, render_pages
from moe_runtime.flan.report import SETUPS, _means

MACHINE = {
    "device": "AMD EPYC",
    "kind": "cpu",
    "cores": 2,
    "threads": 2,
    "versions": {"torch": "2"},
    "commit": "a" * 40,
    "dirty": False,
    "time": "2026-01-02T09:00:00+00:00",
}


def rows():
    scores = {"untuned": 0.25, "task": 0.5, "instructions": 0.3, "instructions-task": 0.6}
    return [
        {
            "model": model,
            "setup": setup,
            "shots": shots,
            "task": task,
            "training_flops": 10**12 * list(SETUPS).index(setup),
            "inference_flops_per_token": 2 * 10**8,
            "examples": 100,
            "score": scores[setup] + (0.1 if model == "mixture" else 0) + (0.2 if task == "b" else 0),
        }
        for model in ("mixture", "dense")
        for setup in SETUPS
        for shots in ((0, 2) if setup in ("untuned", "instructions") else (0,))
        for task in ("a", "b")
    ]


@pytest.fixture
def report(tmp_path):
    """A report.json as `moe-runtime flan` writes it."""
    tuning = {"steps": 24, "batch_size": 8, "accumulate": 2}
    models = {
        name: {
            "folder": f"runs/{name}",
            "training_flops_per_token": flops,
            "inference_flops_per_token": flops,
            "instruction_steps": steps,
            "losses": [2.0, 1.0],
        }
        for name, flops, steps in (("mixture", 110, 24), ("dense", 100, 26))
    }
    content = {
        "machine": MACHINE,
        "recipe": {
            "instructions": ["tasks/define.train.jsonl"],
            "instruction_tuning": tuning,
            "task_tuning": tuning | {"steps": 12},
            "measure_precision": "bfloat16",
            "seed": 0,
        },
        "models": models,
        "matched": ["training_flops"],
        "rows": rows(),
        "means": _means(rows()),
        "seconds": 1200.0,
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    return path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "flan", *map(str, words)])
    return command.main()


def test_a_report_becomes_a_result_file_and_a_section(report, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    results = tmp_path / "benchmarks" / "results"
    assert run(monkeypatch, report, "--output", results) == 0
    path = results / "cpu-amd-epyc-2-cores" / "2026-01-02_aaaaaaa_flan.json"
    content = json.loads(path.read_text())
    assert content == {"suite": "flan", **json.loads(report.read_text())}
    pages = render_pages(tmp_path)
    page = pages[tmp_path / "docs" / "performance.md"]
    assert "## Instruction tuning of a mixture and its dense twin" in page
    assert "measured with 100 questions of a and 100 questions of b" in page
    assert "Instructions (define): 24 steps of 16 rows; a task: 12 steps of 16." in page
    assert "(26 for the instructions)" in page
    assert "| task tuning only | 0 | mixture | 0.600 | 0.800 | 0.700 | 1e+12 | 2e+08 |" in page
    assert "- Not tuned, 2 worked examples: mean score 0.450 of the mixture, 0.350 of the dense twin" in page
    assert "The standard error of a share of 100 questions is up to 0.050." in page
    assert "commit aaaaaaa; `benchmarks/results/cpu-amd-epyc-2-cores/2026-01-02_aaaaaaa_flan.json`." in page
    assert "![Mean score over training FLOPs" in page
    assert pages[tmp_path / "docs" / "plots" / "flan.svg"].count("<svg") == 1
    assert draw({"flan": content}) == draw({"flan": content})


def test_another_file_is_refused(report, tmp_path, monkeypatch):
    content = json.loads(report.read_text())
    del content["means"]
    report.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"report\.json must be a report\.json of moe-runtime flan, .* 'means'"
    ):
        run(monkeypatch, report, "--output", tmp_path / "results")
    assert not (tmp_path / "results").exists()
