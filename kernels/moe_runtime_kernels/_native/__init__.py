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
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
BLOCK_ROWS = 32  # of grouped_rows.c
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
DTYPE_FLAGS: dict[torch.dtype, tuple[str, ...]] = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}
SECONDS = 60  # that the compiler may take
_Part = tuple[int, int, int]
_pointer, _size, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
# of each source, its function and the types of its arguments
_FUNCTIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "grouped_rows.c": (
        "moe_runtime_grouped_rows",
        (
            *(_pointer, _size, _pointer, _size, _size, _pointer, _size, _pointer, _size),
            *(ctypes.c_char_p, _size, _size, _size, _int),
        ),
    ),
    "plan.c": (
        "moe_runtime_plan",
        (_pointer, _int, *(_size,) * 3, *(_pointer,) * 5, ctypes.c_char_p, _size),
    ),
}


@cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty on other systems."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


@cache
def load(source: str, *flags: str) -> Callable[..., int] | None:
    """The function of a source, or None where it cannot be had; a warning has said why if it should."""
    if os.environ.get("MOE_RUNTIME_NATIVE", "1") == "0" or platform.machine() != "x86_64":
        return None
    openmp = _pytorchs_openmp()
    compiler = None if openmp is None else _compiler(openmp)
    if openmp is None or compiler is None or not {"avx2", "fma"} <= processor_flags():
        return None
    command, name = [compiler, *FLAGS, *flags, str(FOLDER / source), openmp], _FUNCTIONS[source][0]
    try:
        path = _kept(command)
        try:
            function = ctypes.CDLL(str(path))[name]
        except (OSError, AttributeError):  # damaged, or of another machine
            path.unlink(missing_ok=True)
            function = ctypes.CDLL(str(_kept(command)))[name]
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"moe_runtime: {compiler} could not build {source}, so that PyTorch's slower operations serve "
            f"instead; MOE_RUNTIME_NATIVE=0 turns this off. It said: {said.strip()}",
            stacklevel=2,
        )
        return None
    function.argtypes = _FUNCTIONS[source][1]
    return function


def rows_function(dtype: torch.dtype) -> Callable[..., int] | None:
    """The products of `grouped_rows` for a dtype, or None."""
    return load("grouped_rows.c", *DTYPE_FLAGS[dtype]) if dtype in DTYPE_FLAGS else None


def _compiler(openmp: str) -> str | None:
    """CC, or the first of the usual ones that compiles for the OpenMP at hand: Clang has none for GCC's."""
    is_gnus = Path(openmp).name.startswith("libgomp")
    for name in (os.environ.get("CC"), "gcc", "cc", *(() if is_gnus else ("clang",))):
        found = shutil.which(name) if name else None
        if found and not (is_gnus and "clang" in Path(found).resolve().name):
            return found
    return None


class _SymbolInfo(ctypes.Structure):
    """What dladdr says of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _pytorchs_openmp() -> str | None:
    """The path of the OpenMP that PyTorch runs on: another, if loaded, has a team of its own."""
    found = _SymbolInfo()
    try:
        threads = ctypes.CDLL(
            str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        ).omp_get_max_threads
        is_known = ctypes.CDLL(None).dladdr(threads, ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return os.fsdecode(found.file) if is_known and found.file else None


def _kept(command: Sequence[str]) -> Path:
    """What the command compiles, from the cache or made now."""
    compiler, *_, source, _ = command
    version = _run([compiler, "--version"])
    what = (Path(source).read_text(encoding="utf-8"), command[1:], version, sorted(processor_flags()))
    folder = _cache_folder()
    kept = folder / f"{Path(source).stem}-{sha256(repr(what).encode()).hexdigest()[:16]}.so"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / kept.name
            _run([*command, "-o", str(made)])
            with made.open("rb+") as file:
                os.fsync(file.fileno())
            made.replace(kept)  # whole or not at all, whoever else compiles it now
    return kept


def _run(command: Sequence[str]) -> str:
    run = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS, check=True
    )
    return run.stdout


def _cache_folder() -> Path:
    """Raises RuntimeError where nothing names a folder and there is no home."""
    named, cache_home = os.environ.get("MOE_RUNTIME_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else Path(cache_home or Path.home() / ".cache") / "moe-runtime"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


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
    function = rows_function(x_RI.dtype)
    assert function is not None
    table: list[int] = []
    for expert, first, rows in parts:
        for start in range(first, first + rows, BLOCK_ROWS):
            table += (expert, start, min(BLOCK_ROWS, first + rows - start))
    _, O, I = weight_EOI.shape
    failed = function(
        *(x_RI.data_ptr(), x_RI.stride(0)),
        *(weight_EOI.data_ptr(), weight_EOI.stride(0), weight_EOI.stride(1)),
        *((None, 0) if bias_EO is None else (bias_EO.data_ptr(), bias_EO.stride(0))),
        *(out_RO.data_ptr(), out_RO.stride(0)),
        *(struct.pack(f"{len(table)}q", *table), len(table) // 3, O, I, torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"grouped_rows: no memory for {BLOCK_ROWS} rows of {I} values in float32")


def plan(
    expert_TK: Tensor, num_experts: int, heights: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """The parts of a routing plan, int32, or None without compiled code; `expert_TK` is on the CPU."""
    function = load("plan.c")
    if function is None:
        return None
    expert_N = expert_TK.flatten()
    N, E = expert_N.shape[0], num_experts
    row_TK = expert_N.new_empty(expert_TK.shape, dtype=torch.int32)
    token_N, slot_N, offset_E = (row_TK.new_empty(size) for size in (N, N, E))
    tile_end_ME = row_TK.new_empty(len(heights), E)
    parts = (row_TK, token_N, slot_N, offset_E, tile_end_ME)
    failed = function(
        *(expert_N.data_ptr(), expert_N.dtype == torch.int64, N, expert_TK.shape[1], E),
        *(part.data_ptr() for part in parts),
        *(struct.pack(f"{len(heights)}i", *heights), len(heights)),
    )
    return None if failed else parts
