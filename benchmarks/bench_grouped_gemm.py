"""`grouped_gemm`, the products of an expert layer on rows in expert order, and both its gradients."""

import pytest
import torch
from moe_runtime_kernels import gather_rows, grouped_gemm, make_plan
from torch import Tensor

from benchmarks import peers
from benchmarks.exact import make_layer
from benchmarks.floor import product_grads_work, product_work
from benchmarks.shapes import EXPERTS, expert_cases, skip_other_sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST_ERROR = 1.0  # rms, in units of bfloat16's eps


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("projection", ["up", "down"])
@expert_cases()
def bench_grouped_gemm(compare, tiny, model, tokens, routing, projection, direction):
    skip_other_sizes(model, tokens, routing, tiny)
    shape = EXPERTS[model]
    D, F, E, K = shape.D, shape.F, shape.E, shape.K
    layer = make_layer(tokens, D, F, E, K, DEVICE, routing=routing)
    plan = make_plan(layer.expert_TK, E)
    if projection == "up":
        x, weight = gather_rows(layer.x_TD, plan), layer.gate_up_EGD
    else:
        x = torch.randn(tokens * K, F, device=DEVICE).to(torch.bfloat16)
        weight = layer.down_EDF
    (N, I), O = x.shape, weight.shape[1]
    x, weight = (tensor.detach().requires_grad_(direction != "forward") for tensor in (x, weight))
    grad = torch.randn(N, O, device=DEVICE).to(torch.bfloat16)
    # one expert has rows enough for an exact answer
    expert = int(layer.expert_TK[0, 0])
    rows = slice(int(plan.offset_E[expert - 1]) if expert else 0, int(plan.offset_E[expert]))
    part, matrix, part_grad = (t.detach().double() for t in (x[rows], weight[expert], grad[rows]))
    exact = {"y": part @ matrix.t(), "dx": part_grad @ matrix, "dweight": part_grad.t() @ part}

    def call(product) -> tuple[Tensor, ...]:
        y = product(x, weight)
        if direction == "forward":
            return (y.detach(),)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    def check(name: str, out: tuple[Tensor, ...]) -> dict[str, float]:
        errors = {}
        for (result, value), where in zip(exact.items(), (rows, rows, expert), strict=True):
            if len(errors) == len(out):
                break
            error = out[len(errors)][where].double() - value
            errors[result] = (error.square().mean() / value.square().mean()).sqrt().item()
        worst = max(errors.values())
        assert worst <= LARGEST_ERROR * torch.finfo(torch.bfloat16).eps, f"{name} is off by {worst:.1e}"
        return errors

    active = layer.expert_TK.unique().numel()
    work = product_work(N, I, O, active)
    if direction == "forward_backward":
        work = work + product_grads_work(N, I, O, active, E)
    others = peers.available(
        {
            "torch_grouped_mm": lambda: peers.torch_grouped_mm(plan.offset_E),
            "moe_ops": lambda: peers.moe_ops_grouped_gemm(plan.offset_E),
        }
    )
    compare(
        "grouped_gemm",
        {
            "model": model,
            "projection": projection,
            "direction": direction,
            "tokens": tokens,
            "rows": N,
            "routing": routing,
        }
        | {"inner": I, "outer": O, "experts": E, "dtype": "bfloat16"},
        {"moe_runtime": lambda: call(lambda x, weight: grouped_gemm(x, weight, plan))},
        check=check,
        rounds=20 if DEVICE == "cuda" else 5,
        work=work,
        peers=peers.Peers({name: lambda fn=fn: call(fn) for name, fn in others.fns.items()}, others.absent),
    )
