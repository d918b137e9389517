"""The benchmark suites run, agree on their answers and write what a reader needs; the timer is fair."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.alternate import Timing, time_alternately
from benchmarks.report import newest_results, render_pages

ROOT = Path(__file__).resolve().parent.parent


def test_suites_run_and_write_results(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "--tiny", "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    files = {path.stem.split("_", 2)[2]: json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")}
    assert set(files) == {"attention_mixture", "linear", "moe_layer"}
    for suite, content in files.items():
        assert content["suite"] == suite
        assert content["machine"]["versions"]["torch"]
        for row in content["rows"]:
            assert all(timing["median_s"] > 0 for timing in row["timings"].values())
            assert all(flops > 0 for flops in row["flops"].values())
    moe = files["moe_layer"]["rows"][0]["flops"]
    assert moe["dense_active_flops"] == 2 * moe["dense_width"]  # K = 2
    assert moe["moe"] > moe["dense_active_flops"]  # the router comes on top
    mixture = files["attention_mixture"]["rows"][0]["flops"]
    assert mixture["loop"] == mixture["one_call"]


def test_every_round_runs_each_once_and_rotates_the_order():
    calls = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = time_alternately(fns, rounds=3, warmup=0)
    assert "".join(calls) == "abcbcacab"
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_timing_is_the_median_and_the_middle_half():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(median_s=3.0, q1_s=2.0, q3_s=4.0, rounds=5)


def test_one_round_has_no_spread():
    with pytest.raises(ValueError, match="rounds must be at least 2, so that there is a spread, got 1"):
        time_alternately({"a": lambda: None}, rounds=1)


def test_the_newest_result_of_a_suite_is_shown_wherever_it_lies(tmp_path):
    paths = [tmp_path / folder / "2026-01-02_aaaaaaa_moe_layer.json" for folder in ("cpu", "gpu", "other")]
    for newest in paths:  # each in turn, whatever the order of the folder
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            hour = 10 if path == newest else 9
            path.write_text(json.dumps({"machine": {"time": f"2026-01-02T{hour:02}:00"}}))
        assert newest_results(tmp_path) == {"moe_layer": newest}


def test_pages_say_what_the_committed_results_say():
    for path, text in render_pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m benchmarks report`"
