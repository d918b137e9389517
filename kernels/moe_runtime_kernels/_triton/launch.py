"""What every kernel file shares: launch options, and how a kernel waits for the one before it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Devices that share a launch table. cuda80: shared memory for 99 KB per block, which any NVIDIA GPU since
# Ampere has; cuda90, cuda100: data-centre Hopper and Blackwell with 227 KB; hip: AMD's 64 KB.
FAMILIES = ("cuda80", "cuda90", "cuda100", "hip")
# those with a tensor memory accelerator (TMA) and programmatic dependent launch
SINCE_HOPPER = ("cuda90", "cuda100")

# bytes of an element of the dtypes that products are compiled for, by Triton's names
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def device_family(device: torch.device) -> str:
    """The member of FAMILIES that a device belongs to; the CPU's interpreter counts as Hopper."""
    if device.type != "cuda":
        return "cuda90"
    if torch.version.hip:
        return "hip"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "cuda90", 10: "cuda100"}.get(major, "cuda80")


def aligned_to_16(widths: tuple[int, ...], *tensors: Tensor) -> bool:
    """Whether rows of these widths, and the tensors themselves, start at multiples of 16 bytes or more."""
    return all(width % 16 == 0 for width in widths) and all(x.data_ptr() % 16 == 0 for x in tensors)


def check_16_or_32_bits(op: str, x: Tensor) -> None:
    """Products of float64 have a reference only."""
    if x.dtype == torch.float64:
        raise ValueError(f"{op}: on a GPU x must be bfloat16, float16 or float32, got float64")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a kernel is launched. `pdl`: programmatic dependent launch.

    With `pdl`, a kernel may start while the one before it still runs; it then waits on the device for that
    one's results. NVIDIA GPUs of compute capability 9.0 and newer.
    """

    num_warps: int = 4
    num_stages: int = 1
    pdl: bool = False

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of a launch; PDL of the kernel and of the launcher belong together."""
        keywords: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**keywords, "PDL": self.pdl, **({"launch_pdl": True} if self.pdl else {})}


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Before the first load of what an earlier kernel wrote."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def allow_next_kernel(PDL: tl.constexpr):
    """After the last work that the next kernel need not overlap; it waits for all stores anyway."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One configuration that a launch can have, for compiling ahead of time.

    Args:
        kernel: the jitted function.
        label: what tells it from the kernel's other configurations, e.g. "bf16 E=128 K=8".
        signature: Triton type of each run-time argument, e.g. "*bf16" or "i32", in the kernel's order.
        constexprs: value of each compile-time argument except PDL, which `options` knows.
        families: of the devices that it is launched on.
        divisible: arguments that are multiples of 16 whenever it is launched, pointers included.
    """

    kernel: Any
    label: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: Options
    families: tuple[str, ...] = FAMILIES
    divisible: tuple[str, ...] = ()


def for_families(compilations_of: Callable[[str], Iterable[Compilation]]) -> list[Compilation]:
    """What is launched on each family's devices; equal ones are one compilation, with all their families."""
    found: dict[str, tuple[Compilation, list[str]]] = {}
    for family in FAMILIES:
        for made in compilations_of(family):
            if made.options.pdl and family not in SINCE_HOPPER:
                continue
            families = found.setdefault(repr(made), (made, []))[1]
            if family not in families:
                families.append(family)
    return [replace(made, families=tuple(families)) for made, families in found.values()]
