"""Time several callables in turns in one process, so that a noisy machine hits all of them alike."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable over all rounds: median and the middle half, and every one of them."""

    median_s: float
    q1_s: float
    q3_s: float
    rounds: int
    samples_s: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, seconds: list[float], calls: int = 1) -> "Timing":
        """Of one call, where each measurement is of so many `calls`."""
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
        q1, median, q3 = (quartile / calls for quartile in quartiles)
        samples = tuple(second / calls for second in seconds)
        return cls(median_s=median, q1_s=q1, q3_s=q3, rounds=len(seconds), samples_s=samples)

    def summary(self) -> dict[str, float]:
        """What a result file keeps."""
        return {name: getattr(self, name) for name in ("median_s", "q1_s", "q3_s", "rounds")}

    def percentiles(self) -> dict[str, float]:
        """p50, p90 and p99, each the smallest sample that so many percent of the samples do not exceed."""
        ordered = sorted(self.samples_s)
        return {f"p{n}_s": ordered[math.ceil(n / 100 * len(ordered)) - 1] for n in (50, 90, 99)}


def _call(fn: Callable[[], object]) -> tuple[object, float]:
    """What it returns, and its seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


def time_alternately(
    fns: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    calls: int = 1,
    before: Callable[[], object] = lambda: None,
    check: Callable[[str, object], object] | None = None,
) -> dict[str, Timing]:
    """Seconds per callable; every round runs each once, in an order drawn anew.

    Drawn, because what a call finds in the processor's caches depends on the call before it.

    Args:
        fns: callables by name.
        rounds: of all of them.
        warmup: rounds that are not timed.
        calls: what a callable stands for, as a replayed graph does; its seconds are divided by them.
        before: is called before each timed call, and not timed.
        check: is given the name and the result of each one's first call, and raises if that is wrong.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, so that there is a spread, got {rounds}")
    names = list(fns)
    unchecked = set() if check is None else set(names)

    def call(name: str) -> float:
        out, seconds = _call(fns[name])
        if check is not None and name in unchecked:
            check(name, out)
            unchecked.remove(name)
        return seconds

    for name in names * warmup:
        call(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    draws = random.Random(0)
    for _ in range(rounds):
        for name in draws.sample(names, len(names)):
            before()
            seconds[name].append(call(name))
    return {name: Timing.of(values, calls) for name, values in seconds.items()}


def cold_caches() -> Callable[[], object]:
    """A function that leaves other bytes in the processor's caches, as the rest of a model does."""
    other = torch.zeros(2 * _last_cache_bytes(), dtype=torch.uint8)
    return lambda: other.add_(1)


def _last_cache_bytes() -> int:
    """Of one processor's last cache; 64 MiB where the system does not say."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    found = [int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes]
    return max(found, default=64 * 2**20)


def captured(fn: Callable[[], object], launches: int, pool: Any = None) -> Callable[[], object]:
    """Replay `launches` calls from a CUDA graph: a lone short launch would time the host.

    Graphs with one `pool`, of torch.cuda.graph_pool_handle(), share their memory; one replays at a time.

    Raises:
        RuntimeError: `fn` does what a graph cannot hold, such as waiting for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the allocator, before anything is captured
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(launches):
            fn()
    return graph.replay


def copy_bandwidth(device: str, nbytes: int) -> float:
    """Bytes read and written per second by a copy of so many bytes on the device."""
    # random: zeros are copied faster than any data
    source = torch.randint(2**31, (nbytes // 4,), dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    timing = time_alternately({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    return 2 * nbytes / timing.median_s
