"""What the report makes of result files: the bars, the newest results, every kind of table."""

import json
from pathlib import Path

import pytest

from benchmarks.bars import BARS
from benchmarks.report import BEGIN, END, newest_compiled, newest_results, render_pages

ROOT = Path(__file__).resolve().parent.parent


def expert_rows(peak=True):
    """Rows of a GPU as bench_expert_ffn writes them, at which every bar of the layer holds just so."""
    rows = []
    flops = {tokens: 6 * tokens * 8 * 2048 * 768 for tokens in (128, 1024, 8192, 32768)}
    speeds = {8192: (450e12, 380e12), 32768: (520e12, 430e12)}
    for tokens, forward in flops.items():
        speed, back = speeds.get(tokens, (20e12, 20e12))
        seconds = {"forward": forward / speed, "inference": forward / 540e12}
        seconds["forward_backward"] = forward / speed + 2 * forward / back
        for direction, median in seconds.items():
            names = {"moe_runtime": 1.0, "liger": 1.8, "transformers_grouped_mm": 1.8}
            useful = 3 * forward if direction == "forward_backward" else forward
            rows.append(
                {
                    "case": {"model": "qwen3-30b-a3b", "direction": direction, "tokens": tokens},
                    "timings": {name: {"median_s": factor * median} for name, factor in names.items()},
                    "useful_flops": useful,
                    "flops_per_s": {"moe_runtime": useful / median},
                    "floor_share": {"moe_runtime": 0.9},
                    "peak_bytes": {"moe_runtime": 7, "liger": 7},
                    "not_timed": {},
                }
            )
    return rows


def gpu_suites():
    def rows(tokens, microseconds, **more):
        timing = {"moe_runtime": {"median_s": microseconds * 1e-6}}
        case = {"model": "qwen3-30b-a3b", "tokens": tokens}
        return {"case": case, "timings": timing, "not_timed": {}, **more}

    return {
        "route": [rows(64, 3.0), rows(512, 5.0), rows(8192, 30.0)],
        "plan": [rows(8192, 30.0)],
        "combine": [rows(8192, 9.0, copy_share={"moe_runtime": 0.9})],
        "expert_ffn": expert_rows(),
    }


def test_every_bar_holds_at_its_limit_and_no_bar_holds_beyond_it():
    suites = gpu_suites()
    for bar in BARS:
        measured = bar.measure(suites)
        assert measured == pytest.approx(bar.wanted, rel=0.03) or bar.holds(measured), bar.what
        assert not bar.holds(bar.wanted * (1.01 if bar.at_most else 0.99)), bar.what
    lines = [bar.line(suites) for bar in BARS]
    assert lines[0] == ["`route_topk`, 512 tokens or fewer", "at most 5.0 µs", "5.0 µs", "yes"]
    suites["route"][1]["timings"]["moe_runtime"]["median_s"] = 6e-6
    assert BARS[0].line(suites)[2:] == ["6.0 µs", "no"]


def test_bars_without_numbers_say_why():
    assert {bar.line({})[2] for bar in BARS} == {"not measured on an H100"}
    suites = gpu_suites()
    first, *others = suites["expert_ffn"]
    del first["timings"]["liger"]  # one case is enough to say what the others give
    assert all(bar.line(suites)[3] for bar in BARS)
    for row in others:
        del row["timings"]["liger"]
    for row in suites["expert_ffn"]:
        row["not_timed"] = {"liger": "liger-kernel is not installed"}
    without = [line for line in (bar.line(suites) for bar in BARS) if not line[3]]
    assert [line[2] for line in without] == ["liger-kernel is not installed"] * 2


def write_result(root, folder, suite, *, device, kind="gpu", hour=9, **content):
    """A result file where the benchmarks would write it."""
    machine = {"kind": kind, "device": device, "threads": 1, "versions": {}, "commit": "a" * 40}
    content["machine"] = {**machine, "dirty": False, "time": f"2026-01-02T{hour:02}:00"}
    path = root / "benchmarks" / "results" / folder / f"2026-01-02_aaaaaaa_{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_the_newest_result_of_a_suite_is_shown_wherever_it_lies(tmp_path):
    for newest in ("a", "b", "c"):  # each in turn, whatever the order of the folder
        paths = {
            folder: write_result(
                tmp_path, folder, "moe_layer", device="X", kind="cpu", hour=10 if folder == newest else 9
            )
            for folder in ("a", "b", "c")
        }
        assert newest_results(tmp_path / "benchmarks" / "results") == {"moe_layer": paths[newest]}


def test_a_gpus_result_is_shown_before_a_newer_one_of_a_cpu(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    on_cpu = [
        write_result(tmp_path, "a-cpu", suite, device="X", kind="cpu", hour=12)
        for suite in ("plan", "linear")
    ]
    old = write_result(tmp_path, "h100", "plan", device="NVIDIA H100 80GB HBM3", hour=8)
    new = write_result(tmp_path, "a100", "plan", device="NVIDIA A100-SXM4-80GB", hour=9)
    write_result(tmp_path, "gh200", "route", device="NVIDIA GH200 480GB", hour=9)
    shown = newest_results(folder)
    assert (shown["plan"], shown["linear"]) == (new, on_cpu[1])
    assert newest_results(folder, "H100") == {"plan": old}


def test_bars_are_of_an_h100_and_other_gpus_are_measured_nonetheless(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    timing = {"median_s": 4e-6, "q1_s": 4e-6, "q3_s": 4e-6}
    row = {
        "case": {"model": "qwen3-30b-a3b", "tokens": 64},
        "timings": {"moe_runtime": timing},
        "bytes_per_s": {"moe_runtime": 2e12},
        "copy_share": {"moe_runtime": 0.8},
        "ratio_to": "moe_runtime",
        "not_timed": {},
    }

    def page():
        return render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]

    write_result(tmp_path, "cpu", "route", device="X", kind="cpu", hour=12, rows=[row])
    assert "Nothing has been measured on a GPU yet." in page()
    write_result(tmp_path, "a100", "route", device="NVIDIA A100-SXM4-80GB", rows=[row])
    assert "Nothing has been measured on a GPU yet." not in page()
    assert "GPU time on NVIDIA A100-SXM4-80GB" in page()
    assert "| `route_topk`, 512 tokens or fewer | at most 5.0 µs | not measured on an H100 |  |" in page()
    write_result(tmp_path, "h100", "route", device="NVIDIA H100 80GB HBM3", hour=8, rows=[row])
    assert "| `route_topk`, 512 tokens or fewer | at most 5.0 µs | 4.0 µs | yes |" in page()


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
        "not_timed": {"sort": "cannot be captured: it waits"},
    }
    machine = {"kind": "gpu", "device": "G", "threads": 1, "versions": {}, "commit": "a" * 40, "dirty": False}
    path = tmp_path / "benchmarks" / "results" / "g" / "2026-01-02_aaaaaaa_plan.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": {**machine, "time": "2026-01-02T09:00"}, "rows": [row]}))
    page = render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]
    assert "| 64 | 2.00 (1.00 to 3.00) | 2000.0 | 80% |" in page
    assert "Not timed:\n\n- sort: cannot be captured: it waits" in page
    assert "Replayed from CUDA graphs." in page
    assert "Nothing has been measured on a GPU yet." not in page


def test_products_are_shown_with_their_floor_errors_and_peers(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    names = ("moe_runtime", "liger", "transformers_eager")
    timing = {"median_s": 2e-3, "q1_s": 1e-3, "q3_s": 3e-3}
    row = {
        "case": {"model": "m", "direction": "forward", "tokens": 8192},
        "timings": {name: timing for name in names},
        "ratio_to": "moe_runtime",
        "ratios": {"moe_runtime": 1.0, "liger": 1.5, "transformers_eager": 4.0},
        "errors": {name: {"y": 1e-3, "dx": 2e-3} for name in names},
        "not_timed": {"sonicmoe": "sonic-moe is not installed"},
        "timed_by": {"moe_runtime": "graph", "liger": "graph", "transformers_eager": "call"},
        "flops_per_s": {"moe_runtime": 4.5e14},
        "floor_share": {"moe_runtime": 0.61},
        "peak_bytes": dict.fromkeys(names, 2**30),
        "copy_bytes_per_s": 3e12,
        "product_flops_per_s": 7.98e14,
    }
    machine = {
        "kind": "gpu",
        "device": "NVIDIA H100 80GB HBM3",
        "threads": 1,
        "versions": {},
        "commit": "a" * 40,
        "dirty": False,
    }
    path = tmp_path / "benchmarks" / "results" / "g" / "2026-01-02_aaaaaaa_expert_ffn.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": {**machine, "time": "2026-01-02T09:00"}, "rows": [row]}))
    page = render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]
    assert (
        "| 8192 | 2.00 (1.00 to 3.00) | 450 | 61% | 2.0e-03 | 1,024 | 1.50 times, error 2.0e-03, 1,024 MiB |"
        in page
    )
    assert "| 4.00 times, error 2.0e-03, 1,024 MiB, with the host's part |" in page
    assert "- sonicmoe: sonic-moe is not installed" in page
    assert "Replayed from CUDA graphs unless said.\n" in page
    assert "a copy moves 3,000 GB/s, a large bfloat16 product makes 798.00 TFLOP/s" in page
    assert "| `route_topk`, 512 tokens or fewer | at most 5.0 µs | not measured on an H100 |  |" in page
    assert (
        "| `expert_ffn`, forward, 8,192 tokens | at least 450 TFLOP/s | the result has no such case |  |"
        in page
    )


def test_tuned_launches_are_shown_beside_the_closed_form(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    row = {"kernel": "grouped_gemm plain", "key": ["cuda90", 2, 768, 2048, 128, 512], "candidates": 40}
    row |= {"closed_form_s": 2e-4, "seconds": 1.5e-4, "worth_it": True}
    row["refused"] = [{"fields": {"block_m": 64}, "why": "result 0 differs"}]
    machine = {"kind": "gpu", "device": "G", "threads": 1, "versions": {}, "commit": "a" * 40, "dirty": False}
    path = tmp_path / "benchmarks" / "results" / "g" / "2026-01-02_aaaaaaa_tune.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": {**machine, "time": "2026-01-02T09:00"}, "rows": [row]}))
    page = render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]
    assert "| grouped_gemm plain | cuda90 2 768 2048 128 512 | 40 | 200.0 | 150.0 | yes |" in page
    assert "closed form's:\n\n- grouped_gemm plain: result 0 differs\n" in page


def test_pages_say_what_the_committed_results_say():
    for path, text in render_pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m benchmarks report`"
