"""The `compare` fixture: check that all answers agree, time the callables in turns, keep the row."""

import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime_kernels.flop_formulas import register_flop_formulas
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alternate import Timing, captured, cold_caches, copy_bandwidth, time_alternately
from benchmarks.floor import Work, matmul_speed
from benchmarks.handover import WithoutPlugin, hand_over
from benchmarks.peers import Peers, failure, installed_versions
from moe_runtime.machine import describe_machine, device_folder, keep_freed_memory

ROWS: dict[str, list[dict[str, Any]]] = {}
OURS = "moe_runtime"
LAUNCHES = 50  # per graph; what starting one costs the host is divided by them
GRAPH_S = 2e-3  # of graphs of long calls, which need fewer launches
ROUNDS = 30 if torch.cuda.is_available() else 12
# of a case's timed rounds, where more than FEWEST_ROUNDS were asked for: all suites together shall take a CPU
# ten minutes, one without instructions for bfloat16 too
BUDGET_S = 4.0
FEWEST_ROUNDS = 3
STARTED = pytest.StashKey[float]()
ROUNDS_FOR_PERCENTILES = 100  # fewer samples have no 99th percentile


def affordable(rounds: int, round_s: float) -> int:
    """So many of the asked-for `rounds` as BUDGET_S is enough for, and FEWEST_ROUNDS at least.

    All of them on a GPU, whose time is not `round_s`, and where percentiles are asked for.
    """
    if torch.cuda.is_available() or rounds >= ROUNDS_FOR_PERCENTILES:
        return rounds
    return min(rounds, max(FEWEST_ROUNDS, int(BUDGET_S / round_s)))


def warmup(rounds: int) -> int:
    """Rounds before the timed ones; the check and the counter of FLOPs are enough before a few long calls."""
    return 1 if rounds > FEWEST_ROUNDS else 0


def finite(name: str, errors: dict[str, float]) -> dict[str, float]:
    """The errors of an implementation's results; one that is not a number is no smaller than any limit."""
    assert all(map(math.isfinite, errors.values())), f"{name} is off by {errors}"
    return errors


def count_flops(fn: Callable[[], Any]) -> int:
    """FLOPs of one call by PyTorch's counter, with the formulas of our operations."""
    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def pytest_addoption(parser):
    parser.addoption(
        "--results", default=None, help="folder for the result files; none are written without it"
    )
    parser.addoption("--tiny", action="store_true", help="shapes of a second, to show that the suite runs")
    parser.addoption(
        "--no-peers",
        action="store_true",
        help="leave out other libraries, some of which tune themselves for minutes",
    )


def pytest_configure(config):
    config.stash[STARTED] = time.monotonic()
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(WithoutPlugin())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info):
    """What a result file says of the machine, but for what differs from run to run."""
    machine_info.update({name: machine()[name] for name in ("device", "kind", "threads", "versions")})


@pytest.fixture(autouse=True, scope="session")
def _freed_memory_is_kept():
    """For all that is compared; page faults are not what a benchmark is about."""
    keep_freed_memory()


@pytest.fixture
def set_precision():
    """`set_precision("high")`: of float32 products, until the benchmark ends."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(scope="session")
def copy_speed(request) -> float:
    """Bytes per second of a copy on the device that the benchmarks run on, measured in this session."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return copy_bandwidth(device, 2**20 if request.config.getoption("--tiny") else 2**28)


@pytest.fixture(scope="session")
def product_speed(request) -> Callable[[str], float]:
    """Dtype -> FLOPs per second of a large product on that device, measured once in this session."""
    gpu = torch.cuda.is_available()
    size = 256 if request.config.getoption("--tiny") else 8192 if gpu else 1024

    @cache
    def measure(dtype: str) -> float:
        return matmul_speed("cuda" if gpu else "cpu", size, getattr(torch, dtype))

    return measure


def check_repeats(fn: Callable[[], Any]) -> None:
    """Our operations never wait for the device, and give the same bits twice."""
    if torch.cuda.is_available():
        fn()  # compiles, which waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = fn(), fn()
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    pairs = [(first, second)] if isinstance(first, torch.Tensor) else zip(first, second, strict=True)
    for a, b in pairs:
        assert torch.equal(a, b), "two runs differ"


def time_launches(
    fns: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings, on a GPU of replayed graphs, and why others than ours could not be captured."""
    if not torch.cuda.is_available():
        return time_alternately(fns, rounds, warmup(rounds)), {}
    replays, refused = {}, {}
    for name, fn in fns.items():
        try:
            replays[name] = captured(fn, LAUNCHES)
        except RuntimeError as error:
            if name == OURS:
                raise
            refused[name] = f"cannot be captured: {str(error).splitlines()[0]}"
            torch.cuda.synchronize()
    return time_alternately(replays, rounds, calls=LAUNCHES), refused


def waits(fn: Callable[[], Any]) -> bool:
    """Whether a call waits for the device, which no graph can hold; a capture that fails may leave traces."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        fn()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def time_products(
    fns: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings, and how: "graph", or "call" for one that is timed with its host's part.

    Graphs hold so many launches as take GRAPH_S together, by the first timing of ours, and LAUNCHES at most.
    """
    if not torch.cuda.is_available():
        return time_alternately(fns, rounds, warmup(rounds)), dict.fromkeys(fns, "call")
    once = time_alternately({OURS: fns[OURS]}, rounds=3)[OURS].median_s
    launches = min(max(round(GRAPH_S / once), 1), LAUNCHES)
    replays: dict[str, Callable[[], Any]] = {}
    pool = torch.cuda.graph_pool_handle()
    for name, fn in fns.items():
        try:
            if not waits(fn):
                replays[name] = captured(fn, launches, pool)
        except RuntimeError as error:
            print(f"{name} cannot be captured: {error}")
            torch.cuda.synchronize()
    calls = {name: fn for name, fn in fns.items() if name not in replays}
    timings = time_alternately(replays, rounds, calls=launches) if replays else {}
    timings |= time_alternately(calls, rounds) if calls else {}
    return timings, {name: "graph" if name in replays else "call" for name in fns}


def peak_bytes(fn: Callable[[], Any]) -> int:
    """Bytes that a call needs on the GPU beyond what is there before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = fn()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def usable(peers: Peers, check: Callable[[str, Any], Any]) -> dict[str, str]:
    """Why some peers are not timed; those that fail or whose answers are wrong leave `peers.fns`.

    Our own answers and PyTorch's must be right; another library's fault is its own, and shown.
    """
    reasons = dict(peers.absent)
    for name, fn in list(peers.fns.items()):
        try:
            check(name, fn())
        except Exception as error:
            reasons[name] = failure("wrong" if isinstance(error, AssertionError) else "fails", error)
            del peers.fns[name]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return reasons


@pytest.fixture
def compare(request, tiny, benchmark):
    """compare(suite, case, fns, check=...): one row of medians, spreads, FLOPs and ratios to the first.

    `check` raises AssertionError for a wrong answer; errors that it returns are kept.
    `nbytes` is for operations that move data: what must be read and written at least. They are timed without
    the host's part, and the row says what share of a copy's speed they reach.
    `work` is for products: the row then has FLOPs per second, the share of the floor, and the GPU's memory.
    One per name is for whole models, each timed as it is called.
    `cold`: before each of these calls, the processor's caches hold nothing of it.
    `peers` are other libraries; each that is not timed is in the row with the reason.
    """

    def run(  # noqa: PLR0913 - what a row needs, by name
        suite: str,
        case: dict[str, Any],
        fns: Mapping[str, Callable[[], Any]],
        *,
        check: Callable[[str, Any], dict[str, float] | None],
        rounds: int = ROUNDS,
        nbytes: int | None = None,
        work: Work | Mapping[str, Work] | None = None,
        peers: Peers | None = None,
        cold: bool = False,
    ) -> dict[str, float]:
        errors: dict[str, dict[str, float]] = {}

        def checked(name: str, out: Any) -> None:
            found = check(name, out)
            if found is not None:
                errors[name] = finite(name, found)

        by_itself = isinstance(work, Work) or nbytes is not None
        for name, fn in fns.items() if by_itself else ():
            checked(name, fn())  # a fast wrong answer fails here and reports no time
        peers = allowed(peers, request)
        not_timed = usable(peers, checked)
        fns = {**fns, **peers.fns}
        # another library's operations may be more than the counter can follow
        start = time.perf_counter()
        flops = {name: count_flops(fn) for name, fn in fns.items() if name not in peers.fns}
        counted_s = time.perf_counter() - start  # of a call of each
        rounds = FEWEST_ROUNDS if tiny else affordable(rounds, counted_s)

        def unless_peer(name: str, out: Any) -> None:
            if name not in peers.fns:  # those have been checked
                checked(name, out)

        timings, refused, measured = measure(request, case, fns, unless_peer, rounds, nbytes, work, cold)
        if torch.cuda.is_available() and work is not None:
            measured["peak_bytes"] = {name: peak_bytes(fn) for name, fn in fns.items()}
        kept = {"flops": flops, "errors": errors, "not_timed": not_timed | refused, **measured}
        row = {"case": case, **compared(timings, next(iter(fns))), **kept}
        keep(request, suite, row)
        hand_over(benchmark, group_name(suite, case), timings, information(suite, row))
        return row["ratios"]

    return run


def compared(timings: Mapping[str, Timing], first: str) -> dict[str, Any]:
    """A row's medians and spreads, ratios to the first, and percentiles where there are samples enough."""
    row = {
        "timings": {name: timing.summary() for name, timing in timings.items()},
        "ratio_to": first,
        "ratios": {name: timing.median_s / timings[first].median_s for name, timing in timings.items()},
    }
    if all(timing.rounds >= ROUNDS_FOR_PERCENTILES for timing in timings.values()):
        row["percentiles"] = {name: timing.percentiles() for name, timing in timings.items()}
    return row


def measure(
    request,
    case: Mapping[str, Any],
    fns: Mapping[str, Callable[[], Any]],
    check: Callable[[str, Any], None],
    rounds: int,
    nbytes: int | None,
    work: Work | Mapping[str, Work] | None,
    cold: bool,
) -> tuple[dict[str, Timing], dict[str, str], dict[str, Any]]:
    """Timings, why some could not be timed, and what the row says of speeds.

    Whole models and layers are checked as they are timed: their calls are long.
    """
    copy_speed = request.getfixturevalue("copy_speed")
    if isinstance(work, Work):
        check_repeats(fns[OURS])
        timings, ways = time_products(fns, rounds)
        speeds = of_products(timings, work, copy_speed, speed_of_products(request, case))
        return timings, {}, {"timed_by": ways, **speeds}
    if nbytes is not None:
        check_repeats(fns[OURS])
        timings, refused = time_launches(fns, rounds)
        return timings, refused, of_moves(timings, nbytes, copy_speed)
    before = cold_caches() if cold else lambda: None
    timings = time_alternately(fns, rounds, warmup(rounds), before=before, check=check)
    if work is None:
        return timings, {}, {}
    return timings, {}, of_models(timings, work, copy_speed, speed_of_products(request, case))


def allowed(peers: Peers | None, request) -> Peers:
    """A copy, in which --no-peers has left all of them out."""
    peers = Peers() if peers is None else Peers(dict(peers.fns), dict(peers.absent))
    if request.config.getoption("--no-peers"):
        left_out = dict.fromkeys(peers.fns, "left out by --no-peers")
        peers = Peers(absent={**peers.absent, **left_out})
    return peers


def speed_of_products(request, case: Mapping[str, Any]) -> float:
    return request.getfixturevalue("product_speed")(case.get("dtype", "bfloat16"))


def of_products(
    timings: Mapping[str, Timing], work: Work, copy_speed: float, product_speed: float
) -> dict[str, Any]:
    """A row's part about FLOPs and the floor, from the medians and the device's measured speeds."""
    floor_s = work.floor_s(product_speed, copy_speed)
    return {
        "useful_flops": work.flops,
        "bytes": work.nbytes,
        "copy_bytes_per_s": copy_speed,
        "product_flops_per_s": product_speed,
        "floor_s": floor_s,
        "flops_per_s": {name: work.flops / timing.median_s for name, timing in timings.items()},
        "floor_share": {name: floor_s / timing.median_s for name, timing in timings.items()},
    }


def of_models(
    timings: Mapping[str, Timing], works: Mapping[str, Work], copy_speed: float, product_speed: float
) -> dict[str, Any]:
    """The same where every name has work of its own: FLOPs and bytes by formula, share of the floor."""
    timed = {name: (works[name], timing.median_s) for name, timing in timings.items()}
    return {
        "formula_flops": {name: work.flops for name, (work, _) in timed.items()},
        "formula_bytes": {name: work.nbytes for name, (work, _) in timed.items()},
        "copy_bytes_per_s": copy_speed,
        "product_flops_per_s": product_speed,
        "flops_per_s": {name: work.flops / seconds for name, (work, seconds) in timed.items()},
        "bytes_per_s": {name: work.nbytes / seconds for name, (work, seconds) in timed.items()},
        "floor_share": {
            name: work.floor_s(product_speed, copy_speed) / seconds for name, (work, seconds) in timed.items()
        },
    }


def of_moves(timings: Mapping[str, Timing], nbytes: int, copy_speed: float) -> dict[str, Any]:
    """A row's part about what is moved."""
    speeds = {name: nbytes / timing.median_s for name, timing in timings.items()}
    return {
        "bytes": nbytes,
        "bytes_per_s": speeds,
        "copy_bytes_per_s": copy_speed,
        "copy_share": {name: speed / copy_speed for name, speed in speeds.items()},
    }


def group_name(suite: str, case: Mapping[str, Any]) -> str:
    return " ".join([suite, *(f"{name}={value}" for name, value in case.items())])


def information(suite: str, row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> what pytest-benchmark keeps beside the samples: the case, FLOPs, bytes, device and commit."""
    shared = {name: row[name] for name in ("useful_flops", "bytes") if name in row}
    shared |= {name: machine()[name] for name in ("device", "commit", "dirty")}
    by_name = ("flops", "formula_flops", "formula_bytes", "flops_per_s", "bytes_per_s", "floor_share")
    by_name += ("copy_share", "peak_bytes", "errors", "percentiles")
    return {
        name: {"suite": suite, **row["case"], **shared}
        | {field: row[field][name] for field in by_name if name in row.get(field, {})}
        for name in row["timings"]
    }


@cache
def machine() -> dict[str, Any]:
    return describe_machine()


def result_path(folder: str, suite: str) -> Path:
    commit = (machine()["commit"] or "nocommit")[:7]
    name = f"{datetime.now(UTC):%Y-%m-%d}_{commit}_{suite}.json"
    return Path(folder) / device_folder(machine()) / name


def keep(request, suite: str, row: dict[str, Any]) -> None:
    ROWS.setdefault(suite, []).append(row)
    write_results(request.config.getoption("--results"), suite)
    items, seconds = request.session.items, time.monotonic() - request.config.stash[STARTED]
    medians = ", ".join(f"{name} {1e3 * timing['median_s']:.3g}" for name, timing in row["timings"].items())
    done = f"{items.index(request.node) + 1} of {len(items)}"
    print(
        f"[{seconds // 60:.0f}:{seconds % 60:02.0f}, {done}] {group_name(suite, row['case'])}: {medians} ms"
    )


def write_results(folder: str | None, suite: str) -> None:
    """Write a suite's rows so far, so that a run that is stopped leaves what it has measured.

    Cases of an earlier run into the same file stay where this one has not measured them again.
    """
    if folder is None:
        return
    path = result_path(folder, suite)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ROWS[suite]
    if path.exists():
        cases = [row["case"] for row in rows]
        earlier = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rows = [*rows, *(row for row in earlier if row["case"] not in cases)]
    content = {"suite": suite, "machine": machine(), "peers": installed_versions(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def pytest_sessionfinish(session):
    folder = session.config.getoption("--results")
    for suite in ROWS if folder is not None else ():
        print(f"\nwrote {result_path(folder, suite)}")
