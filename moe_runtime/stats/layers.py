"""Where a model has routers: found by structure, so that families need no table.

A feed-forward with experts is a module with `experts` and a `router` or `gate`, whose output is
(logits [T, E], gates [T, K], chosen experts [T, K], ...): this project and the MoE families of transformers.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import MixtureOfAttention, MixtureProjection
from ..routers import TopKRouter, TopKSoftRouter


class Choice(NamedTuple):
    """What a router did with T tokens, float32 or wider."""

    score_TE: Tensor  # rows sum to 1
    expert_TK: Tensor | None  # int64; None: a soft mixture, whose gates are the scores


@dataclass(frozen=True)
class RoutedLayer:
    """A router and where its experts are."""

    name: str
    kind: Literal["feed_forward", "attention"]
    block: nn.Module

    @property
    def router(self) -> nn.Module:
        return self.block.get_submodule("router" if _has(self.block, "router") else "gate")

    def choice(self, args: tuple[Any, ...], output: Any) -> Choice:
        """Read what a call of the router took and gave.

        Raises:
            ValueError: the output is not what routers of transformers give.
        """
        if self.kind == "attention":
            return _attention_choice(self.router, args[0], output)
        is_tuple = isinstance(output, tuple) and len(output) >= 3 and all(map(torch.is_tensor, output[:3]))
        if not is_tuple or output[0].dim() != 2 or output[2].dim() != 2 or output[2].is_floating_point():
            raise ValueError(
                f"the router {self.name} ({type(self.router).__name__}) must give (logits [T, E], "
                f"gates [T, K], experts [T, K]), got {_described(output)}"
            )
        logits_TE, _, expert_TK = output[:3]
        return Choice(_scores(self.router, logits_TE), expert_TK.long())


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Every router of a model with its experts, in the order of the layers.

    Raises:
        ValueError: there is none.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfAttention):
            if module.router is not None:
                layers.append(RoutedLayer(name, "attention", module))
        elif _has(module, "experts") and (_has(module, "router") or _has(module, "gate")):
            layers.append(RoutedLayer(name, "feed_forward", module))
    if not layers:
        raise ValueError(f"model must have experts with a router, and {type(model).__name__} has none")
    return layers


def _has(module: nn.Module, child: str) -> bool:
    return isinstance(getattr(module, child, None), nn.Module)


def _attention_choice(router: nn.Module, x_TD: Tensor, output: Any) -> Choice:
    if not isinstance(router, TopKSoftRouter):
        return Choice(output, None)
    # such a router gives the gates of the chosen experts only
    logits_TA = F.linear(x_TD.float(), router.weight.float())
    return Choice(logits_TA.softmax(-1), output[1].long())


def _scores(router: nn.Module, logits_TE: Tensor) -> Tensor:
    """Softmax, or for routers that are known to score by a sigmoid that over its sum."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if _score_name(router) == "softmax":
        return logits_TE.softmax(-1)
    score_TE = logits_TE.sigmoid()
    return score_TE / score_TE.sum(-1, keepdim=True)


def _score_name(router: nn.Module) -> str:
    if isinstance(router, TopKRouter):
        return router.config.score
    from ..hf.accelerate import BY_CLASS

    families = [BY_CLASS[kind.__name__] for kind in type(router).__mro__ if kind.__name__ in BY_CLASS]
    return families[0].score if families else "softmax"


def _described(output: Any) -> str:
    if not isinstance(output, tuple):
        return type(output).__name__
    parts = [str(list(part.shape)) if torch.is_tensor(part) else type(part).__name__ for part in output]
    return f"({', '.join(parts)})"


# --- the experts' weights and outputs ---


def expert_weights(layer: RoutedLayer) -> list[Tensor] | None:
    """The matrices of all experts as [E, any shape], one per projection; None if stored otherwise."""
    if layer.kind == "attention":
        return _attention_weights(layer.block)
    experts = layer.block.get_submodule("experts")
    weights: list[Tensor] = [weight for weight in experts.parameters() if weight.dim() == 3]
    return weights if weights and len({len(weight) for weight in weights}) == 1 else None


def _attention_weights(block: nn.Module) -> list[Tensor]:
    """Projections of queries and output, and of keys and values where each expert has its own."""
    assert isinstance(block, MixtureOfAttention)
    config = block.config
    A = config.num_experts
    own = config.kv == "expert"
    S = 1 if own else config.num_kv_heads
    query_AQD = block.q_proj.weight.unflatten(0, (S, A, -1)).transpose(0, 1)
    output_ADQ = block.o_proj.weight.unflatten(1, (S, A, -1)).movedim(2, 0)
    keys = [block.k_proj.weight, block.v_proj.weight] if own else []
    return [query_AQD, output_ADQ, *(weight.unflatten(0, (A, -1)) for weight in keys)]


def expert_outputs(layer: RoutedLayer, args: tuple[Any, ...]) -> Tensor:
    """y_ETD of every expert alone, with gate 1, for the tokens of one call of `output_module`."""
    module = output_module(layer)
    assert module is not None
    if layer.kind == "attention":
        o_TSAQ = args[0]
        T, A = o_TSAQ.shape[0], o_TSAQ.shape[2]
        gates_ATA = torch.eye(A, device=o_TSAQ.device)[:, None].expand(A, T, A)
        return torch.stack([module.forward(o_TSAQ, gate_TA.contiguous()) for gate_TA in gates_ATA])
    x_TD, expert_TK, weight_TK = args[0].flatten(0, -2), args[1], args[2]
    weights = expert_weights(layer)
    assert weights is not None
    T, E = len(x_TD), len(weights[0])
    each_N1 = torch.arange(E, device=x_TD.device).repeat_interleave(T)[:, None].to(expert_TK.dtype)
    y_ND = module.forward(x_TD.repeat(E, 1), each_N1, torch.ones_like(each_N1, dtype=weight_TK.dtype))
    return y_ND.view(E, T, -1)


def output_module(layer: RoutedLayer) -> nn.Module | None:
    """The module that computes the experts from their inputs; None where each expert cannot be run alone."""
    if layer.kind == "attention":
        assert isinstance(layer.block, MixtureOfAttention)
        o_proj = layer.block.o_proj
        return o_proj if isinstance(o_proj, MixtureProjection) else None
    return None if expert_weights(layer) is None else layer.block.get_submodule("experts")
