"""Balancing without a loss: the bias that routers add to their scores for the choice only.

b_e += gamma · sign(mean(count) - count_e)        after each update, over all its tokens (DeepSeek-V3)
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.routers import TopKRouter


def selection_bias(router: nn.Module) -> Tensor | None:
    """The bias [E] of a router of ours or of transformers; None if it has none."""
    if isinstance(router, TopKRouter):
        return router.selection_bias
    family = getattr(router, "router_family", None)  # of the routers that `accelerate_model` swaps
    if family is None or family.selection_bias is None:
        return None
    value: Any = router
    for name in family.selection_bias.split("."):
        value = getattr(value, name, None)
    return value


@torch.no_grad()
def update_selection_bias(router: nn.Module, count_E: Tensor, gamma: float) -> None:
    """Move the bias towards experts with less than the mean load, in place."""
    bias = selection_bias(router)
    assert bias is not None
    load_E = count_E.to(bias)
    step_E = gamma * torch.sign(load_E.mean() - load_E)
    bias += step_E.view_as(bias)
