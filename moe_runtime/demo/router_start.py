"""First router weights from the domains' own hidden states, so that few tokens of tuning are enough."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..routers import SoftRouter, TopKRouter, TopKSoftRouter


@torch.no_grad()
def start_routers(model: Any, rows: Mapping[str, Tensor], sharpness: float) -> None:
    """Point the router row of each domain's expert at the centroid of that domain's router inputs.

    For every router, with c_d the mean input over tokens of domain d minus the mean over domains, row d
    becomes sharpness · c_d / |c_d|²: a token at its centroid scores `sharpness` above one at the mean of all.
    This is the centroid initialiser, scaled by the centroid's length instead of to a unit vector.

    Args:
        model: a mixture whose expert d came from domain d.
        rows: token ids [N, L] of each domain, in the order of the experts.
    """
    kinds = (TopKRouter, SoftRouter, TopKSoftRouter)
    routers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    means: dict[str, list[Tensor]] = {name: [] for name in routers}
    for rows_NL in rows.values():
        for name, mean_D in _mean_inputs(model, routers, rows_NL).items():
            means[name].append(mean_D)
    for name, router in routers.items():
        centroid_ED = torch.stack(means[name])
        centroid_ED = centroid_ED - centroid_ED.mean(0)
        length_E = centroid_ED.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        router.weight.copy_(sharpness * centroid_ED / length_E)


def _mean_inputs(model: Any, routers: Mapping[str, torch.nn.Module], rows_NL: Tensor) -> dict[str, Tensor]:
    """Mean input [D] of every router over the tokens of the rows."""
    means: dict[str, Tensor] = {}
    handles = []
    for name, router in routers.items():

        def keep(module: Any, inputs: tuple[Any, ...], name: str = name) -> None:
            means[name] = inputs[0].float().flatten(0, -2).mean(0)

        handles.append(router.register_forward_pre_hook(keep))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model.model(input_ids=rows_NL, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return means
