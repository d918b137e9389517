"""How likely a causal LM finds several endings of one prompt, with the prompt computed once.

A batch's prompts are padded in front, so that all end at one place of the key-value cache and tokens are as
far apart as without padding. Their keys and values are then copied for each ending, which goes on from there.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.generate import evaluating
from moe_runtime.hf.cache import holds_keys_and_values_only

from .scoring import Score, Scored, as_scores, fits, keeps_some_logits, padded, score, sums

# Of these a longer sequence turns every position otherwise, also those of a prompt that was computed before.
_ROTATIONS_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class _Group:
    """Sequences that begin alike, their number among all groups, and how many tokens are shared."""

    sequences: Sequence[Scored]
    number: int
    shared: int

    @property
    def longest_ending(self) -> int:
        return max(len(sequence.ids) for sequence in self.sequences) - self.shared

    def fits_alone(self, vocab_size: int) -> bool:
        rows, ending = len(self.sequences), self.longest_ending
        return fits(rows * (self.shared + ending), rows * ending * vocab_size)


def score_endings(
    model: Any, groups: Sequence[Sequence[Scored]], on_tokens: Callable[[int], None] | None = None
) -> list[list[Score]]:
    """As `score` of all sequences, in a list for each group; what a group's sequences share is computed once
    if the model allows it.
    """
    sharing = [_Group(group, number, shared_tokens(group)) for number, group in enumerate(groups)]
    sharing = [group for group in sharing if group.shared and group.fits_alone(model.config.vocab_size)]
    if sharing and not shares_prompts(model):
        sharing = []
    found = _score_groups(model, sharing, on_tokens)
    alone = [group for number, group in enumerate(groups) if number not in found]
    others = iter(score(model, [sequence for group in alone for sequence in group], on_tokens))
    return [
        found[number] if number in found else [next(others) for _ in group]
        for number, group in enumerate(groups)
    ]


def shared_tokens(group: Sequence[Scored]) -> int:
    """How many tokens all sequences begin with that need no logits."""
    longest = min(sequence.start for sequence in group) - 1
    columns = zip(*(sequence.ids[:longest] for sequence in group), strict=True)
    return next((place for place, column in enumerate(columns) if len(set(column)) > 1), longest)


@torch.no_grad()
def shares_prompts(model: Any) -> bool:
    """Whether a prompt's keys and values, padded in front, are all that an ending needs of it.

    The model must be told positions, leave out a prompt's logits, and its cache must hold keys and values of
    a whole sequence or a window.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters or not keeps_some_logits(model):
        return False
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False
    rotations = str(getattr(config, "rope_parameters", None))
    if any(f"'{name}'" in rotations for name in _ROTATIONS_BY_LENGTH):
        return False
    with evaluating(model):
        token_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        outputs = model(input_ids=token_11, use_cache=True)
    return holds_keys_and_values_only(getattr(outputs, "past_key_values", None))


def _score_groups(
    model: Any, groups: list[_Group], on_tokens: Callable[[int], None] | None
) -> dict[int, list[Score]]:
    """By the groups' numbers."""
    found: list[Tensor] = []
    done: list[_Group] = []
    with evaluating(model):
        for batch in _batches(groups, model.config):
            found += _score_batch(model, batch)
            done += batch
            if on_tokens is not None:
                on_tokens(sum(len(sequence.ids) for group in batch for sequence in group.sequences))
    scores = iter(as_scores(found, [sequence for group in done for sequence in group.sequences]))
    return {group.number: [next(scores) for _ in group.sequences] for group in done}


def _batches(groups: list[_Group], config: Any) -> Iterator[list[_Group]]:
    """Longest prompts first; a copy of a prompt's keys and values counts as its tokens do. The longest prompt
    with the longest ending, maybe another group's, is no longer than the model takes.
    """
    most = getattr(config, "max_position_embeddings", None) or math.inf
    batch: list[_Group] = []
    rows = ending = 0
    for group in sorted(groups, key=lambda group: -group.shared):
        new_rows, new_ending = rows + len(group.sequences), max(ending, group.longest_ending)
        keys = (batch or [group])[0].shared + new_ending
        if batch and (keys > most or not fits(new_rows * keys, new_rows * new_ending * config.vocab_size)):
            yield batch
            batch, new_rows, new_ending = [], len(group.sequences), group.longest_ending
        batch.append(group)
        rows, ending = new_rows, new_ending
    if batch:
        yield batch


def _score_batch(model: Any, batch: list[_Group]) -> list[Tensor]:
    """Sum of the log-likelihoods and number of right tokens, [2] of each sequence."""
    cache, mask_GP = _prompts(model, batch)
    group_of_row = [number for number, group in enumerate(batch) for _ in group.sequences]
    rows = [(sequence, group.shared) for group in batch for sequence in group.sequences]
    # the last token is needed only where no token is scored, since there must be one
    fed = [sequence.ids[shared : max(shared + 1, len(sequence.ids) - 1)] for sequence, shared in rows]
    ids_BE, mask_BE = padded(fed, model.device)
    group_of_row_B = torch.tensor(group_of_row)
    cache.batch_select_indices(group_of_row_B)  # from the CPU: layers may be on several devices
    position_BE = torch.tensor([shared for _, shared in rows], device=model.device)[:, None]
    position_BE = position_BE + (mask_BE.cumsum(1) - 1)  # padding stands where the last token does
    logits_BEV = model(
        input_ids=ids_BE,
        attention_mask=torch.cat([mask_GP[group_of_row_B], mask_BE], 1),
        position_ids=position_BE,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return [
        sums(logits_BEV[row], shared, torch.tensor(sequence.ids, device=model.device), sequence.start)
        for row, (sequence, shared) in enumerate(rows)
    ]


def _prompts(model: Any, batch: list[_Group]) -> tuple[Any, Tensor]:
    """The cache of what each group shares, and its mask, padded in front."""
    reversed_rows = [group.sequences[0].ids[: group.shared][::-1] for group in batch]
    ids_GP, mask_GP = (padded_GP.flip(1) for padded_GP in padded(reversed_rows, model.device))
    cache = model(
        input_ids=ids_GP,
        attention_mask=mask_GP,
        position_ids=(mask_GP.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    return cache, mask_GP
