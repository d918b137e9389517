"""The benchmark of the experts' load: a short run by the recipe's defaults, and its log as a section."""

import json
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import expert_load


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert_load")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["benchmarks", "expert_load", "--tiny", "--output", str(folder)])
        assert command.main() == 0
    (path,) = folder.rglob("*_expert_load.json")
    return path, json.loads(path.read_text())


@pytest.mark.checkpoint
def test_the_figures_are_those_of_the_runs_log(result):
    _, content = result
    (row,) = content["rows"]
    assert [entry["step"] for entry in row["log"]] == [10, 20]
    assert row["recipe"]["moe"] == "defaults"
    assert row["recipe"]["train"]["precision"] == "bfloat16"
    assert 7_000 < row["tokens"] < 20 * 2 * 256
    last, cvs = row["log"][-1], row["load_cv_of_layers"]
    assert last["load_cv"] == pytest.approx(sum(cvs) / len(cvs))
    assert last["load_cv_worst"] == pytest.approx(max(cvs))
    assert last["load_highest"] == pytest.approx(4 * max(map(max, row["load_of_experts"])))
    assert last["load_lowest"] <= 1 <= last["load_highest"]


@pytest.mark.checkpoint
def test_the_section_says_whether_the_bars_hold(result):
    path, content = result
    (row,) = content["rows"]
    text = "\n".join(expert_load.section(content, path, path.parents[1]))
    assert "tiny as a mixture of 4 copies of its feed-forward, 2 per token" in text
    assert f"| 20 | {row['log'][-1]['load_cv']:.3f} | {row['log'][-1]['load_cv_worst']:.3f} |" in text
    assert "Most dead experts in any entry: 0." in text
    assert "below 0.5: yes on average, yes in the worst layer, in 2 of 2 layers." in text
    row["log"][0]["dead_experts"] = 3
    row["log"][-1]["load_cv_worst"] = 0.5
    text = "\n".join(expert_load.section(content, path, path.parents[1]))
    assert "Most dead experts in any entry: 3." in text
    assert "below 0.5: yes on average, no in the worst layer, " in text
