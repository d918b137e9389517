"""The benchmark of whole upcycling runs: all is measured and shown, whoever is not there is named."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import upcycling


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upcycling")
    words = ["upcycling", "--tiny", "--folder", str(folder), "--output", str(folder / "results")]
    with pytest.MonkeyPatch.context() as patched:
        # an environment without the program
        patched.setattr(sys, "argv", ["benchmarks", *words, "--mergekit-python", sys.executable])
        patched.setattr(upcycling, "version", lambda python, package: "0")
        assert command.main() == 0
    (path,) = (folder / "results").rglob("*_upcycling.json")
    assert [entry.name for entry in folder.iterdir()] == ["results"]
    return path, json.loads(path.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_runs_are_measured_beside_a_copy_of_what_they_write(result):
    _, content = result
    assert content["machine"]["commit"]
    for row in content["rows"]:
        ours, copy = row["written_bytes"]["moe_runtime"], row["written_bytes"]["plain_copy"]
        assert ours == copy > 5e6
        for name, timing in row["timings"].items():
            assert 0 < timing["q1_s"] <= timing["median_s"] <= timing["q3_s"]
            assert row["peak_bytes"][name] >= row["imported_bytes"][name] > 5e6
        assert row["peak_bytes"]["moe_runtime"] <= row["bound_bytes"]
        ratio = row["timings"]["moe_runtime"]["median_s"] / row["timings"]["plain_copy"]["median_s"]
        assert row["over_plain_copy"]["moe_runtime"] == pytest.approx(ratio)
    first, second = (row["not_timed"] for row in content["rows"])
    assert "No module named 'mergekit'" in first["mergekit"]
    assert second == {"mixturekit": "no --mixturekit-python"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_result_is_a_section_of_the_page(result):
    path, content = result
    text = "\n".join(upcycling.section(content, path, path.parents[2]))
    assert "## Upcycling" in text
    assert "| copy of one model | moe_runtime |" in text
    assert "must stay below 302 MB here" in text
    assert "- mixturekit: no --mixturekit-python" in text


def test_a_disk_without_room_is_named(tmp_path):
    with pytest.raises(
        SystemExit, match=rf"{tmp_path} must have room for two outputs and 5 GB more, 20\d+ GB, and"
    ):
        upcycling.check_room(Path(tmp_path), 10**15)
