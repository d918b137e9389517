"""First router weights from the domains' own hidden states, so that few tokens of tuning are enough."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from upcycle.routers.inputs import InputSums, watch
from upcycle.routers.solve import centred

from ..routers import SoftRouter, TopKRouter, TopKSoftRouter


@torch.no_grad()
def start_routers(model: Any, rows: Mapping[str, Tensor], sharpness: float) -> None:
    """Point the router row of each domain's expert at the centroid of that domain's router inputs.

    For every router, with c_d the mean input over tokens of domain d minus the mean over domains, row d
    becomes sharpness · c_d / |c_d|²: a token at its centroid scores `sharpness` above one at the mean of all.
    This is the centroid initialiser, scaled by the centroid's length instead of to one length.

    Args:
        model: a mixture whose expert d came from domain d.
        rows: token ids [N, L] of each domain, in the order of the experts.
    """
    kinds = (TopKRouter, SoftRouter, TopKSoftRouter)
    routers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    sums: dict[str, InputSums] = {}
    for name, router in routers.items():
        width = router.weight.shape[1]
        sums[name] = InputSums(len(rows), width, second_moment=False, device=router.weight.device)
    for expert, rows_NL in enumerate(rows.values()):

        def add(name: str, x_TD: Tensor, expert: int = expert, num_tokens: int = rows_NL.numel()) -> None:
            sums[name].add(expert, x_TD, num_tokens)

        with watch(routers, add), torch.autocast("cpu", torch.bfloat16):
            model.model(input_ids=rows_NL, use_cache=False)
    for name, router in routers.items():
        centroid_ED = centred(sums[name].mean_ED)
        length_E1 = centroid_ED.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        router.weight.copy_(sharpness * centroid_ED / length_E1)
