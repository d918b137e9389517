"""Every operation once, forward and backward, in small odd shapes: what a memory checker is pointed at.

    compute-sanitizer --tool memcheck python -m benchmarks.small_cases

Widths and rows fill no tile, one expert has no rows and some choices are dropped, so that every mask matters.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from moe_runtime_kernels import (
    attention_mix,
    combine,
    expert_ffn,
    gather_rows,
    gathered_grouped_gemm,
    grouped_gemm,
    make_plan,
    route_topk,
    scatter_rows,
)
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, D, F, E, K = 37, 72, 40, 5, 3  # widths of 8 elements and of 16, neither a whole tile


def cases(dtype: torch.dtype, D: int, F: int) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Name, function and inputs that want gradients."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    logits_TE = torch.randn(T, E, device=DEVICE)
    routed = route_topk(logits_TE, K)
    # nobody takes expert 0; what chose it is dropped
    plan = make_plan(torch.where(routed.expert_TK == 0, E, routed.expert_TK), E)
    weight_TK = routed.weight_TK.detach()

    def route(logits: Tensor) -> Tensor:
        out = route_topk(logits, K)
        return out.weight_TK.sum() + out.balance_loss + out.z_loss

    def experts(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        biases = dict(zip(("gate_up_bias", "down_bias", "residual_TD"), more, strict=False))
        return expert_ffn(x, gate_up, down, weight, plan, **biases)

    layer = [normal(T, D), normal(E, 2 * F, D), normal(E, D, F), weight_TK]
    yield "route_topk", route, [logits_TE]
    yield "gather_rows", lambda x: gather_rows(x, plan), [normal(T, D)]
    yield "scatter_rows", lambda y: scatter_rows(y, plan), [normal(T * K, D)]
    residual = [normal(T * K, D), weight_TK, normal(T, D), normal(T, D)]
    yield "combine", lambda y, w, r, a: combine(y, w, plan, r, a), residual
    products = [normal(T * K, D), normal(E, F, D), normal(E, F)]
    yield "grouped_gemm", lambda x, w, b: grouped_gemm(x, w, plan, b), products
    gathered = [normal(T, D), normal(E, F, D), normal(E, F)]
    yield "gathered_grouped_gemm", lambda x, w, b: gathered_grouped_gemm(x, w, plan, b), gathered
    yield "expert_ffn", experts, layer
    yield "expert_ffn with biases", experts, [*layer, normal(E, 2 * F), normal(E, D), normal(T, D)]
    yield "expert_ffn recomputed", lambda *inputs: expert_ffn(*inputs, plan, recompute=True), layer
    main_grads = {
        "gate_up_main_grad": torch.zeros(E, 2 * F, D, device=DEVICE),
        "down_main_grad": torch.zeros(E, D, F, device=DEVICE),
    }
    yield "expert_ffn with main gradients", lambda *inputs: expert_ffn(*inputs, plan, **main_grads), layer
    mixed = [normal(T, 2, 3, F), torch.rand(T, 3, device=DEVICE), normal(D, 6 * F)]
    yield "attention_mix", attention_mix, mixed


def main() -> int:
    """Run them all; 1 if a result is not finite."""
    torch.manual_seed(0)
    bad = []
    for dtype in (torch.bfloat16, torch.float32):
        for widths in ((D, F), (D - 8, 48), (D - 1, F - 1)):  # of 8, of 16, and odd
            for name, fn, inputs in cases(dtype, *widths):
                leaves = [tensor.detach().requires_grad_() for tensor in inputs]
                out = fn(*leaves)
                out.backward(torch.randn_like(out))
                # what is added to a main gradient is no leaf's own
                grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
                if not all(tensor.isfinite().all() for tensor in (out, *grads)):
                    bad.append(f"{name} in {dtype} with widths {widths}")
    print(f"not finite: {', '.join(bad)}" if bad else "all small cases ran")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
