"""The section `parallel:` of a training run: what the trainer asks of `moe_runtime.distributed`."""

import warnings
from typing import Any

from moe_runtime.distributed.checkpoint import load_state, save_state, whole_state_dict
from moe_runtime.distributed.gradients import clip_grad_norm, split_by_mesh
from moe_runtime.distributed.mesh import make_layout, start
from moe_runtime.distributed.recipe import ParallelRecipe
from moe_runtime.distributed.shard import parallelize

__all__ = [
    "clip_grad_norm",
    "load_state",
    "prepare",
    "save_state",
    "split_by_mesh",
    "start",
    "whole_state_dict",
]


def prepare(model: Any, recipe: ParallelRecipe) -> Any:
    """Spread a model over the processes, in place, so that Trainer takes it as it is."""
    # of layers that end in a view, which nothing here changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    parallelize(model, make_layout(recipe))
    model._is_accelerate_prepared = True  # accelerate would wrap it in DistributedDataParallel
    return model
