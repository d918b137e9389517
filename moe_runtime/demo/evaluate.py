"""Held-out perplexity per domain, and where a mixture sends the tokens of each domain."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routers import SoftRouter

ROWS_PER_BATCH = 6


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on the held-out rows of every domain; losses are nats per token.

    `expert_share[domain][layer]` is the share of the layer's routing slots that each expert got, and
    `attention_gate[domain][layer]` the mean gate of each attention expert; both empty without a router.
    """

    row_losses: dict[str, tuple[float, ...]]
    tokens_per_row: int
    expert_share: dict[str, list[list[float]]]
    attention_gate: dict[str, list[list[float]]]

    @property
    def losses(self) -> dict[str, float]:
        return {name: sum(rows) / len(rows) for name, rows in self.row_losses.items()}

    @property
    def perplexities(self) -> dict[str, float]:
        return {name: math.exp(loss) for name, loss in self.losses.items()}

    @property
    def mean_perplexity(self) -> float:
        """The plain mean over domains."""
        return sum(self.perplexities.values()) / len(self.row_losses)

    @property
    def geometric_mean_perplexity(self) -> float:
        """exp of the mean loss over domains: a domain of high perplexity weighs no more than another."""
        return math.exp(sum(self.losses.values()) / len(self.row_losses))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`ratio`: mean perplexity of one model over another's; `error`: its standard error over rows."""

    ratio: float
    error: float


def evaluate(
    model: Any,
    heldout: Mapping[str, Tensor],
    *,
    on_share: Callable[[float], None] = lambda share: None,
) -> Evaluation:
    """Losses of a causal LM on rows [N, L] of each domain, bfloat16 products over the model's weights."""
    model.eval()
    num_batches = sum(len(rows_NL.split(ROWS_PER_BATCH)) for rows_NL in heldout.values())
    done = 0
    row_losses, shares, gates = {}, {}, {}
    for name, rows_NL in heldout.items():
        losses, counts = [], []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _recorded_gates(model) as recorded:
            for batch_BL in rows_NL.split(ROWS_PER_BATCH):
                outputs = model(input_ids=batch_BL, use_cache=False)
                losses += _row_losses(outputs.logits, batch_BL)
                count = getattr(outputs, "expert_count", None)
                counts += [] if count is None else [count]
                done += 1
                on_share(done / num_batches)
        row_losses[name] = tuple(losses)
        if counts:
            count_LE = torch.stack(counts).sum(0).double()
            shares[name] = (count_LE / count_LE.sum(1, keepdim=True)).tolist()
        if recorded:
            gates[name] = [torch.cat(gate).mean(0).tolist() for gate in recorded.values()]
    return Evaluation(
        row_losses=row_losses,
        tokens_per_row=rows_NL.shape[1] - 1,
        expert_share=shares,
        attention_gate=gates,
    )


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Mean perplexity of `a` over that of `b`, on the same held-out rows.

    The standard error is the delta method's: the ratio changes with the mean loss of a domain by that
    domain's share of the mean perplexity, and the mean losses vary as their rows do, row by row in pairs.
    """
    ratio = a.mean_perplexity / b.mean_perplexity
    variance = 0.0
    for name in a.row_losses:
        share_a = a.perplexities[name] / sum(a.perplexities.values())
        share_b = b.perplexities[name] / sum(b.perplexities.values())
        effects = torch.tensor(
            [share_a * x - share_b * y for x, y in zip(a.row_losses[name], b.row_losses[name], strict=True)],
            dtype=torch.float64,
        )
        if len(effects) > 1:
            variance += effects.var().item() / len(effects)
    return Comparison(ratio=ratio, error=ratio * math.sqrt(variance))


def _row_losses(logits_BLV: Tensor, ids_BL: Tensor) -> list[float]:
    losses = F.cross_entropy(
        logits_BLV[:, :-1].float().flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(ids_BL), -1).mean(1).tolist()


@contextmanager
def _recorded_gates(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Gates [T, A] of every attention router by its name, in the order of layers."""
    recorded: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, SoftRouter):

            def keep(module: Any, inputs: Any, gate_TA: Tensor, name: str = name) -> None:
                recorded.setdefault(name, []).append(gate_TA)

            handles.append(module.register_forward_hook(keep))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
