"""How fast an expert layer could be at best: its useful FLOPs and the bytes that it must move.

FLOPs as the field counts them, 2 per multiply-add of the products over all N = T * K rows and nothing else: a
gated expert's forward is 6 N D F, its backward twice that. Padding of tiles is not useful.

Bytes, with every product's operands read once and its results written once, elements of 2 bytes unless said:
the weights of the experts that have rows; for each row x as gathered, h when it is kept, a written and read,
and the expert's output written and read; y. Backward reads and writes what `docs/kernels.md` lists.
"""

from dataclasses import dataclass

import torch

from benchmarks.alternate import time_alternately
from benchmarks.shapes import ExpertShape


@dataclass(frozen=True)
class Work:
    """Useful FLOPs of a call, and the bytes that it must read and write."""

    flops: int
    nbytes: int

    def floor_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """No call can be faster on a device of these measured speeds."""
        return max(self.flops / flops_per_s, self.nbytes / bytes_per_s)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)


def product_work(N: int, I: int, O: int, active: int, itemsize: int = 2) -> Work:
    """Rows of `active` experts times their matrices."""
    return Work(2 * N * I * O, itemsize * (N * (I + O) + active * I * O))


def product_grads_work(N: int, I: int, O: int, active: int, E: int, itemsize: int = 2) -> Work:
    """Both gradients of such a product; all E matrices of the weights' gradient are written."""
    dx = Work(2 * N * I * O, itemsize * (N * (I + O) + active * I * O))
    return dx + Work(2 * N * I * O, itemsize * (N * (I + O) + E * I * O))


def expert_forward_work(T: int, shape: ExpertShape, active: int, *, keeps_h: bool, itemsize: int = 2) -> Work:
    """A gated expert layer's forward; training keeps h for backward."""
    N, D, F = T * shape.K, shape.D, shape.F
    rows = N * (3 * D + (4 if keeps_h else 2) * F) + T * D
    return Work(6 * N * D * F, itemsize * (rows + 3 * active * D * F))


def expert_backward_work(T: int, shape: ExpertShape, active: int, itemsize: int = 2) -> Work:
    """All its gradients: dy gathered twice, x gathered once, dx's rows written and read; h, dh and w * a."""
    N, D, F = T * shape.K, shape.D, shape.F
    rows = N * (5 * D + 10 * F) + T * D
    return Work(12 * N * D * F, itemsize * (rows + 3 * (active + shape.E) * D * F))


def matmul_speed(device: str, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOPs per second of a square product of random numbers; zeros run faster than any data."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = time_alternately({"matmul": lambda: a @ b}, rounds=10)["matmul"]
    return 2 * size**3 / timing.median_s
