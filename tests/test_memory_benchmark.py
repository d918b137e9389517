"""The benchmark of memory: a run is measured, and the result is a section of the page."""

import json
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import memory


@pytest.mark.checkpoint
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_run_is_measured_beside_its_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CASES", {"mixture": memory.CASES["mixture"]})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "memory", "--tiny", "--output", str(tmp_path)])
    assert command.main() == 0
    (path,) = tmp_path.rglob("*_memory.json")
    content = json.loads(path.read_text())
    (row,) = content["rows"]
    assert row["case"]["name"] == "mixture"
    assert row["plan"]["tokens"] == 512
    assert row["measured_bytes"] > row["plan"]["weights"] + row["plan"]["optimizer"]
    more, less = (row | {"measured_bytes": round(times * row["plan"]["peak"])} for times in (1.2, 0.95))
    content["rows"] = [more, less]
    text = "\n".join(memory.section(content, path, tmp_path))
    assert "tiny, dense and as a mixture of 4 copies of its feed-forward, 2 per token" in text
    assert "| mixture | 1.6 M | 1.6 M | 0.0" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines() if "| mixture" in line] == [
        "1.20",
        "0.95",
    ]
    assert "Within a tenth: 1 of 2." in text


@pytest.mark.parametrize(("peak", "status"), [(1090, 0), (1110, 1), (910, 0), (890, 1)])
def test_the_exit_status_of_one_recipe_says_whether_its_plan_holds(
    tmp_path, monkeypatch, capsys, peak, status
):
    monkeypatch.setattr(memory, "compare", lambda recipe: ({"peak": 1000}, peak))
    monkeypatch.setattr(memory, "load_recipe", lambda path: path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "memory", str(tmp_path / "recipe.yaml")])
    assert command.main() == status
    assert capsys.readouterr().out == (
        f"recipe.yaml: planned 0.000 GB, measured 0.000 GB, {peak / 1000:.3f} of it\n"
    )
