"""`gather_rows` against `index_select` by the same tokens, `scatter_rows` against `index_add`, and planning
with gathering against libraries that do both at once."""

import pytest
import torch
from moe_runtime_kernels import gather_rows, make_plan, scatter_rows
from torch import Tensor

from benchmarks import peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {  # width, experts, experts per token
    "olmoe-1b-7b": (2048, 64, 8),
    "mixtral-8x7b": (4096, 8, 2),
}
TINY = {"tiny": (32, 16, 2)}


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("tokens", [512, 8192])
@pytest.mark.parametrize("model", [*MODELS, *TINY])
def bench_permute(compare, tiny, model, tokens, direction):
    if (model in TINY) != tiny:
        pytest.skip("the other size of shapes was asked for")
    D, E, K = {**MODELS, **TINY}[model]
    T = 24 if tiny else tokens
    g = torch.Generator().manual_seed(0)
    plan = make_plan(torch.rand(T, E, generator=g).topk(K, dim=1).indices.int().to(DEVICE), E)
    token_N, row_TK = plan.token_N.long(), plan.row_TK.long()
    rows = T if direction == "gather" else T * K
    x = torch.randn(rows, D, generator=g).to(DEVICE, torch.bfloat16)
    if direction == "gather":
        exact = x[token_N].double()
        fns = {"moe_runtime": lambda: gather_rows(x, plan), "torch": lambda: x.index_select(0, token_N)}
    else:
        exact = x[row_TK].double().sum(1)
        fns = {
            "moe_runtime": lambda: scatter_rows(x, plan),
            "torch": lambda: x.index_select(0, row_TK.flatten()).view(T, K, D).sum(1),
            "index_add": lambda: torch.zeros_like(x[:T]).index_add(0, token_N, x),
        }

    def check(name: str, out: Tensor) -> None:
        # index_add rounds after each of the K additions
        roundings = 0 if direction == "gather" else K if name == "index_add" else 1
        error = (out.double() - exact).abs().max() / exact.abs().max()
        assert error <= roundings * torch.finfo(torch.bfloat16).eps, f"{name} is off by {error:.1e}"

    compare(
        "permute",
        {"model": model, "direction": direction, "width": D, "k": K, "tokens": T},
        fns,
        check=check,
        nbytes=2 * T * (K + 1) * D + 4 * T * K,
    )


@pytest.mark.parametrize("tokens", [512, 8192])
@pytest.mark.parametrize("model", [*MODELS, *TINY])
def bench_permute_from_choices(compare, tiny, model, tokens):
    """Rows in expert order and where each (choice, token) went, from the chosen experts."""
    if (model in TINY) != tiny:
        pytest.skip("the other size of shapes was asked for")
    D, E, K = {**MODELS, **TINY}[model]
    T = 24 if tiny else tokens
    g = torch.Generator().manual_seed(0)
    expert_TK = torch.rand(T, E, generator=g).topk(K, dim=1).indices.int().to(DEVICE)
    x_TD = torch.randn(T, D, generator=g).to(DEVICE, torch.bfloat16)

    def ours() -> tuple[Tensor, Tensor]:
        plan = make_plan(expert_TK, E)
        return gather_rows(x_TD, plan), plan.row_TK.t()

    def by_sorting() -> tuple[Tensor, Tensor]:
        slot_N = expert_TK.flatten().sort(stable=True).indices
        row_N = torch.empty_like(slot_N).scatter(0, slot_N, torch.arange(T * K, device=DEVICE))
        return x_TD.index_select(0, slot_N // K), row_N.view(T, K).t()

    def check(name: str, out: tuple[Tensor, Tensor]) -> None:
        rows_ND, row_KT = out[0], out[1].long()
        assert torch.equal(rows_ND[row_KT], x_TD.expand(K, T, D)), f"{name} moves rows elsewhere"
        expert_N = torch.empty_like(row_KT.flatten()).scatter(
            0, row_KT.flatten(), expert_TK.t().flatten().long()
        )
        assert (expert_N.diff() >= 0).all(), f"{name} does not give expert order"

    others = peers.available({"moe_ops": lambda: peers.moe_ops_permute(E)})
    compare(
        "permute",
        {"model": model, "direction": "plan and gather", "width": D, "k": K, "tokens": T},
        {"moe_runtime": ours, "torch": by_sorting},
        check=check,
        nbytes=2 * T * (K + 1) * D + 20 * T * K,
        peers=peers.Peers(
            {name: lambda fn=fn: fn(x_TD, expert_TK) for name, fn in others.fns.items()}, others.absent
        ),
    )
