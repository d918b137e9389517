"""What routers will read, seen through hooks on a model and summed up: no activation is kept."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A router of experts reads what the feed-forward reads, a router of a mixture of attention what attention
# reads. The names of both in all families; a module of this name is the block itself, a child of a layer.
_BLOCKS = {
    "mlp": ("mlp",),
    "self_attn": ("self_attn", "self_attention", "attention", "attn"),
}


class InputSums:
    """Means [E, D] of one router's inputs over each expert's text, and their second moment [D, D], float64.

    Every text weighs the same, whatever its length: with x of expert e's T_e tokens,
    mean_e = Σ x / T_e and moment = Σ over e of Σ x xᵀ / T_e. Sums of parts are the sums of the whole.
    """

    def __init__(self, num_experts: int, width: int, *, second_moment: bool, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.mean_ED = torch.zeros(num_experts, width, **options)
        self.moment_DD = torch.zeros(width, width, **options) if second_moment else None

    def add(self, expert: int, x_TD: Tensor, num_tokens: int) -> None:
        """Some tokens of the expert's text, which has `num_tokens` in all."""
        x_TD = x_TD.double()
        self.mean_ED[expert] += x_TD.sum(0) / num_tokens
        if self.moment_DD is not None:
            self.moment_DD += x_TD.t() @ x_TD / num_tokens


@contextmanager
def watch(modules: Mapping[str, nn.Module], on_input: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `on_input(name, x_TD)` with what every module gets as its first argument or `hidden_states`."""

    def hook(name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_input(name, (args[0] if args else kwargs["hidden_states"]).flatten(0, -2))

        return call

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_modules(model: nn.Module, routers: Collection[str]) -> dict[str, nn.Module]:
    """The module of a dense model whose input each router will read.

    Args:
        model: any causal LM of transformers whose layers call their blocks by the usual names.
        routers: such as `model.layers.3.mlp.router`.

    Raises:
        ValueError: a layer has no such block.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if match := re.fullmatch(r"(?:[^.]+\.)*(\d+)\.([a-z_]+)", name):
            for kind, names in _BLOCKS.items():
                if match[2] in names:
                    found[f"model.layers.{match[1]}.{kind}.router"] = module
    for router in routers:
        if router not in found:
            raise ValueError(
                f"the model must have the block that {router} stands before, "
                f"and {type(model).__name__} has none of a known name"
            )
    return {router: found[router] for router in routers}
