"""What a result file must name so that a reader can trust it: device, versions, commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """Device, cores, threads, versions, commit and time, as JSON values.

    `commit` is None outside a git checkout; `dirty` says whether the checkout had uncommitted changes.
    """
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": gpu or _cpu_name(),
        "kind": "gpu" if gpu else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": _versions(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(status) if status is not None else None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_folder(machine: dict[str, Any]) -> str:
    """Folder name of this device's results: `nvidia-h100-80gb-hbm3`, `cpu-amd-epyc-2-cores`."""
    cpu = f"cpu {machine['device']} {machine['cores']} cores"
    name = machine["device"] if machine["kind"] == "gpu" else cpu
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def keep_freed_memory() -> bool:
    """Have glibc's allocator keep what this process frees instead of returning it to the system.

    PyTorch's CPU tensors of some MB are otherwise made of fresh pages in every step, each with a page fault:
    a tenth of a training step. For programs that do nothing but run a model; never called on import. (glibc
    before 2.38 cannot reuse every aligned block, which leaves about half of the faults.)

    Returns:
        Whether the allocator took the setting; False where it is not glibc's.
    """
    import ctypes

    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
