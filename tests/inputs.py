"""Routing patterns for operations on routed rows, and comparisons of results and gradients."""

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from close import assert_close_to_exact
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]


class Routing(NamedTuple):
    """T tokens choose K of E experts; `kind` says how."""

    T: int
    K: int
    E: int
    kind: str = "uniform"


# all keep some choice; no tokens and no choice kept give all-zero results and have tests of their own
PATTERNS = [
    pytest.param(Routing(64, 2, 8), id="uniform"),
    pytest.param(Routing(37, 3, 5), id="nothing-a-power-of-two"),
    pytest.param(Routing(40, 2, 6, "empty"), id="an-empty-expert"),
    pytest.param(Routing(33, 2, 7, "one"), id="all-tokens-on-the-same-experts"),
    pytest.param(Routing(33, 1, 4, "one"), id="all-tokens-on-one-expert"),
    pytest.param(Routing(1, 2, 4), id="one-token"),
    pytest.param(Routing(29, 1, 4), id="one-choice"),
    pytest.param(Routing(17, 4, 4), id="every-expert-chosen"),
    pytest.param(Routing(9, 1, 1), id="a-single-expert"),
    pytest.param(Routing(41, 3, 6, "sentinels"), id="dropped-choices"),
]

SMALL = Routing(7, 2, 3, "sentinels")  # for numerical differentiation


def choose(routing: Routing, device: str = DEVICE) -> Tensor:
    """Distinct experts for each token, int32 [T, K]."""
    T, K, E, kind = routing
    g = torch.Generator().manual_seed(T * 1009 + K * 101 + E)
    order_TE = torch.rand(T, E, generator=g).argsort(1)
    if kind == "empty":  # expert 0 gets nothing
        order_TE = order_TE[order_TE != 0].view(T, E - 1)
    elif kind == "one":
        order_TE = order_TE[:1].expand(T, E)
    expert_TK = order_TE[:, :K].int()
    if kind == "sentinels":  # a third of the choices goes to experts that are not here
        expert_TK = torch.where(torch.rand(T, K, generator=g) < 1 / 3, E, expert_TK)
    return expert_TK.to(device)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=g)).to(dtype).to(DEVICE)


def run(
    fn: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    grad: Tensor,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output and all gradients of `fn(**inputs)` for the upstream gradient `grad`; in `dtype` if given."""
    leaves = {
        name: x.to(dtype or x.dtype).detach().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    out = fn(**leaves)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(out, tuple(wanted.values()), grad.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": dx for name, dx in zip(wanted, grads, strict=True)}}


def assert_matches(
    fn: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    make: Callable[[int], tuple[Mapping[str, Tensor], Tensor]],
    rows: int,
) -> None:
    """`fn` and all its gradients are as close to exact arithmetic as autograd through the definition is.

    `make(draw)` returns inputs and upstream gradient. The error of a few numbers is a matter of luck: draws,
    each of so many `rows`, are pooled until there are 64 rows.
    """
    pools: tuple[dict[str, list[Tensor]], ...] = ({}, {}, {})
    for draw in range(-(-64 // rows)):
        inputs, grad = make(draw)
        results = (
            run(fn, inputs, grad),
            run(definition, inputs, grad),
            run(definition, inputs, grad, torch.float64),
        )
        for pool, result in zip(pools, results, strict=True):
            for name, value in result.items():
                pool.setdefault(name, []).append(value)
    for name in pools[0]:
        assert_close_to_exact(name, *(torch.stack(pool[name]) for pool in pools))


def assert_same_bits(fn: Callable[..., Tensor], inputs: Mapping[str, Tensor], grad: Tensor) -> None:
    """Two runs agree in every bit."""
    first, second = run(fn, inputs, grad), run(fn, inputs, grad)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two runs"


def assert_equal_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual, expected), f"{name}: {(actual != expected).sum()} elements differ"


def assert_compiles_once(
    fn: Callable[..., Tensor],
    make: Callable[[int], tuple[Mapping[str, Tensor], Tensor]],
    compare: Callable[[str, Tensor, Tensor], None] = assert_equal_bits,
) -> None:
    """Compiled as one graph, forward and backward give eager's bits, and new T need no new graph.

    `make(T)` returns inputs and upstream gradient. The second T makes T symbolic; then nothing recompiles.
    `compare` is for layers: PyTorch's own operations may be rounded otherwise when they are compiled.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        # raised inside torch, where Dynamo makes an instance of every autograd.Function it meets
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        for T in (12, 7, 23, 16):
            inputs, grad = make(T)
            eager = run(fn, inputs, grad)
            for name, value in run(compiled, inputs, grad).items():
                compare(name, value, eager[name])
    assert counter.frame_count == 2, f"{counter.frame_count} graphs for four values of T"
