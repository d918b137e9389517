"""Whether a model computes packed samples as it computes them alone."""

from typing import Any

import torch

from moe_runtime.generate import evaluating

from .rows import collate_packed, make_row
from .samples import Sample

_LENGTHS = (13, 9)
_DRAWS = 3


def keeps_samples_apart(model: Any, row_length: int) -> bool:
    """Whether the logits of two short packed samples are those of each alone, up to rounding.

    A router that is undecided between two experts may decide otherwise by rounding; so samples are drawn up
    to three times, and once without a difference is enough.

    Args:
        model: a causal LM, as it is going to attend.
        row_length: tokens of the longest packed row. A model that attends to `index_topk` tokens chooses them
            from all of a row, which short samples do not show.
    """
    config = model.config.get_text_config()
    if row_length > (getattr(config, "index_topk", None) or row_length):
        return False
    draw = torch.Generator().manual_seed(0)
    with evaluating(model):
        return any(_same_logits(model, config.vocab_size, draw) for _ in range(_DRAWS))


def _same_logits(model: Any, vocab_size: int, draw: torch.Generator) -> bool:
    ids = [torch.randint(vocab_size, (length,), generator=draw) for length in _LENGTHS]
    samples = [(number, Sample(part.numpy(), part.numpy())) for number, part in enumerate(ids)]
    batch = collate_packed([make_row(samples, packed=True)])
    packed = {name: value for name, value in batch.items() if name not in ("sample", "labels")}
    packed = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in packed.items()}
    logits = model(**packed, use_cache=False).logits.float()
    alone = [model(input_ids=part[None].to(model.device), use_cache=False).logits for part in ids]
    expected = torch.cat(alone, 1).float()
    return bool((logits - expected).abs().max() <= 1e-3 * expected.std())
