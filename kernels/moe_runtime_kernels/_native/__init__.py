"""Compiled code for the CPU: C in this folder, built by the machine's own compiler when first called.

Like Triton's kernels it is compiled where it runs, for that processor, and kept: in MOE_RUNTIME_CACHE, or
`moe-runtime` under XDG_CACHE_HOME or ~/.cache. Where there is no compiler, or no such processor, PyTorch's
operations do the same; `MOE_RUNTIME_NATIVE=0` asks for those.
"""

import ctypes
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("grouped_rows.c")
BLOCK_ROWS = 32  # of the source
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
DTYPE_FLAGS: dict[torch.dtype, tuple[str, ...]] = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}
SECONDS = 60  # that the compiler may take
_Part = tuple[int, int, int]


@cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty on other systems."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The code compiled for a dtype, or None where it cannot be; a warning has said why if it should."""
    if (
        dtype not in DTYPE_FLAGS
        or os.environ.get("MOE_RUNTIME_NATIVE", "1") == "0"
        or platform.machine() != "x86_64"
    ):
        return None
    openmp, compiler = _loaded_openmp(), _compiler()
    if openmp is None or compiler is None or not {"avx2", "fma"} <= processor_flags():
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler, (*FLAGS, *DTYPE_FLAGS[dtype]), openmp)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"moe_runtime: {compiler} could not build {SOURCE.name}, so that PyTorch's slower products serve "
            f"an expert's few rows; MOE_RUNTIME_NATIVE=0 turns this off. It said: {said.strip()}",
            stacklevel=2,
        )
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.moe_runtime_grouped_rows.argtypes = [
        *(pointer, size, pointer, size, size, pointer, size, pointer, size),
        *(ctypes.c_char_p, size, size, size, ctypes.c_int32),
    ]
    return loaded


def _compiler() -> str | None:
    named = os.environ.get("CC")
    return next(
        (found for name in (named, "gcc", "clang", "cc") if name and (found := shutil.which(name))), None
    )


def _loaded_openmp() -> str | None:
    """The path of PyTorch's own OpenMP: with another one there would be two teams of threads."""
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8") if maps.exists() else ""
    found = re.search(r"/\S*/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so[^/\n]*$", text, re.MULTILINE)
    return found[0] if found else None


def _built(compiler: str, flags: Sequence[str], openmp: str) -> Path:
    """The library, from the cache or compiled now."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    what = (SOURCE.read_text(encoding="utf-8"), flags, version.stdout, openmp, sorted(processor_flags()))
    name = f"{SOURCE.stem}-{sha256(repr(what).encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            out = Path(scratch) / name
            command = [compiler, *flags, str(SOURCE), "-o", str(out), openmp]
            subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
            out.replace(folder / name)  # whole or not at all, whoever else compiles it now
    return folder / name


def _cache_folder() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("MOE_RUNTIME_CACHE") or Path(cache_home) / "moe-runtime")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def grouped_rows(
    x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, parts: Sequence[_Part], out_RO: Tensor
) -> None:
    """Rows of experts times their matrices: out[r] = weight[e] @ x[r] + bias[e], in float32, rounded once.

    The bits of a row depend on no other row.

    Args:
        x_RI, weight_EOI, bias_EO, out_RO: of one dtype, bfloat16 or float32, on the CPU; values of a row lie
            side by side, rows at any distance.
        parts: (expert, its first row, number of rows).
    """
    compiled = library(x_RI.dtype)
    assert compiled is not None
    table: list[int] = []
    for expert, first, rows in parts:
        for start in range(first, first + rows, BLOCK_ROWS):
            table += (expert, start, min(BLOCK_ROWS, first + rows - start))
    _, O, I = weight_EOI.shape
    failed = compiled.moe_runtime_grouped_rows(
        *(x_RI.data_ptr(), x_RI.stride(0)),
        *(weight_EOI.data_ptr(), weight_EOI.stride(0), weight_EOI.stride(1)),
        *((None, 0) if bias_EO is None else (bias_EO.data_ptr(), bias_EO.stride(0))),
        *(out_RO.data_ptr(), out_RO.stride(0)),
        *(struct.pack(f"{len(table)}q", *table), len(table) // 3, O, I, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"grouped_rows: no memory for {BLOCK_ROWS} rows of {I} values in float32")
