"""The batch of an update of the weights: what is counted in it, and how its samples are named."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .balance import tokens_of
from .data.samples import IGNORED


@dataclass
class Update:
    """What is known of the batch that the weights are being updated by."""

    batches: list[dict[str, Any]]
    samples: list[Any]  # of each micro-batch
    total: Tensor  # [labels, tokens, sequences, positions] of all processes
    losses: list[Tensor] = field(default_factory=list)
    count_LE: Tensor | None = None  # expert counts of this process so far
    whole_count_LE: Tensor | None = None  # for "global_batch": of the whole batch, before it is trained on


def totals(batch: Mapping[str, Any]) -> Tensor:
    """[labels, tokens, sequences, positions] of a micro-batch, int64."""
    labels = (batch["labels"][..., 1:] != IGNORED).sum()
    positions = torch.tensor(batch["input_ids"].numel(), device=labels.device)
    return torch.cat([labels[None], tokens_of(batch).totals(), positions[None]])


def listed(samples: list[Any]) -> str:
    """Ids of samples, however they are nested, and not too many."""
    flat = torch.utils._pytree.tree_leaves([s.tolist() if isinstance(s, Tensor) else s for s in samples])
    names = [str(sample) for sample in flat]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
