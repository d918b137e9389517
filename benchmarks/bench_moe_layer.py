"""A Mixture-of-Experts layer against dense layers matched on active FLOPs and on the width of one expert.

All experts are copies of one feed-forward network and the gates sum to 1, so all three layers compute the
same function: the dense one of one expert's width, and the one of K times that width, which holds K copies
and 1/K of each one's output.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.floor import Work, expert_forward_work
from benchmarks.shapes import ROUTINGS, ExpertShape
from moe_runtime.config import FeedForwardConfig, RouterConfig
from moe_runtime.feed_forward import DenseFeedForward, MoEFeedForward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # width, expert width, experts, experts per token
    "smollm2-135m-8x": (576, 1536, 8, 2),
    "granite-3.1-3b-a800m": (1536, 512, 40, 8),
    "olmoe-1b-7b": (2048, 1024, 64, 8),
}
TINY = {"tiny": (32, 16, 4, 2)}
SKEWED = ("smollm2-135m-8x", "tiny")  # timed with every routing, the others with a uniform one


def equal_layers(D: int, F: int, E: int, K: int, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The dense layer of one expert's width, the dense layer of the same active FLOPs, and the MoE layer."""
    torch.manual_seed(0)
    router = RouterConfig(hidden_size=D, num_experts=E, experts_per_token=K)
    width = DenseFeedForward(FeedForwardConfig(hidden_size=D, intermediate_size=F))
    active = DenseFeedForward(FeedForwardConfig(hidden_size=D, intermediate_size=K * F))
    moe = MoEFeedForward(FeedForwardConfig(hidden_size=D, intermediate_size=F, router=router))
    gate, up, down = (layer.weight.detach() for layer in (width.gate_proj, width.up_proj, width.down_proj))
    with torch.no_grad():
        active.gate_proj.weight.copy_(gate.repeat(K, 1))
        active.up_proj.weight.copy_(up.repeat(K, 1))
        active.down_proj.weight.copy_(down.repeat(1, K) / K)
        moe.experts.gate_up_proj.copy_(torch.cat((gate, up)).expand(E, -1, -1))
        moe.experts.down_proj.copy_(down.expand(E, -1, -1))
    layers = {"dense_active_flops": active, "dense_width": width, "moe": moe}
    return {name: layer.to(DEVICE, dtype).eval() for name, layer in layers.items()}


def works(tokens: int, shape: ExpertShape, experts_used: int, itemsize: int) -> dict[str, Work]:
    """Of each layer; the router's product comes on top of the experts'."""
    T, D, F = tokens, shape.D, shape.F
    experts = expert_forward_work(T, shape, experts_used, keeps_h=False, itemsize=itemsize)
    router = Work(2 * T * D * shape.E, itemsize * D * shape.E)
    return {
        "dense_active_flops": dense_work(T, D, shape.K * F, itemsize),
        "dense_width": dense_work(T, D, F, itemsize),
        "moe": experts + router,
    }


def dense_work(T: int, D: int, F: int, itemsize: int) -> Work:
    """x read, the activation written and read, y written."""
    return Work(6 * T * D * F, itemsize * (2 * T * (D + F) + 3 * D * F))


@torch.no_grad()
def route_like(layer: MoEFeedForward, routing: str) -> None:
    """Random scores of unit variance, and those of expert e lower by log(1 + e) (zipf), or K far above all.

    What is added is the weight of the first feature, which is 1 in every token.
    """
    weight_ED = layer.router.weight.normal_(std=layer.router.weight.shape[1] ** -0.5)
    e_E = torch.arange(weight_ED.shape[0], device=weight_ED.device)
    if routing == "zipf":
        weight_ED[:, 0] -= (1 + e_E).log()
    elif routing == "one_hot":
        weight_ED[: layer.router.config.experts_per_token, 0] += 100


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("shape", [*SHAPES, *TINY])
def bench_moe_layer(compare, tiny, shape, tokens, dtype, routing):
    if (shape in TINY) != tiny:
        pytest.skip("the other size of shapes was asked for")
    if routing != "uniform" and (shape not in SKEWED or tokens == 1):
        pytest.skip("one shape shows what routing does")
    D, F, E, K = {**SHAPES, **TINY}[shape]
    layers = equal_layers(D, F, E, K, dtype)
    route_like(layers["moe"], routing)
    x_BLD = torch.randn(1, tokens, D).to(DEVICE, dtype)
    x_BLD[..., 0] = 1

    def output(name: str) -> Tensor:
        layer = layers[name]
        return layer(x_BLD)[0] if isinstance(layer, MoEFeedForward) else layer(x_BLD)

    with torch.no_grad():
        expected = output("dense_width")
        experts_used = int(layers["moe"](x_BLD)[1].count_E.count_nonzero())
        # roundings to the stored type, and sums of K * F products in float32 in another order
        rounding = 8 * torch.finfo(dtype).eps + (K * F) ** 0.5 * torch.finfo(torch.float32).eps
        tolerance = rounding * expected.abs().max()

        def check(name: str, out: Tensor) -> None:
            assert (out - expected).abs().max() <= tolerance, f"{name} differs from the dense layer it equals"

        compare(
            "moe_layer",
            {
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "routing": routing,
                "experts": E,
                "k": K,
            },
            {name: lambda name=name: output(name) for name in layers},
            check=check,
            work=works(tokens, ExpertShape(D, F, E, K), experts_used, dtype.itemsize),
        )
