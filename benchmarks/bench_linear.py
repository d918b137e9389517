"""`moe_runtime.linear.Linear` after `set_float32_matmul_precision("high")` against PyTorch's own product."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_runtime.linear import Linear

SHAPES = {  # input width, output width
    "smollm2-135m-up": (576, 1536),
    "bam-small-query": (1024, 4096),
    "olmoe-1b-7b-expert-up": (2048, 2048),
}
TINY = {"tiny": (16, 24)}


@pytest.mark.parametrize("tokens", [1, 16, 512])
@pytest.mark.parametrize("shape", [*SHAPES, *TINY])
def bench_linear(compare, tiny, set_precision, shape, tokens):
    if (shape in TINY) != tiny:
        pytest.skip("the other size of shapes was asked for")
    set_precision("high")
    torch.manual_seed(0)
    layer = Linear(*{**SHAPES, **TINY}[shape], bias=False)
    x_TI = torch.randn(tokens, layer.in_features)
    with torch.no_grad():
        exact = F.linear(x_TI.double(), layer.weight.double())
        # sums of I products in float32, in whatever order
        tolerance = layer.in_features**0.5 * torch.finfo(torch.float32).eps * exact.abs().max()

        def check(name: str, out: Tensor) -> None:
            assert (out - exact).abs().max() <= tolerance, f"{name} differs from the exact product"

        compare(
            "linear",
            {"shape": shape, "tokens": tokens, "dtype": "float32"},
            {"torch": lambda: F.linear(x_TI, layer.weight), "moe_runtime": lambda: layer(x_TI)},
            check=check,
        )
