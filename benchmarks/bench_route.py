"""`route_topk`, which also gives the load and both losses, against routers that choose and weigh only."""

import pytest
import torch
from moe_runtime_kernels import route_topk
from torch import Tensor

from benchmarks import peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {  # experts, experts per token, groups, groups kept
    "qwen3-30b-a3b": (128, 8, 1, 1),
    "deepseek-v3": (256, 8, 8, 4),
    "qwen3-next-80b-a3b": (512, 10, 1, 1),
}
TINY = {"tiny": (16, 2, 1, 1), "tiny-groups": (16, 2, 4, 2)}


def softmax_router(logits_TE: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Four kernels: softmax, top-k, sum, division."""
    weight_TK, expert_TK = logits_TE.softmax(1).topk(K, dim=1)
    return weight_TK / weight_TK.sum(1, keepdim=True), expert_TK


def sigmoid_router(logits_TE: Tensor, K: int, num_groups: int, groups_kept: int) -> tuple[Tensor, Tensor]:
    score_TE = logits_TE.sigmoid()
    grouped = score_TE.view(score_TE.shape[0], num_groups, -1)
    best = grouped.topk(2, dim=2).values.sum(2).topk(groups_kept, dim=1).indices
    kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
    choice_TE = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    expert_TK = choice_TE.topk(K, dim=1).indices
    weight_TK = score_TE.gather(1, expert_TK)
    return weight_TK / weight_TK.sum(1, keepdim=True), expert_TK


@pytest.mark.parametrize("tokens", [64, 512, 8192])
@pytest.mark.parametrize("model", [*MODELS, *TINY])
def bench_route(compare, tiny, model, tokens):
    if (model in TINY) != tiny:
        pytest.skip("the other size of shapes was asked for")
    E, K, num_groups, groups_kept = {**MODELS, **TINY}[model]
    T = 24 if tiny else tokens
    g = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(T, E, generator=g).to(DEVICE)
    groups = {"num_groups": num_groups, "groups_kept": groups_kept}
    score = "softmax" if num_groups == 1 else "sigmoid"
    fns = {"moe_runtime": lambda: route_topk(logits_TE, K, score=score, **groups)[:2]}
    if num_groups == 1:
        fns["torch"] = lambda: softmax_router(logits_TE, K)
        others = {"mixtral": peers.mixtral_router, "qwen3_moe": peers.qwen3_router}
        routers = {name: make(E, K, DEVICE) for name, make in others.items()}
        libraries = peers.available({"moe_ops": lambda: peers.moe_ops_router(K)})
    else:
        fns["torch"] = lambda: sigmoid_router(logits_TE, K, num_groups, groups_kept)
        routers = {"deepseek_v3": peers.deepseek_router(E, K, num_groups, groups_kept, DEVICE)}
        libraries = peers.Peers(absent={"moe_ops": "moe-ops has no sigmoid scores and no groups"})
    fns |= {f"transformers_{name}": lambda route=route: route(logits_TE) for name, route in routers.items()}
    exact = sigmoid_router(logits_TE.double(), K, num_groups, groups_kept)
    if num_groups == 1:
        exact = softmax_router(logits_TE.double(), K)

    def check(name: str, out: tuple[Tensor, Tensor]) -> None:
        weight_TE, exact_TE = (
            torch.zeros(T, E, dtype=torch.float64, device=DEVICE).scatter(1, e.long(), w.double())
            for w, e in (out, exact)
        )
        worst = (weight_TE - exact_TE).abs().max()
        assert worst <= 64 * torch.finfo(torch.float32).eps, f"{name}: a gate is off by {worst:.1e}"

    compare(
        "route",
        {"model": model, "experts": E, "k": K, "tokens": T},
        fns,
        check=check,
        nbytes=T * E * 4 + T * K * 8,
        peers=peers.Peers(
            {name: lambda route=route: route(logits_TE) for name, route in libraries.fns.items()},
            libraries.absent,
        ),
    )
