"""Grouped products by megablocks, for layers with `experts_backend="megablocks"`.

One function of it is used, `megablocks.grouped_gemm_util.ops.gmm`, the product of its dropless layer with
`mlp_impl="grouped"`; rows are moved and mixed by this project. It takes bfloat16 on a CUDA device, and wants
the rows per expert on the host, so that every forward waits for the device and no CUDA graph can hold it.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from moe_runtime_kernels import RoutingPlan
from torch import Tensor

from moe_runtime.optional import installed

DEVICES = ("cuda",)
INSTALL = (
    "pip install --no-build-isolation --no-deps megablocks==0.10.0 grouped_gemm==0.3.0 stanford-stk==0.7.1"
)


def load_gmm() -> Callable[..., Tensor]:
    """gmm(rows_NI, weight_EIO, rows_per_expert, trans_b=False) -> y_NO; weight_EOI with trans_b.

    Raises:
        ModuleNotFoundError: megablocks, or the grouped GEMM that it has as an extra, is not installed.
    """
    if installed("megablocks") is not None:
        operations = import_module("megablocks.grouped_gemm_util").ops
        if operations is not None:
            return operations.gmm
        missing = "the grouped GEMM of megablocks"
    else:
        missing = "megablocks"
    raise ModuleNotFoundError(
        f"experts_backend 'megablocks' needs {missing}, which is not installed; as it pins torch "
        f"2.7.0, install it in an environment of its own, with a CUDA compiler: {INSTALL}",
        name="megablocks",
    )


def rows_per_expert(plan: RoutingPlan) -> Tensor:
    """int64 [E] on the host. Rows of dropped choices, which are zeros, count for the last expert."""
    rows_E = plan.offset_E.diff(prepend=plan.offset_E.new_zeros(1)).long().cpu()
    rows_E[-1] += len(plan.token_N) - rows_E.sum()
    return rows_E


def check_tensors(x_TD: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless megablocks can take these."""
    if x_TD.device.type not in DEVICES:
        raise ValueError(
            f"x must be on a CUDA device with experts_backend 'megablocks', got {x_TD.device.type}; "
            "use experts_backend 'moe_runtime'"
        )
    for name, tensor in (("x", x_TD), ("gate_up_proj", weight)):
        if tensor.dtype != torch.bfloat16:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be bfloat16 with experts_backend 'megablocks', got {dtype}")
