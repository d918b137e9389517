"""How likely a causal LM finds the ends of sequences, in batches.

log p(x_s … x_n | x_0 … x_{s-1}) = Σ_{i >= s} log softmax(logits_{i-1})[x_i]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.generate import evaluating

# Of one batch at most, unless a single sequence has more.
_LOGITS_AT_ONCE = 10**8
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Scored:
    """A sequence, and the place of its first token that is scored: at least 1, at most its length."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Score:
    """Of the scored tokens of one sequence."""

    log_likelihood: float
    tokens: int
    right: int  # that were the most likely one


def score(
    model: Any, sequences: Sequence[Scored], on_tokens: Callable[[int], None] | None = None
) -> list[Score]:
    """The scores of all sequences, in order; longest first in batches padded behind.

    Args:
        model: of transformers.
        sequences: none longer than the model takes.
        on_tokens: called with the tokens of each batch that is done.
    """
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place].ids))
    budget = min(_TOKENS_AT_ONCE, max(1, _LOGITS_AT_ONCE // model.config.vocab_size))
    found: dict[int, Tensor] = {}
    with evaluating(model):
        while order:
            size = max(1, budget // len(sequences[order[0]].ids))
            batch, order = order[:size], order[size:]
            chosen = [sequences[place] for place in batch]
            found.update(zip(batch, _score_batch(model, chosen), strict=True))
            if on_tokens is not None:
                on_tokens(sum(len(sequence.ids) for sequence in chosen))
    sums = torch.stack([found[place] for place in range(len(sequences))]).tolist() if found else []
    return [
        Score(log_likelihood, len(sequence.ids) - sequence.start, round(right))
        for (log_likelihood, right), sequence in zip(sums, sequences, strict=True)
    ]


def _score_batch(model: Any, chosen: Sequence[Scored]) -> list[Tensor]:
    """Sum of the log-likelihoods and number of right tokens, [2] of each sequence."""
    rows = [torch.tensor(sequence.ids) for sequence in chosen]
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BL = pad(rows, batch_first=True).to(model.device)
    mask_BL = pad([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
    sums = []
    for row, sequence in enumerate(chosen):
        target_L = ids_BL[row, sequence.start : len(sequence.ids)]
        logits_LV = logits_BLV[row, sequence.start - 1 : len(sequence.ids) - 1].float()
        log_p = -torch.nn.functional.cross_entropy(logits_LV, target_L, reduction="sum").double()
        sums.append(torch.stack([log_p, (logits_LV.argmax(-1) == target_L).sum().double()]))
    return sums
