"""The `compare` fixture: check that all answers agree, time the callables in turns, keep the row."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from moe_runtime_kernels.flop_formulas import register_flop_formulas
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alternate import time_alternately
from moe_runtime.machine import describe_machine, device_folder

ROWS: dict[str, list[dict[str, Any]]] = {}


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


@pytest.fixture
def compare(request, tiny):
    """compare(suite, case, fns, check=...): one row of medians, spreads, FLOPs and ratios to the first."""

    def run(
        suite: str,
        case: dict[str, Any],
        fns: Mapping[str, Callable[[], Any]],
        *,
        check: Callable[[str, Any], None],
        rounds: int = 30,
    ) -> dict[str, float]:
        for name, fn in fns.items():
            check(name, fn())  # a fast wrong answer fails here and reports no time
        flops = {name: count_flops(fn) for name, fn in fns.items()}
        timings = time_alternately(fns, 3 if tiny else rounds)
        first = next(iter(fns))
        ratios = {name: timing.median_s / timings[first].median_s for name, timing in timings.items()}
        ROWS.setdefault(suite, []).append(
            {
                "case": case,
                "timings": {name: asdict(timing) for name, timing in timings.items()},
                "flops": flops,
                "ratio_to": first,
                "ratios": ratios,
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
