"""`make_plan` against sorting, which gives the order of the rows and the offsets of the experts."""

import pytest
import torch
from moe_runtime_kernels import make_plan
from torch import Tensor

from benchmarks import peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {"qwen3-30b-a3b": (128, 8), "qwen3-next-80b-a3b": (512, 10)}  # experts, experts per token
TINY = {"tiny": (16, 2)}


def sorted_plan(expert_TK: Tensor, E: int) -> tuple[Tensor, ...]:
    """row, token, slot and offset of the same plan; needs every id to be in range."""
    expert_N, slot_N = expert_TK.flatten().sort(stable=True)
    row_TK = torch.empty_like(slot_N).scatter(0, slot_N, torch.arange(slot_N.numel(), device=slot_N.device))
    offset_E = torch.searchsorted(expert_N, torch.arange(E, device=slot_N.device), right=True)
    return row_TK.view_as(expert_TK), slot_N // expert_TK.shape[1], slot_N, offset_E


@pytest.mark.parametrize("tokens", [64, 512, 8192])
@pytest.mark.parametrize("model", [*MODELS, *TINY])
def bench_plan(compare, tiny, model, tokens):
    if (model in TINY) != tiny:
        pytest.skip("the other size of shapes was asked for")
    E, K = {**MODELS, **TINY}[model]
    T = 24 if tiny else tokens
    g = torch.Generator().manual_seed(0)
    expert_TK = torch.rand(T, E, generator=g).topk(K, dim=1).indices.int().to(DEVICE)
    exact = sorted_plan(expert_TK, E)

    def check(name: str, out: tuple[Tensor, ...]) -> None:
        for part, expected in zip(out[:4], exact, strict=True):
            assert torch.equal(part.long(), expected.long()), f"{name} is another plan than sorting gives"

    others = peers.available({"liger": lambda: peers.liger_plan(E)})
    compare(
        "plan",
        {"model": model, "experts": E, "k": K, "tokens": T},
        {"moe_runtime": lambda: make_plan(expert_TK, E), "sort": lambda: sorted_plan(expert_TK, E)},
        check=check,
        nbytes=16 * T * K,
        peers=peers.Peers(
            {name: lambda plan=plan: plan(expert_TK) for name, plan in others.fns.items()}, others.absent
        ),
    )
