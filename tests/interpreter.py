"""Run the operations' Triton kernels on CPU tensors, in Triton's interpreter, behind the public functions."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from moe_runtime_kernels._dispatch import KERNELS, load_launcher

needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1",
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


@pytest.fixture
def kernels_on_cpu() -> Iterator[None]:
    """Every operation that has kernels runs them."""
    with interpreted():
        yield
