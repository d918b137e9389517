"""What every kernel file shares: launch options, and how a kernel waits for the one before it."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl


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
    """

    kernel: Any
    label: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: Options
