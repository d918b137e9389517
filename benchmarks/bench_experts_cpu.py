"""Expert layers on a CPU against transformers', and against a dense layer of the same FLOPs.

All start from the same chosen experts and gates: what sorts them is part of the time. The dense layer is one
feed-forward network as wide as the K experts that a token passes. Before every call caches are cold, as a
layer finds them after the rest of a model.
"""

import pytest
import torch
import torch.nn.functional as functional
from moe_runtime_kernels import PackedExperts, expert_ffn, make_plan
from torch import Tensor

from benchmarks.bench_moe_layer import dense_work
from benchmarks.floor import expert_backward_work, expert_forward_work
from benchmarks.peers import Peers, available, batched_experts, transformers_experts
from benchmarks.shapes import ExpertShape

SHAPES = {"64-experts": ExpertShape(1024, 512, 64, 8), "8-experts": ExpertShape(1024, 3584, 8, 2)}
TINY = {"tiny": ExpertShape(32, 16, 4, 2)}
ROUNDS = {1: 21, 16: 15, 512: 7, 4096: 4}
CASES = [("forward", tokens) for tokens in ROUNDS] + [("forward_backward", 512)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("direction", "tokens"), CASES)
@pytest.mark.parametrize("shape", [*SHAPES, *TINY])
def bench_experts_cpu(compare, tiny, shape, direction, tokens, dtype):
    if torch.cuda.is_available():
        pytest.skip("bench_expert_ffn.py is that of a GPU")
    if (shape in TINY) != tiny or (tiny and tokens > 16 and direction == "forward"):
        pytest.skip("the other size of shapes was asked for")
    D, F, E, K = ({**SHAPES, **TINY}[shape].__dict__[letter] for letter in "DFEK")
    backward = direction == "forward_backward"
    leaves, expert_TK = inputs(tokens, D, F, E, K, dtype, backward)
    grad_TD = torch.randn(tokens, D).to(dtype)

    def call(experts) -> tuple[Tensor, ...]:
        y_TD = experts(*leaves)
        return (y_TD.detach(), *(torch.autograd.grad(y_TD, leaves, grad_TD) if backward else ()))

    # eager's backward writes a gradient of all experts for each of them: minutes
    names = ("moe_runtime", "grouped_mm") if backward else ("moe_runtime", "eager", "grouped_mm")
    peers = {name: transformers_experts(name, expert_TK, E) for name in names}
    fns = {"moe_runtime": lambda *i: expert_ffn(*i, make_plan(expert_TK, E))}
    fns |= {f"transformers_{name}": fn for name, fn in peers.items()}
    absent: dict[str, str] = {}
    if not backward:
        weight_bytes = 3 * D * F * dtype.itemsize
        more = available(
            {
                "moe_runtime_packed": lambda: packed_experts(leaves[1], leaves[2], expert_TK),
                "transformers_batched_mm": lambda: batched_experts(expert_TK, E, weight_bytes),
            }
        )
        fns, absent = fns | more.fns, more.absent
    calls = {name: lambda fn=fn: call(fn) for name, fn in fns.items()}
    expected = call(peers["grouped_mm"])
    if tokens == max(ROUNDS):
        calls["dense"] = dense_layer(leaves[0], K * F)

    def check(name: str, out: tuple[Tensor, ...]) -> None:
        if name == "dense":
            return  # another function, of as many FLOPs
        # bfloat16: transformers rounds gates and partial sums; float32: so many terms in another order
        most = 8 if dtype == torch.bfloat16 else max(D, F) ** 0.5
        for i, (actual, other) in enumerate(zip(out, expected, strict=True)):
            error = (actual - other).float().norm() / other.float().norm()
            assert error <= most * torch.finfo(dtype).eps, f"{name}: result {i} differs by {error:.1e}"

    sizes, used = ExpertShape(D, F, E, K), expert_TK.unique().numel()
    work = expert_forward_work(tokens, sizes, used, keeps_h=backward, itemsize=dtype.itemsize)
    if backward:
        work = work + expert_backward_work(tokens, sizes, used, dtype.itemsize)
    compare(
        "experts_cpu",
        {"shape": shape, "direction": direction, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
        | {"width": D, "hidden": F, "experts": E, "k": K},
        calls,
        check=check,
        rounds=ROUNDS[tokens],
        cold=True,
        work=dict.fromkeys(calls, work) | {"dense": dense_work(tokens, D, K * F, dtype.itemsize)},
        peers=Peers(absent=absent),
    )


def inputs(
    T: int, D: int, F: int, E: int, K: int, dtype: torch.dtype, trained: bool
) -> tuple[list[Tensor], Tensor]:
    """Tokens, both projections and the gates of a random routing, and the experts it chose."""
    torch.manual_seed(T)
    weight_TK, expert_TK = torch.randn(T, E).softmax(1).topk(K)
    tensors = [
        torch.randn(T, D).to(dtype),
        (torch.randn(E, 2 * F, D) * D**-0.5).to(dtype),
        (torch.randn(E, D, F) * F**-0.5).to(dtype),
        weight_TK / weight_TK.sum(1, keepdim=True),
    ]
    return [tensor.requires_grad_(trained) for tensor in tensors], expert_TK.int()


def packed_experts(gate_up_EGD: Tensor, down_EDF: Tensor, expert_TK: Tensor):
    """Experts packed before the first call, as a call of `expert_ffn`'s operands."""
    packed = PackedExperts(gate_up_EGD, down_EDF)
    return lambda x_TD, _gate_up, _down, weight_TK: packed(x_TD, expert_TK, weight_TK)


def dense_layer(x_TD: Tensor, F: int):
    """A gated feed-forward network of width F, as a call for x."""
    D, dtype = x_TD.shape[1], x_TD.dtype
    gate_FD, up_FD, down_DF = (torch.randn(*size).to(dtype) for size in ((F, D), (F, D), (D, F)))

    def call() -> Tensor:
        gate_TF, up_TF = functional.linear(x_TD, gate_FD), functional.linear(x_TD, up_FD)
        return functional.linear(functional.silu(gate_TF) * up_TF, down_DF)

    return call
