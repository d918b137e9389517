"""Run a model over text and sum up what its routers do. No activation is kept; what is summed stays on the
device until the end."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Choice, RoutedLayer, expert_outputs, expert_weights, output_module, routed_layers
from .results import ExpertStats, Matrix, RouterStats

Batch = Tensor | Mapping[str, Tensor]

# Experts' outputs are compared on so few tokens at once, E times as many rows.
_TOKENS_AT_ONCE = 16
# Columns of the experts' weights that are float32 at once.
_COLUMNS_AT_ONCE = 1 << 20


@torch.no_grad()
def expert_stats(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    *,
    output_tokens: int = 64,
    on_batch: Callable[[int], object] = lambda _: None,
) -> ExpertStats:
    """Statistics of every router and its experts over token ids; see `RouterStats`.

    The model runs in eval mode without gradients and is left as it was, so that this can be called between
    two steps of a training.

    Args:
        model: a causal language model of this project or a MoE model of transformers.
        batches: token ids [B, L], or mappings with `input_ids` and `attention_mask` as data loaders give
            them; or such batches by domain, whose loads are then also counted apart.
        output_tokens: tokens on which the outputs of all experts are compared, from the beginning; 0: none.
        on_batch: called with the number of tokens of every batch that is done, padding included.

    Raises:
        ValueError: the model has no experts, there is no token, or a router gives what is not known.
    """
    domains = batches if isinstance(batches, Mapping) else {"all": batches}
    if "input_ids" in domains:
        raise ValueError("batches must be a list of batches or such lists by domain, got one batch")
    sums = [_RouterSums(layer, len(domains), output_tokens) for layer in routed_layers(model)]
    tokens = []
    for domain, of_domain in enumerate(domains.values()):
        count = torch.zeros((), dtype=torch.int64)
        for batch in of_domain:
            ids_BL, mask_BL = _ids_and_mask(batch, model)
            mask_T = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
            if not ids_BL.numel():  # which not every model of transformers takes
                continue
            with _watched(model, sums, mask_T.flatten(), domain):
                _run(model, ids_BL, mask_BL)
            count = count + mask_T.sum().cpu()
            on_batch(ids_BL.numel())
        tokens.append(int(count))
    if not sum(tokens):
        raise ValueError("batches must hold at least one token that is no padding, got none")
    return ExpertStats(
        tokens=dict(zip(domains, tokens, strict=True)),
        routers=tuple(of_router.result(list(domains)) for of_router in sums),
    )


def _ids_and_mask(batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor | None]:
    device = next(model.parameters()).device
    if not isinstance(batch, Mapping):
        return batch.to(device), None
    mask_BL = batch.get("attention_mask")
    return batch["input_ids"].to(device), None if mask_BL is None else mask_BL.to(device)


def _run(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor | None) -> None:
    """Everything but the head."""
    body: Any = getattr(model, "base_model", model)
    body(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)


@contextmanager
def _watched(model: nn.Module, sums: list["_RouterSums"], mask_T: Tensor, domain: int) -> Iterator[None]:
    """Hooks on routers and experts, in eval mode; both are undone."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        for of_router in sums:
            for handle in of_router.hooks(mask_T, domain):
                stack.callback(handle.remove)
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


class _RouterSums:
    """Sums over tokens of one router, in float64."""

    def __init__(self, layer: RoutedLayer, num_domains: int, output_tokens: int) -> None:
        self.layer = layer
        self.num_domains = num_domains
        self.output_tokens = output_tokens
        self.experts_per_token = 0
        self.load: Tensor | None = None  # [domains, E]
        self.entropy: Tensor | float = 0.0
        self.margin: Tensor | float = 0.0
        self.tokens: Tensor | float = 0.0
        self.compared: Tensor | float = 0.0
        self.cosine: Tensor | None = None  # [E, E]

    def hooks(self, mask_T: Tensor, domain: int) -> list[Any]:
        def on_router(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._add(self.layer.choice(args, output), mask_T, domain)

        def on_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._compare((*args, *kwargs.values()), mask_T)

        handles = [self.layer.router.register_forward_hook(on_router)]
        module = output_module(self.layer)
        if module is not None:
            handles.append(module.register_forward_hook(on_experts, with_kwargs=True))
        return handles

    def _add(self, choice: Choice, mask_T: Tensor, domain: int) -> None:
        score_TE = choice.score_TE.double()
        E = score_TE.shape[1]
        if self.load is None:
            self.load = score_TE.new_zeros(self.num_domains, E)
        counted_T1 = mask_T[:, None].double()
        if choice.expert_TK is None:
            self.experts_per_token = E
            self.load[domain] += (score_TE * counted_T1).sum(0)
        else:
            self.experts_per_token = choice.expert_TK.shape[1]
            chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, choice.expert_TK, True)
            self.load[domain] += (chosen_TE * counted_T1).sum(0)
            least_T = score_TE.masked_fill(~chosen_TE, 1.0).amin(1)
            most_T = score_TE.masked_fill(chosen_TE, 0.0).amax(1)
            self.margin = self.margin + ((least_T - most_T) * counted_T1[:, 0]).sum()
        self.entropy = self.entropy - (torch.xlogy(score_TE, score_TE) * counted_T1).sum()
        self.tokens = self.tokens + counted_T1.sum()

    def _compare(self, args: tuple[Any, ...], mask_T: Tensor) -> None:
        """Cosines between the outputs of all experts, for the first tokens."""
        num = min(self.output_tokens, len(mask_T))
        self.output_tokens -= num
        for start in range(0, num, _TOKENS_AT_ONCE):
            part = slice(start, min(start + _TOKENS_AT_ONCE, num))
            rows = [arg.flatten(0, -2)[part] if arg.dim() < 4 else arg[part] for arg in args[:3]]
            y_ETD = torch.nn.functional.normalize(expert_outputs(self.layer, tuple(rows)).double(), dim=-1)
            counted_T = mask_T[part].double()
            cosine_EE = torch.einsum("etd,ftd,t->ef", y_ETD, y_ETD, counted_T)
            self.cosine = cosine_EE if self.cosine is None else self.cosine + cosine_EE
            self.compared = self.compared + counted_T.sum()

    def result(self, domains: list[str]) -> RouterStats:
        assert self.load is not None
        total_E = self.load.sum(0)
        by_domain = self.load / self.load.sum(1, keepdim=True).clamp_min(1)
        E = len(total_E)
        everything = self.experts_per_token == E
        weights = expert_weights(self.layer)
        return RouterStats(
            name=self.layer.name,
            kind=self.layer.kind,
            num_experts=E,
            experts_per_token=self.experts_per_token,
            load=tuple((total_E / total_E.sum()).tolist()),
            load_by_domain=dict(zip(domains, map(tuple, by_domain.tolist()), strict=True)),
            entropy=float(self.entropy / self.tokens),
            margin=None if everything else float(self.margin / self.tokens),
            weight_cosine=None if weights is None else weight_cosine(weights),
            output_cosine=None if self.cosine is None else _matrix(self.cosine / self.compared),
        )


def weight_cosine(weights: list[Tensor]) -> Matrix:
    """Cosines between experts, all projections of an expert as one vector; weights are [E, any shape]."""
    E = len(weights[0])
    gram_EE = torch.zeros(E, E, dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        for part in weight.detach().flatten(1).split(max(1, _COLUMNS_AT_ONCE // E), dim=1):
            gram_EE += (part.float() @ part.float().t()).double()
    length_E = gram_EE.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return _matrix(gram_EE / length_E[:, None] / length_E)


def _matrix(values_EE: Tensor) -> Matrix:
    return tuple(map(tuple, values_EE.tolist()))
