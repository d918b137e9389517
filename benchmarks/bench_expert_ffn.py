"""`expert_ffn`, from the chosen experts on: plan, both projections, weighted sum, and all gradients.

Three passes: inference, the forward of training, which keeps h, and forward with backward, there also with h
computed a second time instead. Every peer starts from the same chosen experts and gates, and what it needs to
sort them is part of its time.
"""

from functools import partial

import pytest
import torch
from moe_runtime_kernels import expert_ffn, make_plan
from torch import Tensor

from benchmarks.exact import RESULTS, exact_sample, make_layer
from benchmarks.floor import expert_backward_work, expert_forward_work
from benchmarks.peers import Peers, expert_peers
from benchmarks.shapes import EXPERTS, expert_cases, skip_other_sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rms errors in units of bfloat16's eps: ours is to be one rounding's; a peer may round every partial sum
LARGEST_ERROR = {"moe_runtime": 1.0, "moe_runtime_recompute": 1.0}
LARGEST_ERROR_OF_PEERS = 8.0


@pytest.mark.parametrize("direction", ["inference", "forward", "forward_backward"])
@expert_cases()
def bench_expert_ffn(compare, tiny, model, tokens, routing, direction):
    skip_other_sizes(model, tokens, routing, tiny)
    shape = EXPERTS[model]
    D, F, E, K = shape.D, shape.F, shape.E, shape.K
    layer = make_layer(tokens, D, F, E, K, DEVICE, routing=routing)
    sample = exact_sample(layer)
    leaves = [tensor.detach().requires_grad_(direction != "inference") for tensor in layer.parameters()]

    def ours(*inputs: Tensor, recompute: bool = False) -> Tensor:
        return expert_ffn(*inputs, make_plan(layer.expert_TK, E), recompute=recompute)

    def call(experts):
        y_TD = experts(*leaves)
        if direction != "forward_backward":
            return (y_TD.detach(),)
        return (y_TD.detach(), *torch.autograd.grad(y_TD, leaves, layer.grad_TD))

    def check(name: str, out: tuple[Tensor, ...]) -> dict[str, float]:
        errors = sample.errors(dict(zip(RESULTS, out, strict=False)))
        worst = max(errors, key=lambda result: errors[result])
        most = LARGEST_ERROR.get(name, LARGEST_ERROR_OF_PEERS) * torch.finfo(torch.bfloat16).eps
        assert errors[worst] <= most, f"{name}: {worst} is off by {errors[worst]:.1e} of its rms"
        return errors

    active = layer.expert_TK.unique().numel()
    work = expert_forward_work(tokens, shape, active, keeps_h=direction != "inference")
    if direction == "forward_backward":
        work = work + expert_backward_work(tokens, shape, active)
    fns = {"moe_runtime": lambda: call(ours)}
    if direction == "forward_backward":
        fns["moe_runtime_recompute"] = lambda: call(partial(ours, recompute=True))
    peers = expert_peers(layer.expert_TK, E, 6 * D * F)
    compare(
        "expert_ffn",
        {
            "model": model,
            "direction": direction,
            "tokens": tokens,
            "routing": routing,
            "width": D,
            "hidden": F,
            "experts": E,
        }
        | {"k": K, "dtype": "bfloat16"},
        fns,
        check=check,
        rounds=20 if DEVICE == "cuda" else 5,
        work=work,
        peers=Peers({name: lambda fn=fn: call(fn) for name, fn in peers.fns.items()}, peers.absent),
    )
