"""Time several callables in turns in one process, so that a noisy machine hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable over all rounds: median and the middle half."""

    median_s: float
    q1_s: float
    q3_s: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median_s=median, q1_s=q1, q3_s=q3, rounds=len(seconds))


def _seconds(fn: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_alternately(
    fns: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Seconds per callable; every round runs each once, in an order that rotates from round to round."""
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, so that there is a spread, got {rounds}")
    names = list(fns)
    for name in names * warmup:
        fns[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_seconds(fns[name]))
    return {name: Timing.of(values) for name, values in seconds.items()}
