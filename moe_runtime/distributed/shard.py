"""parallelize: one model over the processes of a layout, by PyTorch's FSDP2 and by expert parallelism."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from moe_runtime.distributed.expert_parallel import shard_experts
from moe_runtime.distributed.mesh import Layout


def parallelize(model: Any, layout: Layout) -> None:
    """Spread a transformers model over the processes, in place; every process has loaded all of it.

    Gradients are then the mean over all processes of those of their own losses. Parameters keep their names
    and become DTensors: of all but experts over all processes, of experts over those that hold the same ones.

    Raises:
        RunError: see `shard_experts`.
    """
    if layout.by_expert is not None:
        mesh = layout.same_experts
        X = layout.by_expert["expert"].size()
        for experts in shard_experts(model, layout.by_expert):
            fully_shard(experts, mesh=mesh, shard_placement_fn=_even_part(mesh["shard"].size()))
            # The mean over `mesh` of sums over the X processes whose rows came here.
            experts.set_all_reduce_hook(_divide_by(X))
    even_part = _even_part(layout.whole["shard"].size())
    names = model._no_split_modules or ()
    for layer in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(layer, mesh=layout.whole, shard_placement_fn=even_part)
    fully_shard(model, mesh=layout.whole, shard_placement_fn=even_part)


def _even_part(num_shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """Stacked experts whose number does not divide are split along the next axis where that does.

    Split along the first, some processes would hold whole experts and others nothing.
    """

    def part(parameter: nn.Parameter) -> Shard | None:
        if parameter.dim() != 3:
            return None
        E, O = parameter.shape[:2]
        return Shard(1) if E % num_shards and O % num_shards == 0 else None

    return part


def _divide_by(number: int) -> Callable[[Tensor], None]:
    def divide(grad: Tensor) -> None:
        grad.div_(number)

    return divide
