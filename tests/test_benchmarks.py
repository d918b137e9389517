"""The benchmark suites run, agree on their answers and write what a reader needs; the timer is fair."""

import inspect
import json
import math
import os
import statistics
import subprocess
import sys
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moe_runtime_kernels import route_topk

from benchmarks import conftest, peers
from benchmarks.alternate import Timing, cold_caches, time_alternately
from benchmarks.bars import find
from benchmarks.bench_moe_layer import equal_layers, route_like
from benchmarks.conftest import (
    BUDGET_S,
    FEWEST_ROUNDS,
    ROUNDS_FOR_PERCENTILES,
    ROWS,
    affordable,
    check_repeats,
    compared,
    finite,
    of_products,
    result_path,
    time_products,
    usable,
    warmup,
    write_results,
)
from benchmarks.exact import RESULTS, choose_experts, exact_sample, make_layer
from benchmarks.floor import Work, expert_backward_work, expert_forward_work, product_grads_work, product_work
from benchmarks.handover import hand_over
from benchmarks.shapes import CASES, EXPERTS, ROUTINGS

ROOT = Path(__file__).resolve().parent.parent


def run_tests(*command, **environment):
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Folder of every suite's result files, and of pytest-benchmark's own in samples.json."""
    folder = tmp_path_factory.mktemp("results")
    options = f"--benchmark-json={folder / 'samples.json'}"
    run_tests("benchmarks", "run", "--tiny", "--output", str(folder), PYTEST_ADDOPTS=options)
    return folder


def test_suites_run_and_write_results(tiny_run):
    files = {path.stem.split("_", 2)[2]: json.loads(path.read_text()) for path in tiny_run.glob("*/*.json")}
    moving = {"combine", "permute", "plan", "route"}
    products = {"attention_mix", "expert_ffn", "grouped_gemm"}
    suites = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(files) == suites >= {"attention_mixture", "linear", "moe_layer"} | moving | products
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
    every |= {"moe_runtime", "scattermoe", "moe_ops", "momoe", "megablocks", "triton_kernels"}
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
    for row in files["moe_layer"]["rows"]:
        assert row["formula_flops"] == row["flops"]
        assert set(row["floor_share"]) == set(row["timings"])
    used = {row["case"]["routing"]: row["formula_bytes"]["moe"] for row in files["moe_layer"]["rows"]}
    assert used["one_hot"] < used["uniform"]  # weights of K experts instead of all
    mixture = files["attention_mixture"]["rows"][0]["flops"]
    assert mixture["loop"] == mixture["one_call"]


def test_every_round_runs_each_once_after_any_other():
    calls = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = time_alternately(fns, rounds=12, warmup=0, before=lambda: calls.append("-"))
    assert calls[::2] == ["-"] * 36
    order = "".join(calls[1::2])
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 36, 3))
    pairs = {first + second for first, second in pairwise(order)}
    assert pairs >= {first + second for first, second in permutations("abc", 2)}
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": 12, "b": 12, "c": 12}


def test_an_error_that_is_not_a_number_is_one():
    assert finite("a", {"y": 0.1}) == {"y": 0.1}
    for wrong in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="a is off by"):
            finite("a", {"y": 0.1, "dx": wrong})


@pytest.mark.parametrize("warmup", [0, 2])
def test_each_ones_first_result_is_checked_and_a_wrong_one_reports_no_time(warmup):
    checked, calls = [], iter(range(99))
    fns = {name: lambda name=name: (name, next(calls)) for name in "ab"}
    time_alternately(fns, rounds=3, warmup=warmup, check=lambda *given: checked.append(given))
    assert sorted(name for name, _ in checked) == ["a", "b"]
    assert all(name == returned and number < 4 for name, (returned, number) in checked)

    def refuse(name, out):
        assert name != "b", "wrong"

    with pytest.raises(AssertionError, match="wrong"):
        time_alternately(fns, rounds=3, warmup=warmup, check=refuse)


def test_long_calls_are_timed_in_fewer_rounds_and_never_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert affordable(12, round_s=BUDGET_S / 100) == 12
    assert affordable(12, round_s=BUDGET_S / 7.5) == 7
    assert affordable(12, round_s=10 * BUDGET_S) == affordable(3, round_s=10 * BUDGET_S) == FEWEST_ROUNDS
    assert affordable(ROUNDS_FOR_PERCENTILES, round_s=BUDGET_S) == ROUNDS_FOR_PERCENTILES
    assert (warmup(FEWEST_ROUNDS), warmup(FEWEST_ROUNDS + 1)) == (0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert affordable(20, round_s=10 * BUDGET_S) == 20, "what a GPU's host waits for is no time of its"


def test_cold_caches_hold_other_bytes():
    """More of them than the last cache has room for, changed in every call."""
    evict = cold_caches()
    (other,) = inspect.getclosurevars(evict).nonlocals.values()
    evict()
    assert other.unique().tolist() == [1]
    assert other.numel() >= 2 * 2**20


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
        "moe_ops": "moe-ops is not installed",
        "momoe": "momoe is not installed",
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
    reason = peers.available({"m": lambda: peers.no_adaptor("momoe", "why")}).absent["m"]
    assert reason == "no adaptor for momoe: why"


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
    assert {model for cases in CASES.values() for model, *_ in cases} <= set(EXPERTS)
    assert ("qwen3-30b-a3b", 32768, "uniform") in CASES["gpu"]


def test_routings_are_what_they_are_called():
    T, E, K = 4000, 16, 2
    share = {}
    for routing in ROUTINGS:
        expert_TK = choose_experts(T, E, K, routing, torch.Generator().manual_seed(0))
        assert (expert_TK.sort(1).values.diff(dim=1) > 0).all(), "a token has an expert twice"
        share[routing] = torch.bincount(expert_TK.flatten(), minlength=E) / T
        layer = equal_layers(32, 16, E, K, torch.float32)["moe"]
        route_like(layer, routing)
        x_TD = torch.randn(T, 32, generator=torch.Generator().manual_seed(0))
        x_TD[:, 0] = 1
        share[f"{routing} of a layer"] = layer.router(x_TD).count_E / T
    for where in ("", " of a layer"):
        assert share[f"uniform{where}"].max() < 1.6 * K / E
        assert share[f"zipf{where}"].argmax() == 0
        assert share[f"zipf{where}"][0] > 4 * share[f"zipf{where}"][E // 2 :].mean()
        assert share[f"one_hot{where}"].tolist() == [1] * K + [0] * (E - K)
    # of two draws without replacement with odds 1, 1/2, …: first, or second after another
    odds = (1 / torch.arange(1, E + 1)).double()
    odds = odds / odds.sum()
    exact = odds[0] + (odds[1:] * odds[0] / (1 - odds[1:])).sum()
    assert share["zipf"][0].item() == pytest.approx(exact.item(), abs=0.03)


def test_bars_are_of_uniform_routing():
    uniform, skewed, earlier = ({"case": {"tokens": 1, "routing": name}} for name in ("uniform", "zipf", ""))
    del earlier["case"]["routing"]  # a result of before there were others
    assert find({"plan": [skewed, uniform, earlier]}, "plan", tokens=1) == [uniform, earlier]


def test_one_round_has_no_spread():
    with pytest.raises(ValueError, match="rounds must be at least 2, so that there is a spread, got 1"):
        time_alternately({"a": lambda: None}, rounds=1)


def test_whole_models_are_compared_with_transformers_and_dense_ones(tiny_run):
    (path,) = tiny_run.glob("*/*_end_to_end.json")
    rows = json.loads(path.read_text())["rows"]
    ours = {"moe_runtime", "transformers_moe_runtime", "transformers_accelerated"}
    dense = {"dense_active_flops", "dense_width"}
    transformers = {f"transformers_{name}" for name in ("eager", "grouped_mm", "batched_mm")}
    assert [row["case"]["phase"] for row in rows] == ["train_step", "prefill", "decode"] * 2
    for row in rows:
        assert set(row["timings"]) == ours | dense | transformers, row["not_timed"]
        assert set(row["errors"]) == ours | transformers
        formula, counter, phase = row["formula_flops"], row["flops"], row["case"]["phase"]
        assert set(counter) == ours | dense
        for name in counter:
            # backward makes the scores once more: 8 * 8 of them, of 4 heads of width 8
            extra = 2 * 8 * 8 * 4 * 8 if phase == "train_step" else 0
            assert counter[name] == formula[name] + extra
            seconds = row["timings"][name]["median_s"]
            assert row["flops_per_s"][name] == pytest.approx(formula[name] / seconds)
            assert row["bytes_per_s"][name] == pytest.approx(row["formula_bytes"][name] / seconds)
            floor = max(
                formula[name] / row["product_flops_per_s"],
                row["formula_bytes"][name] / row["copy_bytes_per_s"],
            )
            assert row["floor_share"][name] == pytest.approx(floor / seconds)
        assert formula["dense_active_flops"] == pytest.approx(formula["moe_runtime"], rel=0.02)
        assert formula["dense_width"] < 0.8 * formula["moe_runtime"]
        assert "percentiles" not in row, "there are too few rounds for them"


def test_pytest_benchmark_has_the_samples_of_each_implementation_and_what_a_reader_needs(tiny_run):
    content = json.loads((tiny_run / "samples.json").read_text())
    rows = [row for path in sorted(tiny_run.glob("*/*.json")) for row in json.loads(path.read_text())["rows"]]
    assert len({entry["fullname"] for entry in content["benchmarks"]}) == len(content["benchmarks"])
    assert len(content["benchmarks"]) == sum(len(row["timings"]) for row in rows)
    (path,) = tiny_run.glob("*/*_grouped_gemm.json")
    ours = [entry for entry in content["benchmarks"] if entry["group"].startswith("grouped_gemm ")]
    written = [(row, name) for row in json.loads(path.read_text())["rows"] for name in row["timings"]]
    for entry, (row, name) in zip(ours, written, strict=True):
        assert entry["name"].endswith(f"[{name}]")
        assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == 3
        assert row["timings"][name]["median_s"] == statistics.median(entry["stats"]["data"])
        info = entry["extra_info"]
        assert info["suite"] == "grouped_gemm"
        assert {field: info[field] for field in row["case"]} == row["case"]
        assert [info[field] for field in ("useful_flops", "bytes")] == [row["useful_flops"], row["bytes"]]
        assert info["flops_per_s"] == row["flops_per_s"][name]
        assert info["device"] == content["machine_info"]["device"]
        assert {"commit", "dirty"} <= set(info)
    assert content["machine_info"]["versions"]["torch"]


def test_suites_run_without_pytest_benchmark():
    suite = ("pytest", "-q", "benchmarks/bench_combine.py", "--tiny")
    assert "benchmark '" not in run_tests(*suite, "-p", "no:benchmark")
    hand_over(None, "group", {"ours": Timing.of([1.0, 2.0])}, {"ours": {}})


def test_a_disabled_plugin_is_given_nothing():
    disabled = SimpleNamespace(disabled=True, name="bench", fullname="bench")
    hand_over(disabled, "group", {"ours": Timing.of([1.0, 2.0])}, {"ours": {}})
    assert (disabled.name, hasattr(disabled, "group")) == ("bench", False)


def test_a_row_has_percentiles_where_there_are_samples_enough():
    timings = {
        name: Timing.of([scale * n for n in range(1, 101)]) for name, scale in (("a", 1.0), ("b", 2.0))
    }
    row = compared(timings, "a")
    assert row["percentiles"]["b"] == {"p50_s": 100.0, "p90_s": 180.0, "p99_s": 198.0}
    assert row["ratios"] == {"a": 1.0, "b": 2.0}
    assert row["timings"]["a"] == {"median_s": 50.5, "q1_s": 25.75, "q3_s": 75.25, "rounds": 100}
    fewer = timings | {"b": Timing.of([1.0] * 99)}
    assert "percentiles" not in compared(fewer, "a")


def test_percentiles_are_samples():
    timing = Timing.of([float(n) for n in range(200, 0, -1)], calls=2)
    assert timing.percentiles() == {"p50_s": 50.0, "p90_s": 90.0, "p99_s": 99.0}
    assert Timing.of([3.0, 1.0]).percentiles() == {"p50_s": 1.0, "p90_s": 3.0, "p99_s": 3.0}
