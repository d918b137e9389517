"""torch.compile with a symbolic number of tokens: one graph, no recompilation, forward and backward."""

import warnings
from collections.abc import Callable

import pytest
import torch
from attention_mixes import make_inputs, mix
from inputs import DEVICE, normal
from moe_runtime_kernels import expert_ffn, gathered_grouped_gemm, grouped_gemm, make_plan
from tiny_models import BAM, BAM_SHARED_KV_TOP_K, BAM_TOP_K, MOE, assert_equal_up_to_rounding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moe_runtime.block import Block
from moe_runtime.hf import MoeRuntimeConfig

E, K, D, F = 5, 2, 16, 12
TOKENS = (12, 7, 1000, 3)


def products(x: Tensor, up: Tensor, down: Tensor, expert: Tensor) -> Tensor:
    plan = make_plan(expert, E)
    return grouped_gemm(gathered_grouped_gemm(x, up, plan).relu(), down, plan)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    return expert_ffn(x, gate_up, down, weight, make_plan(expert, E))


def drawn_experts(T: int) -> Tensor:
    return torch.rand(T, E, generator=torch.Generator().manual_seed(T)).argsort(1)[:, :K].int().to(DEVICE)


def make_products(T: int) -> dict[str, Tensor]:
    weights = {"up": normal(E, F, D, seed=1), "down": normal(E, D, F, seed=2)}
    return {"x": normal(T, D), **weights, "expert": drawn_experts(T)}


def make_experts(T: int) -> dict[str, Tensor]:
    weights = {"gate_up": normal(E, 2 * F, D, seed=1), "down": normal(E, D, F, seed=2)}
    gates = {"weight": normal(T, K, seed=3).softmax(1), "expert": drawn_experts(T)}
    return {"x": normal(T, D), **weights, **gates}


def make_mix(T: int) -> dict[str, Tensor]:
    return make_inputs(T, 2, 3, 4, D, torch.float32)


def with_gradients(fn: Callable[..., Tensor], inputs: dict[str, Tensor], T: int) -> list[Tensor]:
    """Output and gradients; an axis of size T is symbolic from the first call on."""
    leaves = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    for leaf in leaves.values():
        if leaf.shape[0] == T:
            torch._dynamo.mark_dynamic(leaf, 0)
    y = fn(**leaves)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, normal(*y.shape, seed=9))]


def assert_one_graph(
    calls: Callable[[Callable], list[tuple[list[Tensor], list[Tensor]]]], fn: Callable
) -> None:
    """`calls(compiled)` returns pairs of compiled and eager results, for several T."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=True):
        # raised inside torch, where Dynamo makes an instance of every autograd.Function it meets
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        for compiled, eager in calls(torch.compile(fn, fullgraph=True, backend=counter)):
            for number, (actual, expected) in enumerate(zip(compiled, eager, strict=True)):
                assert_equal_up_to_rounding(str(number), actual, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("fn", "make"),
    [
        pytest.param(products, make_products, id="grouped_gemm"),
        pytest.param(experts, make_experts, id="expert_ffn"),
        pytest.param(mix, make_mix, id="attention_mix"),
    ],
)
def test_operations(fn, make):
    def calls(compiled):
        return [(with_gradients(compiled, make(T), T), with_gradients(fn, make(T), T)) for T in TOKENS]

    assert_one_graph(calls, fn)


@pytest.mark.parametrize(
    "kind",
    [MOE, BAM, BAM_TOP_K, BAM_SHARED_KV_TOP_K],
    ids=["moe", "soft-attention", "top-k-attention", "top-k-attention-shared-kv"],
)
def test_layers(kind):
    """Router, plan, experts and attention with all parameters' gradients; batch and length are symbolic."""
    torch.manual_seed(0)
    config = MoeRuntimeConfig(**kind).model_config()
    block = Block(config.block_config(0)).to(DEVICE).train()
    parameters = list(block.parameters())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2)

    def forward(x_BLD):
        out = block(x_BLD)
        return out.x_BLD, out.balance_loss + out.z_loss

    def step(fn, batch, length):
        x_BLD = normal(batch, length, config.hidden_size).requires_grad_()
        torch._dynamo.mark_dynamic(x_BLD, 0)
        torch._dynamo.mark_dynamic(x_BLD, 1)
        y_BLD, loss = fn(x_BLD)
        grads = torch.autograd.grad(y_BLD.square().sum() + loss, [x_BLD, *parameters])
        return [y_BLD.detach(), *grads]

    def calls(compiled):
        sizes = [(2, 9), (3, 5), (4, 40)]
        return [(step(compiled, *size), step(forward, *size)) for size in sizes]

    assert_one_graph(calls, forward)
