"""How likely a causal LM finds the ends of sequences, in batches.

log p(x_s … x_n | x_0 … x_{s-1}) = Σ_{i >= s} log softmax(logits_{i-1})[x_i]
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.generate import evaluating

# Of one batch at most, unless a single sequence has more.
LOGITS_AT_ONCE = 10**8
TOKENS_AT_ONCE = 8192


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
    found: dict[int, Tensor] = {}
    with evaluating(model):
        for batch in _batches(sequences, model.config.vocab_size, keeps_some_logits(model)):
            chosen = [sequences[place] for place in batch]
            found.update(zip(batch, _score_batch(model, chosen), strict=True))
            if on_tokens is not None:
                on_tokens(sum(len(sequence.ids) for sequence in chosen))
    return as_scores([found[place] for place in range(len(sequences))], sequences)


def keeps_some_logits(model: Any) -> bool:
    """Whether the model can leave out logits of the first tokens."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _batches(sequences: Sequence[Scored], vocab_size: int, keeps_some: bool) -> Iterator[list[int]]:
    """Places of sequences, longest first, in lists that the limits allow."""
    batch: list[int] = []
    kept = 0  # logits of each row
    for place in sorted(range(len(sequences)), key=lambda place: -len(sequences[place].ids)):
        longest = len(sequences[batch[0] if batch else place].ids)
        first = sequences[place].start - 1 if keeps_some else 0
        rows, kept = len(batch) + 1, max(kept, longest - first)
        if batch and not fits(rows * longest, rows * kept * vocab_size):
            yield batch
            batch, kept = [], len(sequences[place].ids) - first
        batch.append(place)
    if batch:
        yield batch


def fits(tokens: int, logits: int) -> bool:
    return tokens <= TOKENS_AT_ONCE and logits <= LOGITS_AT_ONCE


def _score_batch(model: Any, chosen: Sequence[Scored]) -> list[Tensor]:
    """Sum of the log-likelihoods and number of right tokens, [2] of each sequence."""
    ids_BL, mask_BL = padded([sequence.ids for sequence in chosen], model.device)
    first, options = 0, {}
    if keeps_some_logits(model):
        first = min(sequence.start for sequence in chosen) - 1
        options["logits_to_keep"] = ids_BL.shape[1] - first
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, **options).logits
    return [
        sums(logits_BLV[row], first, ids_BL[row, : len(sequence.ids)], sequence.start)
        for row, sequence in enumerate(chosen)
    ]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens padded behind, and the mask of those that are none."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BL = pad([torch.tensor(row) for row in rows], batch_first=True)
    mask_BL = pad([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
    return ids_BL.to(device), mask_BL.to(device)


def sums(logits_LV: Tensor, first: int, ids_L: Tensor, start: int) -> Tensor:
    """Log-likelihood and number of right tokens of `ids_L` from `start` on, where the logits begin with those
    of token `first`.
    """
    target_E = ids_L[start:]
    logits_EV = logits_LV[start - 1 - first : len(ids_L) - 1 - first].float()
    log_p = -torch.nn.functional.cross_entropy(logits_EV, target_E, reduction="sum").double()
    return torch.stack([log_p, (logits_EV.argmax(-1) == target_E).sum().double()])


def as_scores(found: Sequence[Tensor], sequences: Sequence[Scored]) -> list[Score]:
    """What `sums` gave of each sequence, on the CPU; the device is waited for once."""
    values = torch.stack(list(found)).tolist() if found else []
    return [
        Score(log_likelihood, len(sequence.ids) - sequence.start, round(right))
        for (log_likelihood, right), sequence in zip(values, sequences, strict=True)
    ]
