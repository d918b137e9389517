"""`combine`: gate-weighted sum of each token's rows, plus the residual, against compositions in PyTorch."""

import pytest
import torch
from moe_runtime_kernels import combine, make_plan
from torch import Tensor

from benchmarks import peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {  # width, experts, experts per token
    "olmoe-1b-7b": (2048, 64, 8),
    "mixtral-8x7b": (4096, 8, 2),
}
TINY = {"tiny": (32, 16, 2)}


@pytest.mark.parametrize("tokens", [512, 8192])
@pytest.mark.parametrize("model", [*MODELS, *TINY])
def bench_combine(compare, tiny, model, tokens):
    if (model in TINY) != tiny:
        pytest.skip("the other size of shapes was asked for")
    D, E, K = {**MODELS, **TINY}[model]
    T = 24 if tiny else tokens
    g = torch.Generator().manual_seed(0)
    plan = make_plan(torch.rand(T, E, generator=g).topk(K, dim=1).indices.int().to(DEVICE), E)
    token_N, slot_N, row_N = plan.token_N.long(), plan.slot_N.long(), plan.row_TK.flatten().long()
    y_ND = torch.randn(T * K, D, generator=g).to(DEVICE, torch.bfloat16)
    weight_TK = torch.rand(T, K, generator=g).softmax(1).to(DEVICE)
    residual_TD = torch.randn(T, D, generator=g).to(DEVICE, torch.bfloat16)
    exact = (weight_TK.double()[..., None] * y_ND[row_N].view(T, K, D).double()).sum(1) + residual_TD.double()

    def by_index_add() -> Tensor:
        weighted_ND = y_ND * weight_TK.flatten()[slot_N, None].to(y_ND.dtype)
        return residual_TD.index_add(0, token_N, weighted_ND)

    def by_bmm() -> Tensor:
        weight = weight_TK.to(y_ND.dtype)[:, None]
        return torch.baddbmm(residual_TD[:, None], weight, y_ND[row_N].view(T, K, D)).squeeze(1)

    def check(name: str, out: Tensor) -> None:
        # PyTorch's ways round the gates, the products and every partial sum
        roundings = 1 if name == "moe_runtime" else K + 3
        error = (out.double() - exact).abs().max() / exact.abs().max()
        assert error <= roundings * torch.finfo(torch.bfloat16).eps, f"{name} is off by {error:.1e}"

    def and_residual(unpermute) -> Tensor:
        return unpermute(y_ND, weight_TK) + residual_TD

    others = peers.available({"moe_ops": lambda: peers.moe_ops_unpermute(plan.row_TK)})
    compare(
        "combine",
        {"model": model, "width": D, "k": K, "tokens": T},
        {
            "moe_runtime": lambda: combine(y_ND, weight_TK, plan, residual_TD),
            "index_add": by_index_add,
            "bmm": by_bmm,
        },
        check=check,
        nbytes=2 * T * (K + 2) * D + 8 * T * K,
        peers=peers.Peers(
            {name: lambda fn=fn: and_residual(fn) for name, fn in others.fns.items()}, others.absent
        ),
    )
