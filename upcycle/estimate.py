"""What a run will cost, said by a dry run: memory by its bound, time by a short copy to the output's disk."""

import os
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.plan import UpcyclePlan

# A sample this large has left the disk's first buffers behind, and takes a second at most.
_SAMPLE_BYTES = 64 * 2**20
_FIXED_BYTES = 300 * 10**6


@dataclass(frozen=True)
class Estimate:
    """`memory_bytes` is what the run stays below, `seconds` what a plain copy of so many bytes would take."""

    memory_bytes: int
    seconds: float
    bytes_per_s: float


def estimate(plan: UpcyclePlan, folder: Path) -> Estimate:
    """Write and remove a nameless file in an existing folder of the output's disk, and take its rate.

    Raises:
        UpcycleError: nothing can be written there.
    """
    rate = _copy_rate(folder, min(_SAMPLE_BYTES, plan.num_bytes))
    return Estimate(_memory(plan), plan.num_bytes / rate, rate)


def _memory(plan: UpcyclePlan) -> int:
    bound = 2 * max(task.num_bytes for task in plan.tasks) + _FIXED_BYTES
    if plan.recipe.router.data:  # the base runs on texts, in float32
        bound += 4 * sum(prod(tensor.shape) for tensor in plan.base.tensors.values())
    return bound


def _copy_rate(folder: Path, num_bytes: int) -> float:
    block = os.urandom(min(num_bytes, 2**20))
    start = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(-(-num_bytes // len(block))):
                file.write(block)
            os.fsync(file.fileno())
    except OSError as error:
        raise UpcycleError(f"{folder} cannot be written: {error.strerror}") from error
    return num_bytes / (time.perf_counter() - start)
