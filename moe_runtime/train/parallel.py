"""The section `parallel:` of a training run: what the trainer asks of `moe_runtime.distributed`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from moe_runtime.distributed.checkpoint import load_whole_optimizer, save_state, whole_state_dict
from moe_runtime.distributed.gradients import clip_grad_norm, split_by_mesh
from moe_runtime.distributed.mesh import make_layout, start
from moe_runtime.distributed.recipe import ParallelRecipe
from moe_runtime.distributed.shard import parallelize

__all__ = [
    "clip_grad_norm",
    "load_whole_optimizer",
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
    if recipe.data == "ddp":
        model.no_sync = partial(_summing_later, model)
    return model


@contextmanager
def _summing_later(model: Any) -> Iterator[None]:
    """Gradients stay in their processes; accelerate enters this for all but the last micro-batch.

    Not where parameters are in parts: whole gradients would take the memory that the parts save.
    """
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
