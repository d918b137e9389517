"""The benchmark suites run, agree on their answers and write what a reader needs; the timer is fair."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_runtime_kernels import route_topk

from benchmarks import peers
from benchmarks.alternate import Timing, time_alternately
from benchmarks.conftest import check_repeats
from benchmarks.report import BEGIN, END, newest_compiled, newest_results, render_pages

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
    moving = {"combine", "permute", "plan", "route"}
    assert set(files) == {"attention_mixture", "linear", "moe_layer"} | moving
    for suite, content in files.items():
        assert content["suite"] == suite
        assert content["machine"]["versions"]["torch"]
        for row in content["rows"]:
            assert all(timing["median_s"] > 0 for timing in row["timings"].values())
            assert suite in moving or all(flops > 0 for flops in row["flops"].values())
    for row in (row for suite in moving for row in files[suite]["rows"]):
        speed = row["bytes"] / row["timings"]["moe_runtime"]["median_s"]
        assert row["bytes_per_s"]["moe_runtime"] == pytest.approx(speed)
        assert row["copy_share"]["moe_runtime"] == pytest.approx(speed / row["copy_bytes_per_s"])
        assert row["not_timed"] == {}
    routers = {name for row in files["route"]["rows"] for name in row["timings"]}
    others = {"transformers_mixtral", "transformers_qwen3_moe", "transformers_deepseek_v3"}
    assert routers == {"moe_runtime", "torch"} | others
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


def test_a_timing_of_several_calls_is_that_of_one():
    assert Timing.of([8.0, 8.0, 16.0], calls=4) == Timing(median_s=2.0, q1_s=2.0, q3_s=3.0, rounds=3)


def test_an_operation_that_gives_other_bits_the_second_time_is_refused():
    draws = iter(range(9))
    with pytest.raises(AssertionError, match="two runs differ"):
        check_repeats(lambda: torch.full((2,), next(draws)))
    with pytest.raises(AssertionError, match="two runs differ"):
        check_repeats(lambda: (torch.zeros(1), torch.full((2,), next(draws))))
    check_repeats(lambda: (torch.zeros(1), torch.ones(2)))


@pytest.mark.parametrize("routing", ["softmax", "groups"])
def test_transformers_routers_start_from_the_logits(routing):
    logits_TE = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    if routing == "softmax":
        routers = (peers.mixtral_router(8, 2, "cpu"), peers.qwen3_router(8, 2, "cpu"))
        expected = route_topk(logits_TE, 2)
    else:
        routers = (peers.deepseek_router(8, 2, 4, 2, "cpu"),)
        expected = route_topk(logits_TE, 2, score="sigmoid", num_groups=4, groups_kept=2)
    for router in routers:
        weight_TK, expert_TK = router(logits_TE)
        order = expert_TK.argsort(1)
        mine = expected.expert_TK.long().argsort(1)
        assert torch.equal(expert_TK.gather(1, order), expected.expert_TK.gather(1, mine).long())
        torch.testing.assert_close(weight_TK.gather(1, order), expected.weight_TK.gather(1, mine))


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


def test_compiled_kernels_are_listed_with_the_worst_of_their_configurations(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    machine = {"time": "2026-01-02T09:00", "commit": "a" * 40, "dirty": False}
    columns = ["file", "kernel", "target", "registers", "spilled", "shared", "atomics"]
    rows = [["plan.py", "_scan_kernel", "sm_90", *numbers] for numbers in ((40, 0, 2048, 0), (96, 0, 0, 0))]
    content = {"triton": "3.6.0", "machine": machine, "columns": columns, "rows": rows}
    folder = tmp_path / "benchmarks" / "results" / "aot"
    folder.mkdir(parents=True)
    (folder / "2026-01-02_aaaaaaa_triton-3.6.0.json").write_text(json.dumps(content))
    earlier = {**content, "machine": {**machine, "time": "2026-01-02T08:00"}, "rows": []}
    (folder / "2026-01-03_bbbbbbb_triton-3.6.0.json").write_text(json.dumps(earlier))
    assert newest_compiled(tmp_path / "benchmarks" / "results").name.startswith("2026-01-02")
    page = render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]
    assert "| `_scan_kernel` | sm_90 | 2 | 96 | 0 | 2,048 | 0 |" in page
    assert (
        "Triton 3.6.0; commit aaaaaaa; `benchmarks/results/aot/2026-01-02_aaaaaaa_triton-3.6.0.json`." in page
    )


def test_operations_that_move_data_are_shown_against_a_copy(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    timing = {"median_s": 2e-6, "q1_s": 1e-6, "q3_s": 3e-6}
    row = {
        "case": {"tokens": 64},
        "timings": {"moe_runtime": timing},
        "bytes_per_s": {"moe_runtime": 2e12},
        "copy_share": {"moe_runtime": 0.8},
        "ratio_to": "moe_runtime",
        "not_timed": {"sort": "it waits"},
    }
    machine = {"kind": "gpu", "device": "G", "threads": 1, "versions": {}, "commit": "a" * 40, "dirty": False}
    path = tmp_path / "benchmarks" / "results" / "g" / "2026-01-02_aaaaaaa_plan.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": {**machine, "time": "2026-01-02T09:00"}, "rows": [row]}))
    page = render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]
    assert "| 64 | 2.00 (1.00 to 3.00) | cannot be captured | 2000.0 | 80% |" in page
    assert "Replayed from CUDA graphs." in page
    assert "Nothing has been measured on a GPU yet." not in page


def test_pages_say_what_the_committed_results_say():
    for path, text in render_pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m benchmarks report`"
