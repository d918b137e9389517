"""Expert parallelism: every process keeps its part of the experts, and rows travel.

    rows in expert order -> all-to-all -> this process's experts -> all-to-all back -> gates, sum, residual

for this project's `Experts` and for modules of transformers' experts interface, whose own forward runs on the
rows that arrive. Parameters keep their names; their first axis is E / X.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from moe_runtime_kernels import combine, gather_rows, make_plan
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moe_runtime.distributed.dispatch import exchange_counts, to_experts, to_tokens
from moe_runtime.errors import RunError
from moe_runtime.packed_experts import holds_experts


def shard_experts(model: nn.Module, by_expert: DeviceMesh) -> list[Any]:
    """Keep this process's part of every layer's experts, in place; returns the modules that hold them.

    `expert_mesh` of each is the mesh, for checkpoints.

    Raises:
        RunError: the model has no experts, a number of them that the processes do not divide, or experts that
            share a parameter.
    """
    mesh = by_expert["expert"]
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if holds_experts(module)}
    if not found:
        raise RunError(f"parallel.experts must be 1 for a model without experts, got {mesh.size()}")
    for name, module in found.items():
        _keep_part(name, module, mesh)
        module.expert_mesh = by_expert
    return list(found.values())


def _keep_part(name: str, module: Any, mesh: DeviceMesh) -> None:
    E, X = module.down_proj.shape[0], mesh.size()
    if E % X:
        raise RunError(f"parallel.experts must divide the number of experts, which is {E} in {name}, got {X}")
    for key, parameter in module.named_parameters():
        if parameter.dim() < 2 or parameter.shape[0] != E:
            raise RunError(
                f"parallel.experts must be 1 where experts share a parameter, as {name}.{key} of shape "
                f"{tuple(parameter.shape)}, got {X}"
            )
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                part = parameter.detach().chunk(X)[mesh.get_local_rank()].clone()
                owner._parameters[key] = nn.Parameter(part, parameter.requires_grad)
    module.num_experts = E // X
    module.forward = _travelling(module.forward, E, mesh.get_group())


def _travelling(local: Callable[..., Tensor], num_experts: int, group: ProcessGroup) -> Callable[..., Tensor]:
    """The forward of a module whose `local` forward knows only its part of `num_experts` experts."""

    def forward(
        x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, residual_TD: Tensor | None = None
    ) -> Tensor:
        plan = make_plan(expert_TK, num_experts)
        route = exchange_counts(plan.offset_E.diff(prepend=plan.offset_E.new_zeros(1)), group)
        x_ND = gather_rows(_for_products(x_TD), plan)
        N, kept = x_ND.shape[0], sum(route.sent)
        x_RD = to_experts(x_ND[:kept], route, group)
        once_R1 = x_RD.new_ones(x_RD.shape[0], 1, dtype=torch.float32)
        y_RD = local(x_RD, route.expert_R[:, None], once_R1)
        y_ND = F.pad(to_tokens(y_RD, route, group), (0, 0, 0, N - kept))
        y_TD = combine(y_ND, weight_TK, plan, residual_TD)
        return y_TD.to(x_TD.dtype) if residual_TD is None else y_TD

    return forward


def _for_products(x_TD: Tensor) -> Tensor:
    """In autocast's dtype where that is on: what the experts multiply is what travels."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
