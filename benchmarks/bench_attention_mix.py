"""`attention_mix` against the same in PyTorch: gates times outputs and one product, and a loop over experts.

No other library that we know of has this operation.
"""

import pytest
import torch
import torch.nn.functional as functional
from moe_runtime_kernels import attention_mix
from torch import Tensor

from benchmarks.floor import Work
from benchmarks.shapes import MIXES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (16, 1024, 8192) if DEVICE == "cuda" else (16, 128)
RESULTS = ("y", "do", "dgate", "dweight")
LARGEST_ERROR = {"moe_runtime": 1.0, "torch": 2.0, "loop": 8.0}  # rms, in units of bfloat16's eps


def in_one_product(o_TSAQ: Tensor, gate_TA: Tensor, weight_DC: Tensor) -> Tensor:
    return functional.linear((o_TSAQ * gate_TA[:, None, :, None].to(o_TSAQ.dtype)).flatten(1), weight_DC)


def in_a_loop(o_TSAQ: Tensor, gate_TA: Tensor, weight_DC: Tensor) -> Tensor:
    """Each expert's projection, then its gate; views of the weight are copied by the product if they must."""
    T, S, A, Q = o_TSAQ.shape
    matrices = weight_DC.view(-1, S, A, Q).unbind(2)
    y_TD = o_TSAQ.new_zeros(T, weight_DC.shape[0])
    for o_TSQ, gate_T, matrix in zip(o_TSAQ.unbind(2), gate_TA.unbind(1), matrices, strict=True):
        part_TD = functional.linear(o_TSQ.flatten(1), matrix.flatten(1))
        y_TD = y_TD + gate_T[:, None].to(part_TD.dtype) * part_TD
    return y_TD


def mix_work(T: int, C: int, A: int, D: int, direction: str) -> Work:
    """One product; backward has two more. bfloat16, gates float32."""
    forward = Work(2 * T * C * D, 2 * (T * C + C * D + T * D) + 4 * T * A)
    if direction == "forward":
        return forward
    return forward + Work(4 * T * C * D, 2 * (4 * T * C + 2 * C * D + 2 * T * D) + 12 * T * A)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("layout", MIXES)
def bench_attention_mix(compare, tiny, layout, tokens, direction):
    if (layout == "tiny") != tiny:
        pytest.skip("the other size of shapes was asked for")
    shape = MIXES[layout]
    S, A, Q, D = shape.S, shape.A, shape.Q, shape.D
    if DEVICE == "cpu" and D > 1024:
        pytest.skip("the sizes of another device were not asked for")
    T, C = 8 if tiny else tokens, S * A * Q
    g = torch.Generator(DEVICE).manual_seed(0)
    o_TSAQ = torch.randn(T, S, A, Q, generator=g, device=DEVICE).to(torch.bfloat16)
    gate_TA = torch.randn(T, A, generator=g, device=DEVICE).softmax(1)
    weight_DC = (C**-0.5 * torch.randn(D, C, generator=g, device=DEVICE)).to(torch.bfloat16)
    grad_TD = torch.randn(T, D, generator=g, device=DEVICE).to(torch.bfloat16)

    def call(fn, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_(direction != "forward") for tensor in inputs]
        y = fn(*leaves)
        if direction == "forward":
            return (y.detach(),)
        return (y.detach(), *torch.autograd.grad(y, leaves, grad_TD.to(y.dtype)))

    inputs = (o_TSAQ, gate_TA, weight_DC)
    exact = call(in_one_product, *(tensor.double() for tensor in inputs))

    def check(name: str, out: tuple[Tensor, ...]) -> dict[str, float]:
        errors = {}
        for result, value, right in zip(RESULTS, out, exact, strict=False):
            error = (value.double() - right).square().mean() / right.square().mean()
            errors[result] = error.sqrt().item()
        worst, most = max(errors.values()), LARGEST_ERROR[name] * torch.finfo(torch.bfloat16).eps
        assert worst <= most, f"{name} is off by {worst:.1e} of the exact result's rms"
        return errors

    fns = {"moe_runtime": attention_mix, "torch": in_one_product, "loop": in_a_loop}
    compare(
        "attention_mix",
        {"layout": layout, "direction": direction, "tokens": T, "slots": S, "experts": A}
        | {"slot_width": Q, "width": D, "dtype": "bfloat16"},
        {name: lambda fn=fn: call(fn, *inputs) for name, fn in fns.items()},
        check=check,
        rounds=20 if DEVICE == "cuda" else 5,
        work=mix_work(T, C, A, D, direction),
    )
