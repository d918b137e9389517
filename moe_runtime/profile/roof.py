"""How fast this device multiplies and moves memory, measured, to hold a model's FLOPs and bytes against."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROUNDS = 5
ENOUGH_S = 1.0  # on a CPU no round starts later: one product can take seconds there in float16
PRODUCT = {"cpu": 1024, "cuda": 8192}  # side of the product
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes; more than any cache


@dataclass(frozen=True, kw_only=True)
class Roof:
    """FLOPs per second of a large square product, and bytes read and written per second by a copy."""

    flops_per_s: float
    bytes_per_s: float


def measure_product(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the large square product alone."""
    side = PRODUCT[device.type]
    generator = torch.Generator(device).manual_seed(0)
    # random: zeros are multiplied faster than any data
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _median_seconds(lambda: a @ b, device)


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Medians of a few rounds, in the dtype of the model; on a CPU of fewer if they are slow."""
    copied = COPIED[device.type]
    generator = torch.Generator(device).manual_seed(0)
    # random: zeros are copied faster than any data
    source = torch.randint(2**31, (copied // 4,), generator=generator, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    return Roof(
        flops_per_s=measure_product(device, dtype),
        bytes_per_s=2 * copied / _median_seconds(lambda: target.copy_(source), device),
    )


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    on_gpu = device.type == "cuda"  # its first product may wait for libraries, so that it never counts
    seconds: list[float] = []
    while len(seconds) <= ROUNDS and (on_gpu or sum(seconds) < ENOUGH_S):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:] or seconds)  # the first one warms up
