"""The benchmark suites run, agree on their answers and write what a reader needs; the timer is fair."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_runtime_kernels import route_topk

from benchmarks import conftest, peers
from benchmarks.alternate import Timing, time_alternately
from benchmarks.bars import BARS
from benchmarks.conftest import (
    ROWS,
    check_repeats,
    of_products,
    result_path,
    time_products,
    usable,
    write_results,
)
from benchmarks.exact import RESULTS, exact_sample, make_layer
from benchmarks.floor import Work, expert_backward_work, expert_forward_work, product_grads_work, product_work
from benchmarks.report import BEGIN, END, newest_compiled, newest_results, render_pages
from benchmarks.shapes import CASES, EXPERTS

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
    products = {"attention_mix", "expert_ffn", "grouped_gemm"}
    assert set(files) == {"attention_mixture", "linear", "moe_layer"} | moving | products
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
    for row in (row for suite in products for row in files[suite]["rows"]):
        seconds = row["timings"]["moe_runtime"]["median_s"]
        assert row["flops_per_s"]["moe_runtime"] == pytest.approx(row["useful_flops"] / seconds)
        assert row["floor_share"]["moe_runtime"] == pytest.approx(row["floor_s"] / seconds)
        assert set(row["errors"]) == set(row["timings"]) == set(row["timed_by"])
    every = {"transformers_eager", "transformers_grouped_mm", "transformers_batched_mm", "liger", "sonicmoe"}
    every |= {"moe_runtime", "scattermoe", "megablocks", "triton_kernels"}
    for row in files["expert_ffn"]["rows"]:
        both = {"moe_runtime_recompute"} if row["case"]["direction"] == "forward_backward" else set()
        found = set(row["timings"]) | set(row["not_timed"])
        assert found == every | both, "a peer is missing without a reason"
        assert row["useful_flops"] == row["flops"]["moe_runtime"]
    shown = {row["case"]["direction"]: row["errors"]["moe_runtime"] for row in files["expert_ffn"]["rows"]}
    assert set(shown["forward_backward"]) == set(RESULTS)
    assert set(shown["inference"]) == {"y"}
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


def test_a_library_that_is_not_there_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    assert peers.installed_versions() == {}
    found = peers.expert_peers(torch.zeros(4, 2, dtype=torch.int32), 8, weight_bytes=2**26)
    assert set(found.fns) == {"transformers_eager", "transformers_grouped_mm"}
    assert found.absent == {
        "transformers_batched_mm": "would copy 0.50 GiB of weights, more than 0.25",
        "liger": "liger-kernel is not installed",
        "sonicmoe": "sonic-moe is not installed",
        "scattermoe": "scattermoe is not installed",
        "megablocks": "megablocks is not installed",
        "triton_kernels": "triton-kernels is not installed",
    }


def test_an_installed_library_is_not_imported_without_a_gpu(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = peers.available(
        {"liger": lambda: peers.liger_plan(8), "moe_ops": lambda: peers.moe_ops_router(2)}
    )
    assert found.absent == {"liger": "liger-kernel needs a GPU", "moe_ops": "moe-ops needs a GPU"}
    assert peers.installed_versions()["liger-kernel"] in ("unknown", "0.8.5")


def test_a_library_that_breaks_is_named_with_its_error(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    absent = peers.available({"liger": lambda: peers.liger_plan(8)}).absent["liger"]
    assert absent.startswith("cannot be set up: ModuleNotFoundError: No module named 'liger_kernel")
    reason = peers.available({"m": lambda: peers.no_adaptor("megablocks", "why")}).absent["m"]
    assert reason == "no adaptor for megablocks: why"


def test_wrong_and_failing_peers_are_shown_and_not_timed():
    def check(name, out):
        assert out == 1, f"{name} is off"

    def fails():
        raise RuntimeError("no such kernel\nmore")

    found = peers.Peers({"right": lambda: 1, "wrong": lambda: 2, "failing": fails}, {"other": "is not there"})
    assert usable(found, check) == {
        "other": "is not there",
        "wrong": "wrong: AssertionError: wrong is off",
        "failing": "fails: RuntimeError: no such kernel",
    }
    assert set(found.fns) == {"right"}


def test_useful_flops_and_bytes_are_those_of_the_products():
    shape, T = EXPERTS["qwen3-30b-a3b"], 8192
    N = T * 8
    forward, backward = (
        expert_forward_work(T, shape, 128, keeps_h=True),
        expert_backward_work(T, shape, 128),
    )
    assert forward.flops == 6 * N * 2048 * 768
    assert backward.flops == 2 * forward.flops
    products = product_work(N, 2048, 1536, 128) + product_work(N, 768, 2048, 128)
    assert forward.flops == products.flops
    assert product_grads_work(N, 2048, 1536, 128, 128).flops == 2 * product_work(N, 2048, 1536, 128).flops
    # x gathered, h and a written, a read, rows written and read, y written; three matrices of each expert
    elements = N * (2048 + 1536 + 768 + 768 + 2048 + 2048) + T * 2048 + 128 * 3 * 2048 * 768
    assert forward.nbytes == 2 * elements
    assert forward.nbytes - expert_forward_work(T, shape, 128, keeps_h=False).nbytes == 2 * N * 1536
    # at 798 TFLOP/s and 3.0 TB/s; the first is nearly bound by products, the second by its weights
    at_128 = expert_forward_work(128, shape, 128, keeps_h=True)
    assert forward.floor_s(798e12, 3.0e12) == pytest.approx(0.816e-3, rel=0.005)
    assert at_128.floor_s(798e12, 3.0e12) == pytest.approx(0.409e-3, rel=0.02)


def test_speeds_and_the_floor_follow_from_the_medians():
    timings = {"moe_runtime": Timing(0.5, 0.4, 0.6, 3), "other": Timing(2.0, 2.0, 2.0, 3)}
    row = of_products(timings, Work(flops=100, nbytes=30), copy_speed=120.0, product_speed=1000.0)
    assert row["floor_s"] == 0.25  # bound by memory
    assert row["flops_per_s"] == {"moe_runtime": 200.0, "other": 50.0}
    assert row["floor_share"] == {"moe_runtime": 0.5, "other": 0.125}


def test_what_waits_or_cannot_be_captured_is_timed_with_its_hosts_part(monkeypatch):
    mode = ["default"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda value: mode.append(value))

    def waiting():
        if mode[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def captured(fn, launches, pool):
        assert pool == "shared"
        if fn is stubborn:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: [fn() for _ in range(launches)]

    def stubborn():
        return None

    monkeypatch.setattr(conftest, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "shared")
    fns = {"moe_runtime": lambda: None, "waiting": waiting, "stubborn": stubborn}
    timings, ways = time_products(fns, rounds=2)
    assert ways == {"moe_runtime": "graph", "waiting": "call", "stubborn": "call"}
    assert set(timings) == set(fns)
    assert mode[-1] == "default"


def test_the_exact_sample_is_the_layer_in_float64_and_sees_faults():
    layer = make_layer(40, 24, 16, 6, 2, "cpu")
    sample = exact_sample(layer, num_tokens=10)
    leaves = [tensor.double().requires_grad_() for tensor in layer.parameters()]
    x, gate_up, down, weight = leaves
    y = torch.zeros(40, 24, dtype=torch.float64)
    for k in range(2):
        expert = layer.expert_TK[:, k].long()
        gate, up = torch.einsum("td,tgd->tg", x, gate_up[expert]).chunk(2, dim=1)
        a = torch.nn.functional.silu(gate) * up
        y = y + weight[:, k, None] * torch.einsum("tf,tdf->td", a, down[expert])
    grads = torch.autograd.grad(y, leaves, layer.grad_TD.double())
    results = dict(zip(RESULTS, (y.detach(), *grads), strict=True))
    assert max(sample.errors(results).values()) < 1e-12
    for name, value in results.items():
        broken = value.clone()
        broken[sample.expert if name in ("dgate_up", "ddown") else sample.token_S[1]] = 0
        assert sample.errors({name: broken})[name] > 0.05, f"a lost part of {name} is not seen"


def test_results_are_written_row_by_row_and_keep_cases_measured_before(tmp_path, monkeypatch):
    monkeypatch.setitem(
        ROWS, "some", [{"case": {"tokens": 1}, "value": 1}, {"case": {"tokens": 2}, "value": 2}]
    )
    write_results(str(tmp_path), "some")
    monkeypatch.setitem(ROWS, "some", [{"case": {"tokens": 2}, "value": 3}])
    write_results(str(tmp_path), "some")
    content = json.loads(result_path(str(tmp_path), "some").read_text())
    assert [(row["case"]["tokens"], row["value"]) for row in content["rows"]] == [(2, 3), (1, 1)]
    write_results(None, "some")  # without a folder nothing is written
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_shapes_of_every_device_are_named():
    assert {model for cases in CASES.values() for model, _ in cases} <= set(EXPERTS)
    assert ("qwen3-30b-a3b", 32768) in CASES["gpu"]


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


def test_one_round_has_no_spread():
    with pytest.raises(ValueError, match="rounds must be at least 2, so that there is a spread, got 1"):
        time_alternately({"a": lambda: None}, rounds=1)


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
