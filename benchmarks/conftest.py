"""The `compare` fixture: check that all answers agree, time the callables in turns, keep the row."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_runtime_kernels.flop_formulas import register_flop_formulas
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alternate import Timing, captured, copy_bandwidth, time_alternately
from moe_runtime.machine import describe_machine, device_folder

ROWS: dict[str, list[dict[str, Any]]] = {}
OURS = "moe_runtime"
LAUNCHES = 50  # per graph; what starting one costs the host is divided by them


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


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(scope="session")
def copy_speed(request) -> float:
    """Bytes per second of a copy on the device that the benchmarks run on, measured in this session."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return copy_bandwidth(device, 2**20 if request.config.getoption("--tiny") else 2**28)


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
        return time_alternately(fns, rounds), {}
    replays, refused = {}, {}
    for name, fn in fns.items():
        try:
            replays[name] = captured(fn, LAUNCHES)
        except RuntimeError as error:
            if name == OURS:
                raise
            refused[name] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    return time_alternately(replays, rounds, calls=LAUNCHES), refused


@pytest.fixture
def compare(request, tiny, copy_speed):
    """compare(suite, case, fns, check=...): one row of medians, spreads, FLOPs and ratios to the first.

    `nbytes` is for operations that move data: what must be read and written at least. They are timed without
    the host's part, and the row says what share of a copy's speed they reach.
    """

    def run(
        suite: str,
        case: dict[str, Any],
        fns: Mapping[str, Callable[[], Any]],
        *,
        check: Callable[[str, Any], None],
        rounds: int = 30,
        nbytes: int | None = None,
    ) -> dict[str, float]:
        for name, fn in fns.items():
            check(name, fn())  # a fast wrong answer fails here and reports no time
        flops = {name: count_flops(fn) for name, fn in fns.items()}
        rounds = 3 if tiny else rounds
        moved: dict[str, Any] = {}
        if nbytes is None:
            timings = time_alternately(fns, rounds)
        else:
            check_repeats(fns[OURS])
            timings, refused = time_launches(fns, rounds)
            speeds = {name: nbytes / timing.median_s for name, timing in timings.items()}
            moved = {
                "bytes": nbytes,
                "bytes_per_s": speeds,
                "copy_bytes_per_s": copy_speed,
                "copy_share": {name: speed / copy_speed for name, speed in speeds.items()},
                "not_timed": refused,
            }
        first = next(iter(fns))
        ratios = {name: timing.median_s / timings[first].median_s for name, timing in timings.items()}
        ROWS.setdefault(suite, []).append(
            {
                "case": case,
                "timings": {name: asdict(timing) for name, timing in timings.items()},
                "flops": flops,
                "ratio_to": first,
                "ratios": ratios,
                **moved,
            }
        )
        return ratios

    return run


def pytest_sessionfinish(session):
    folder = session.config.getoption("--results")
    if folder is None or not ROWS:
        return
    machine = describe_machine()
    target = Path(folder) / device_folder(machine)
    target.mkdir(parents=True, exist_ok=True)
    commit = (machine["commit"] or "nocommit")[:7]
    for suite, rows in ROWS.items():
        path = target / f"{datetime.now(UTC):%Y-%m-%d}_{commit}_{suite}.json"
        path.write_text(
            json.dumps({"suite": suite, "machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
        print(f"\nwrote {path}")
