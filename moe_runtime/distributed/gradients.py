"""Gradients that live on more than one mesh: their norm, and parameters by mesh for fused optimizers."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm, over all processes, is at most `max_norm`; returns the norm.

    With `max_norm` infinite they stay as they are. Every process must call it.
    """
    part_by_copies = defaultdict(list)
    for parameter in model.parameters():
        if parameter.grad is not None:
            part_by_copies[_num_copies(parameter.grad)].append(local_part(parameter.grad))
    device = next(model.parameters()).device
    square = torch.zeros((), device=device)
    for copies, parts in part_by_copies.items():
        square += get_total_norm(parts).square() / copies
    distributed.all_reduce(square)
    norm = square.sqrt()
    if math.isfinite(max_norm):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6: as PyTorch's clip_grad_norm_
        for parts in part_by_copies.values():
            torch._foreach_mul_(parts, scale)
    return norm


def split_by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, so that none has parameters of two meshes, whose tensors no fused
    kernel takes together. Options are copied.
    """
    split = []
    for group in groups:
        by_mesh = defaultdict(list)
        for parameter in group["params"]:
            by_mesh[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
        split += [{**group, "params": parameters} for parameters in by_mesh.values()]
    return split


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_copies(grad: Tensor) -> int:
    """How many processes hold the same part."""
    if not isinstance(grad, DTensor):
        return distributed.get_world_size()
    mesh = grad.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(grad.placements) if placement.is_replicate())
