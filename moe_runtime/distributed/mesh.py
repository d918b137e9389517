"""Processes: how they are started, and which of them hold the same part of a model.

With W processes and X = `experts`, process r holds the experts of part r % X of every layer. The X neighbours
with the same r // X hold all experts together; the W / X processes with the same r % X hold the same ones.
"""

import os
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_runtime.distributed.recipe import ParallelRecipe
from moe_runtime.errors import RunError


@dataclass(frozen=True)
class Layout:
    """Two meshes over the same W processes."""

    # ("shard",), or ("replicate", "shard") with one process along "shard": for all that is no expert
    whole: DeviceMesh
    # ("replicate", "expert", "shard"); None with experts = 1, when experts are like everything else
    by_expert: DeviceMesh | None

    @property
    def same_experts(self) -> DeviceMesh:
        """The processes that hold the experts of this one, in the form of `whole`."""
        assert self.by_expert is not None
        assert self.whole.mesh_dim_names is not None
        return self.by_expert[self.whole.mesh_dim_names]


def start(recipe: ParallelRecipe) -> None:
    """Join the processes that torchrun started: gloo, or NCCL on GPUs, which has never run. Repeatable.

    Raises:
        RunError: the number of processes does not fit the recipe, or torchrun started none.
    """
    started = distributed.is_initialized() or "WORLD_SIZE" in os.environ
    W = distributed.get_world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if recipe.data == "none":
        if W > 1:
            raise RunError(f"parallel.data must be 'ddp' or 'fsdp' with {W} processes, got 'none'")
        return
    if not started:
        raise RunError(
            f"parallel.data must be 'none' in a process that torchrun did not start, got {recipe.data!r}; "
            "start it with torchrun --nproc-per-node N"
        )
    if W % recipe.experts:
        raise RunError(
            f"parallel.experts must divide the number of processes, which is {W}, got {recipe.experts}"
        )
    if distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def make_layout(recipe: ParallelRecipe) -> Layout:
    """The meshes of a recipe, over the processes that `start` joined."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    W, X = distributed.get_world_size(), recipe.experts
    if recipe.data == "fsdp":
        whole = init_device_mesh(device, (W,), mesh_dim_names=("shard",))
        replicas, shards = 1, W // X
    else:
        whole = init_device_mesh(device, (W, 1), mesh_dim_names=("replicate", "shard"))
        replicas, shards = W // X, 1
    if X == 1:
        return Layout(whole, None)
    # "expert" before "shard": an axis that both split is split into experts' parts first
    rank = torch.arange(W).view(replicas, shards, X).transpose(1, 2).contiguous()
    return Layout(whole, DeviceMesh(device, rank, mesh_dim_names=("replicate", "expert", "shard")))
