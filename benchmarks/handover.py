"""Hands the measurements of `compare` to pytest-benchmark, whose tables, JSON and comparison then know them.

pytest-benchmark times one function per test, one after the other; on a busy or throttled machine the first
and the last then meet different machines. So timing in turns stays here, and each implementation of a case
becomes a benchmark of its own there, with every sample. Nothing in the suites depends on the plugin.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.alternate import Timing


class WithoutPlugin:
    """The `benchmark` fixture of a session that has no pytest-benchmark."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None


def hand_over(benchmark: Any, group: str, timings: Mapping[str, Timing], info: Mapping[str, dict]) -> None:
    """One benchmark per implementation, named after the test and it.

    Args:
        benchmark: pytest-benchmark's fixture; None without the plugin, and with `--benchmark-disable` it
            takes nothing.
        group: what its tables are grouped by: the suite and the case.
        timings: implementation -> its measurements.
        info: implementation -> its `extra_info`.
    """
    if benchmark is None:
        return
    benchmark._mode = "compare(...)"  # it warns of a test that did not use it
    if benchmark.disabled:
        return
    name, fullname = benchmark.name, benchmark.fullname
    for implementation, timing in timings.items():
        benchmark.name, benchmark.fullname = f"{name}[{implementation}]", f"{fullname}[{implementation}]"
        benchmark.group, benchmark.extra_info = group, info[implementation]
        stats = benchmark._make_stats(iterations=1)
        for seconds in timing.samples_s:
            stats.update(seconds)
    benchmark.name, benchmark.fullname = name, fullname
