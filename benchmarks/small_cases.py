"""Every operation once, forward and backward, in small odd shapes: what a memory checker is pointed at.

    compute-sanitizer --tool memcheck python -m benchmarks.small_cases

Rows fill no tile and widths neither, one expert has no rows and some choices are dropped, so that every mask
matters. Results are compared with the references on the CPU. Widths are multiples of 16, whose rows are
loaded many elements at once, and odd, whose rows are loaded one by one; there are no more, because a checker
takes its time for each.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from moe_runtime_kernels import (
    RoutingPlan,
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
T, E, K = 37, 5, 3
WIDTHS = ((80, 48), (71, 39))
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """`fn` of a plan and `inputs`, which lie on the CPU and all want gradients.

    `main_grads`: options of `fn` with the index of the input whose gradient is added to them.
    """

    name: str
    fn: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    main_grads: Mapping[str, int] = field(default_factory=dict)


def cases(dtype: torch.dtype, D: int, F: int) -> Iterator[Case]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    def matrices(*shape: int) -> Tensor:
        """Products with them are of the size of their operands."""
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

    def route(plan: RoutingPlan, logits_TE: Tensor) -> Tensor:
        out = route_topk(logits_TE, K)
        losses = torch.stack((out.balance_loss, out.z_loss))
        return torch.cat((out.weight_TK.flatten(), out.expert_TK.flatten().to(losses.dtype), losses))

    def experts(
        plan: RoutingPlan, x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, *more: Tensor
    ) -> Tensor:
        biases = dict(zip(("gate_up_bias", "down_bias", "residual_TD"), more, strict=False))
        return expert_ffn(x, gate_up, down, weight, plan, **biases)

    weight_TK = torch.rand(T, K).softmax(1)
    layer = [normal(T, D), matrices(E, 2 * F, D), matrices(E, D, F), weight_TK]
    biases = [normal(E, 2 * F), normal(E, D), normal(T, D)]
    residual = [normal(T * K, D), weight_TK, normal(T, D), normal(T, D)]
    yield Case("route_topk", route, [torch.randn(T, E)])
    yield Case("gather_rows", lambda plan, x: gather_rows(x, plan), [normal(T, D)])
    yield Case("scatter_rows", lambda plan, y: scatter_rows(y, plan), [normal(T * K, D)])
    yield Case("combine", lambda plan, y, w, r, a: combine(y, w, plan, r, a), residual)
    yield Case(
        "grouped_gemm",
        lambda plan, x, w, b: grouped_gemm(x, w, plan, b),
        [normal(T * K, D), matrices(E, F, D), normal(E, F)],
    )
    yield Case(
        "gathered_grouped_gemm",
        lambda plan, x, w, b: gathered_grouped_gemm(x, w, plan, b),
        [normal(T, D), matrices(E, F, D), normal(E, F)],
    )
    yield Case("expert_ffn", experts, layer)
    yield Case("expert_ffn with biases", experts, [*layer, *biases])
    yield Case(
        "expert_ffn recomputed", lambda plan, *inputs: expert_ffn(*inputs, plan, recompute=True), layer
    )
    yield Case(
        "expert_ffn with main gradients",
        lambda plan, *inputs, **main_grads: expert_ffn(*inputs, plan, **main_grads),
        layer,
        {"gate_up_main_grad": 1, "down_main_grad": 2},
    )
    yield Case(
        "attention_mix",
        lambda plan, o, gate, weight: attention_mix(o, gate, weight),
        [normal(T, 2, 3, F), torch.rand(T, 3), matrices(D, 6 * F)],
    )


def compute(
    case: Case, plan: RoutingPlan, device: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output and gradients on the CPU; in `dtype`, and without main gradients, if it is given."""
    leaves = [x.to(device, dtype or x.dtype).detach().requires_grad_() for x in case.inputs]
    names = {} if dtype else case.main_grads
    main_grads = {name: torch.zeros(leaves[i].shape, device=device) for name, i in names.items()}
    out = case.fn(plan, *leaves, **main_grads)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(case.inputs[0].dtype)
    out.backward(grad.to(out))
    grads = [leaf.grad for leaf in leaves]
    for name, i in names.items():
        grads[i] = main_grads[name]
    results = {"output": out.detach()}
    results |= {f"gradient {i}": dx for i, dx in enumerate(grads) if dx is not None}
    return {name: value.cpu() for name, value in results.items()}


def mistakes(
    actual: dict[str, Tensor], reference: dict[str, Tensor], exact: dict[str, Tensor]
) -> Iterator[str]:
    """What is much less exact than the reference in the same dtype; `exact` is that in float64.

    The largest of few errors is a matter of luck, and has the wider bound.
    """
    for name, wanted in exact.items():
        scale, eps = wanted.square().mean().sqrt(), torch.finfo(actual[name].dtype).eps
        for measure, slack in ((lambda x: x.square().mean().sqrt(), 2), (torch.amax, 4)):
            error, expected = (
                (measure((x[name].double() - wanted).abs()) / scale).item() for x in (actual, reference)
            )
            allowed = slack * (expected + 2 * eps)
            if not error <= allowed:
                yield f"{name} is off by {error:.1e} of its rms, allowed {allowed:.1e}"
                break


def main() -> int:
    """Run them all; 1 if a result is wrong."""
    torch.manual_seed(0)
    # nobody takes expert 0; what chose it is dropped
    expert_TK = torch.rand(T, E).argsort(1)[:, :K].int()
    expert_TK = expert_TK.where(expert_TK != 0, E)
    plan, on_cpu = (make_plan(expert_TK.to(device), E) for device in (DEVICE, "cpu"))
    bad = [
        f"make_plan's {name}"
        for name, actual, expected in zip(plan._fields, plan, on_cpu, strict=True)
        if not torch.equal(actual.cpu(), expected)
    ]
    for dtype in DTYPES:
        for widths in WIDTHS:
            for case in cases(dtype, *widths):
                actual = compute(case, plan, DEVICE)
                reference, exact = compute(case, on_cpu, "cpu"), compute(case, on_cpu, "cpu", torch.float64)
                found = mistakes(actual, reference, exact)
                bad += [f"{case.name} in {dtype} with widths {widths}: {text}" for text in found]
    print("\n".join(("wrong:", *bad)) if bad else "all small cases are right")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
