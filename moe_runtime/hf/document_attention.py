"""Attention of packed rows one document after another: on a CPU the cheapest way.

A mask over a row of L tokens costs L² however short its documents are; document by document it is the sum of
their squares, half of it causal. The documents' ends are read on the host, which a GPU would wait for.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "documents"
# transformers' kinds of attention that depend on a document's tokens and a window alone
_KINDS = {"full_attention", "sliding_attention"}


def attend_by_document(model: Any) -> bool:
    """Have a model on a CPU that attends by `sdpa` attend packed rows, as `collate_packed` makes them,
    document by document; whether it does so now. Other batches go on as before.
    """
    config = model.config
    if (
        model.device.type != "cpu"
        or config._attn_implementation != "sdpa"
        or not set(getattr(config, "layer_types", None) or _KINDS) <= _KINDS
        or getattr(config, "attention_chunk_size", None) is not None
    ):
        return False
    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def document_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, L, P] -> [1, L, heads, P]; without `cu_seq_lens_q` as `sdpa`."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attended = [
        sdpa_attention_forward(module, *part, _window_mask(part[0].shape[2], sliding_window), **kwargs)[0]
        for part in parts
    ]
    return torch.cat(attended, dim=1), None


def _window_mask(length: int, window: int | None) -> Tensor | None:
    """bool [length, length], where a token reads the `window` last ones only; None if it reads all."""
    if window is None or length <= window:
        return None
    place = torch.arange(length)
    back = place[:, None] - place
    return (back >= 0) & (back < window)
