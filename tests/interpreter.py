"""Run the operations' Triton kernels on CPU tensors, in Triton's interpreter, behind the public functions."""

import mmap
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import pytest
import torch
from moe_runtime_kernels._dispatch import KERNELS, load_launcher

needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1",
)

needs_kernels = pytest.mark.skipif(
    find_spec("triton") is None
    or (os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available()),
    reason="needs Triton and a GPU or TRITON_INTERPRET=1",
)

# bfloat16 products are silently wrong in the interpreter; the kernels' own bfloat16 loads are exact there
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")]


@contextmanager
def interpreted(*names: str) -> Iterator[None]:
    """Inside, the named operations on CPU tensors are their kernels; without names, all that have any."""
    library = torch.library.Library("moe_runtime", "IMPL")
    try:
        for name in names or [full.partition("::")[2] for full in KERNELS]:
            library.impl(name, load_launcher(f"moe_runtime::{name}"), "CPU")
        yield
    finally:
        library._destroy()


def as_kernels(*names: str) -> AbstractContextManager[None]:
    """Inside, the named operations are their kernels: on a GPU as always, without one in the interpreter."""
    return nullcontext() if torch.cuda.is_available() else interpreted(*names)


@pytest.fixture
def kernels_on_cpu() -> Iterator[None]:
    """Every operation that has kernels runs them."""
    with interpreted():
        yield


def rows_in_reserved_memory(num_rows: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 rows [1, D] and [num_rows, D] at the same address, in memory that takes no room until written to.

    For kernels whose offsets exceed 32 bits: they get the first, because the interpreter may copy all that a
    tensor says it holds, and reach the rest by their row index.
    """
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap does not name before 3.13
    memory = mmap.mmap(-1, 2 * num_rows * D, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    rows = torch.frombuffer(memory, dtype=torch.float16).view(num_rows, D)
    return torch.frombuffer(memory, dtype=torch.float16, count=D).view(1, D), rows
