"""What the report makes of result files: the bars, the newest results, every kind of table."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import sections
from benchmarks.bars import BARS
from benchmarks.plots import draw
from benchmarks.report import (
    BEGIN,
    END,
    newest_compiled,
    newest_results,
    one_device,
    one_h100,
    render_pages,
    stale_plots,
    write_pages,
)
from benchmarks.sections import NOTES, SECTIONS

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
    machine = {"kind": kind, "device": device, "cores": 2, "threads": 1, "versions": {}, "commit": "a" * 40}
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
        shown = newest_results(tmp_path / "benchmarks" / "results")
        assert {suite: [result.path for result in found] for suite, found in shown.items()} == {
            "moe_layer": [paths[newest]]
        }


def test_every_device_is_shown_gpus_first_whatever_is_newer(tmp_path):
    on_cpu = write_result(tmp_path, "a-cpu", "plan", device="X", kind="cpu", hour=12)
    other = write_result(tmp_path, "z-cpu", "plan", device="B", kind="cpu", hour=7)
    h100 = write_result(tmp_path, "h100", "plan", device="NVIDIA H100 80GB HBM3", hour=8)
    a100 = write_result(tmp_path, "a100", "plan", device="NVIDIA A100-SXM4-80GB", hour=9)
    found = newest_results(tmp_path / "benchmarks" / "results")["plan"]
    assert [result.path for result in found] == [a100, h100, other, on_cpu]
    assert [result.device for result in found[1:3]] == ["NVIDIA H100 80GB HBM3", "B, 2 cores"]
    assert one_device(found).path == a100, "the newest of a GPU"
    assert one_device(found[2:]).path == on_cpu, "the newest of a CPU"


def test_bars_are_never_of_two_devices(tmp_path):
    """All are of the H100 of which most is known, and then of the newer one."""
    folder = tmp_path / "benchmarks" / "results"

    def shown():
        return {suite: result.device for suite, result in one_h100(newest_results(folder)).items()}

    write_result(tmp_path, "gh200", "route", device="NVIDIA GH200 480GB")
    write_result(tmp_path, "cpu", "route", device="H100", kind="cpu")
    assert shown() == {}
    write_result(tmp_path, "pcie", "route", device="NVIDIA H100 PCIe", hour=8)
    write_result(tmp_path, "pcie", "linear", device="NVIDIA H100 PCIe", hour=23)
    write_result(tmp_path, "hbm3", "plan", device="NVIDIA H100 80GB HBM3", hour=9)
    assert shown() == {"plan": "NVIDIA H100 80GB HBM3"}
    write_result(tmp_path, "pcie", "combine", device="NVIDIA H100 PCIe", hour=8)
    assert shown() == dict.fromkeys(("route", "combine"), "NVIDIA H100 PCIe")


AMD, INTEL = "AMD EPYC", "Intel(R) Xeon(R) Processor @ 2.50GHz"


def committed(suite):
    """What a committed result holds, for a file of another machine."""
    result, *_ = newest_results(ROOT / "benchmarks" / "results")[suite]
    return {key: value for key, value in result.content.items() if key not in ("machine", "suite")}


def on_two_cpus(root, suite, newer, **content):
    for folder, device in (("b", AMD), ("a", INTEL)):
        hour = 10 if device == newer else 9
        write_result(root, folder, suite, device=device, kind="cpu", hour=hour, **content)


def test_results_of_two_cpus_are_both_shown_below_their_names(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    pages = []
    for newer in (AMD, INTEL):
        for suite in ("route", "memory", "train_step"):
            on_two_cpus(tmp_path, suite, newer, **committed(suite))
        write_result(tmp_path, "b", "linear", device=AMD, kind="cpu", **committed("linear"))
        pages.append(render_pages(tmp_path)[tmp_path / "docs" / "performance.md"])
    page, again = pages
    assert page == again, "which one is newer decides nothing"
    devices = [f"### {AMD}, 2 cores", f"### {INTEL}, 2 cores"]
    assert re.findall("^##.*", page, re.M) == [
        "## What the kernels are held to",
        "## A training step on a CPU",
        *devices,
        "### How to read it",
        "## Routing",
        *devices,
        "## Float32 products on the CPU",
        "## Memory of training beside its plan",
        *devices,
    ]
    for device, folder in ((AMD, "b"), (INTEL, "a")):
        for suite in ("route", "memory", "train_step"):
            origin = f"CPU time on {device}, 1 threads; ; commit aaaaaaa; "
            assert f"{origin}`benchmarks/results/{folder}/2026-01-02_aaaaaaa_{suite}.json`." in page
    routing = page.partition("## Routing")[2].partition("## Float32")[0]
    explained, first, second = routing.split("### ")
    assert "Not yet measured on a GPU." in explained
    assert "measured on a GPU" not in first + second
    assert first.partition("| tokens")[2].count("|") == second.partition("| tokens")[2].count("|") > 0
    assert page.count("Ours is what `moe-runtime train` runs") == 1


def test_a_gpus_section_does_not_say_that_there_is_none(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    write_result(tmp_path, "x", "plan", device="X", kind="cpu", hour=12, **committed("plan"))
    write_result(tmp_path, "g", "plan", device="NVIDIA A100-SXM4-80GB", hour=8, **committed("plan"))
    page = render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]
    assert re.findall("^###.*", page, re.M) == ["### NVIDIA A100-SXM4-80GB", "### X, 2 cores"]
    assert "Not yet measured on a GPU." not in page


def test_plots_of_two_cpus_are_files_of_their_own(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    rows = [model_row("prefill")]
    plots = tmp_path / "docs" / "plots"
    names = {
        device: {f"{kind}_end_to_end{end}.svg" for kind in ("speedup", "roofline")}
        for device, end in (
            ("", ""),
            (AMD, "_cpu-amd-epyc-2-cores"),
            (INTEL, "_cpu-intel-r-xeon-r-processor-2-50ghz-2-cores"),
        )
    }
    write_result(tmp_path, "b", "end_to_end", device=AMD, kind="cpu", rows=rows)
    write_pages(tmp_path)
    assert {path.name for path in plots.iterdir()} == names[""]
    slower = [{**rows[0], "ratios": {name: 3 * ratio for name, ratio in rows[0]["ratios"].items()}}]
    slower[0]["ratios"]["moe_runtime"] = 1.0
    write_result(tmp_path, "a", "end_to_end", device=INTEL, kind="cpu", hour=10, rows=slower)
    write_pages(tmp_path)
    assert {path.name for path in plots.iterdir()} == names[AMD] | names[INTEL], "and none of before"
    page = (tmp_path / "docs" / "performance.md").read_text()
    first, second = page.partition("## Whole models")[2].split("### ")[1:3]
    for part, device in ((first, AMD), (second, INTEL)):
        assert part.startswith(device)
        assert set(re.findall(r"\]\(plots/(.*)\)", part)) == names[device]
    pictures = {path.read_text() for path in plots.glob("speedup*.svg")}
    assert len(pictures) == 2, "each shows its own device's times"
    assert page.count("### What decides decoding on a CPU") == 1


def test_readmes_table_is_of_one_device_the_newest(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}")
    for newer, older in ((AMD, INTEL), (INTEL, AMD)):
        on_two_cpus(tmp_path, "demo", newer, **committed("demo"))
        pages = render_pages(tmp_path)
        assert f"CPU time on {newer}, 1 threads" in pages[readme]
        assert older not in pages[readme]
        page = pages[tmp_path / "docs" / "performance.md"]
        assert page.index(f"### {AMD}, 2 cores") < page.index(f"### {INTEL}, 2 cores")
    on_gpu = write_result(tmp_path, "g", "demo", device="NVIDIA L4", hour=8, **committed("demo"))
    origin = f"GPU time on NVIDIA L4, 1 threads; ; commit aaaaaaa; `{on_gpu.relative_to(tmp_path)}`."
    assert origin in render_pages(tmp_path)[readme]


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
    write_result(tmp_path, "g", "plan", device="G", rows=[row])
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
    write_result(tmp_path, "g", "expert_ffn", device="NVIDIA H100 80GB HBM3", rows=[row])
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
    write_result(tmp_path, "g", "tune", device="G", rows=[row])
    page = render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]
    assert "| grouped_gemm plain | cuda90 2 768 2048 128 512 | 40 | 200.0 | 150.0 | yes |" in page
    assert "closed form's:\n\n- grouped_gemm plain: result 0 differs\n" in page


def model_row(phase, **more):
    """As bench_end_to_end writes it; the dense model has no error, the library no counted FLOPs."""
    ms = {"moe_runtime": 2.0, "dense_width": 1.0, "transformers_eager": 4.0}
    return {
        "case": {"model": "m", "phase": phase, "tokens": 256, "dtype": "bfloat16"},
        "timings": {name: {"median_s": t / 1e3, "q1_s": t / 1e3, "q3_s": t / 1e3} for name, t in ms.items()},
        "ratio_to": "moe_runtime",
        "ratios": {name: t / 2 for name, t in ms.items()},
        "errors": {"moe_runtime": {"logits": 1e-2}, "transformers_eager": {"logits": 2e-2}},
        "not_timed": {"transformers_batched_mm": "would copy 2.62 GiB of weights, more than 0.25"},
        "flops": {"moe_runtime": 7e9, "dense_width": 3e9},
        "formula_flops": {"moe_runtime": 6e9, "dense_width": 3e9, "transformers_eager": 6e9},
        "formula_bytes": {"moe_runtime": 3e8, "dense_width": 1e8, "transformers_eager": 3e8},
        "flops_per_s": {"moe_runtime": 3e12, "dense_width": 3e12, "transformers_eager": 1.5e12},
        "bytes_per_s": dict.fromkeys(ms, 5e9),
        "floor_share": dict.fromkeys(ms, 0.25),
        "copy_bytes_per_s": 3e10,
        "product_flops_per_s": 12e12,
        **more,
    }


def test_whole_models_have_a_line_per_implementation_and_their_plots(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    times = {"p50_s": 2e-3, "p90_s": 3e-3, "p99_s": 4e-3}
    decode = model_row("decode", percentiles=dict.fromkeys(model_row("decode")["timings"], times))
    write_result(tmp_path, "cpu", "end_to_end", device="X", kind="cpu", rows=[model_row("prefill"), decode])
    pages = render_pages(tmp_path)
    page = pages[tmp_path / "docs" / "performance.md"]
    assert (
        "| m | decode | 256 | bfloat16 | moe_runtime | 2.00 (2.00 to 2.00) | 1.00 | 3 | 5.0 | 25% | 1.0e-02 "
        "| 6,000.0 | 7,000.0 | 2.00 / 3.00 / 4.00 |" in page
    )
    assert (
        "| m | prefill | 256 | bfloat16 | dense_width | 1.00 (1.00 to 1.00) | 0.50 | 3 | 5.0 | 25% |  | "
        "3,000.0 | 3,000.0 |  |" in page
    )
    assert (
        "transformers_eager | 4.00 (4.00 to 4.00) | 2.00 | 1.5 | 5.0 | 25% | 2.0e-02 | 6,000.0 |  |" in page
    )
    assert "- transformers_batched_mm: would copy 2.62 GiB of weights, more than 0.25" in page
    assert "a large bfloat16 product makes 12.00 TFLOP/s" in page
    for name in ("speedup_end_to_end", "latency", "roofline_end_to_end"):
        assert f"](plots/{name}.svg)" in page
        assert pages[tmp_path / "docs" / "plots" / f"{name}.svg"].startswith("<svg")
    assert pages == render_pages(tmp_path), "the same results gave other bytes"


def test_plots_show_the_rows():
    names = ("moe_runtime", "transformers_grouped_mm")
    rows = [
        {
            "case": {"model": "m", "direction": "forward", "tokens": tokens, "dtype": dtype},
            "timings": {name: {} for name in names},
            "ratio_to": "moe_runtime",
            "ratios": {"moe_runtime": 1.0, "transformers_grouped_mm": 1.37},
            "useful_flops": 1e9 * tokens,
            "bytes": 1e8,
            "flops_per_s": dict.fromkeys(names, 1e11),
            "copy_bytes_per_s": 2e10,
            "product_flops_per_s": 4e11,
        }
        for tokens in (1, 16)
        for dtype in ("float32", "bfloat16")
    ]
    layer = {
        "case": {"shape": "s", "tokens": 512},
        "timings": {},
        "flops": {"moe": 8.03, "dense_active_flops": 8.0, "dense_width": 1.0},
        "ratios": {"moe": 1.5, "dense_active_flops": 1.0, "dense_width": 0.125},
    }
    lora = {
        "case": {"shape": "s"},
        "timings": {"peft": {}, "moe_runtime": {}},
        "ratio_to": "peft",
        "ratios": {"peft": 1.0, "moe_runtime": 0.2},
    }
    assert ">5.00<" in draw({"expert_lora": {"rows": [lora]}})["speedup_expert_lora.svg"][2]
    found = draw({"experts_cpu": {"rows": rows}, "moe_layer": {"rows": [layer]}, "demo": {}})
    assert {name: suite for name, (suite, *_) in found.items()} == {
        "speedup_experts_cpu.svg": "experts_cpu",
        "roofline_experts_cpu.svg": "experts_cpu",
        "flops_dense.svg": "moe_layer",
    }
    text = {name: re.findall(r"<text[^>]*>([^<]*)</text>", picture) for name, (*_, picture) in found.items()}
    assert text["speedup_experts_cpu.svg"].count("1.37") == 4
    assert {"m · forward · float32 · 1 token", "m · forward · bfloat16 · 16 tokens"} <= set(
        text["speedup_experts_cpu.svg"]
    )
    assert {"float32", "bfloat16", "GFLOP/s"} <= set(text["roofline_experts_cpu.svg"])
    assert {"8.03", "8.00", "12.00"} <= set(
        text["flops_dense.svg"]
    )  # FLOPs, time of dense and of the mixture


def test_every_suite_has_a_section_and_every_note_a_suite():
    suites = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert suites <= set(SECTIONS)
    commands = {"ablation", "expert_load", "flan", "memory", "packing", "upcycling"}
    assert {path.stem for path in NOTES.glob("*.md")} <= suites | commands
    assert commands <= set(SECTIONS)


def test_a_note_stands_below_its_suites_table(tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "NOTES", tmp_path)
    assert sections.notes("end_to_end") == []
    (tmp_path / "end_to_end.md").write_text("What worked.\n")
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}")
    write_result(tmp_path, "cpu", "end_to_end", device="X", kind="cpu", rows=[model_row("prefill")])
    page = render_pages(tmp_path)[tmp_path / "docs" / "performance.md"]
    assert page.endswith("(plots/roofline_end_to_end.svg)\n\nWhat worked.\n")


@pytest.mark.parametrize(("words", "package"), [("report", "matplotlib"), ("run", "pytest")])
def test_what_is_missing_is_said_with_the_line_that_installs_it(monkeypatch, capsys, words, package):
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", words])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main() == 2
    line = "python -m pip install '.[bench]'"
    assert capsys.readouterr().out == f"The benchmarks need {package}, of the extra bench; run: {line}\n"


def test_pages_say_what_the_committed_results_say():
    pages = render_pages(ROOT)
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m benchmarks report`"
    assert stale_plots(ROOT, pages) == [], "run `python -m benchmarks report`"
