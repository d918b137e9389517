"""Packed batches: documents of different lengths one after another in one row, of which none sees another.

`cu_seqlens [documents + 1]`, int32 on the device, are the ends of the documents after a leading 0, as
flash-attn has them: document i has the tokens from cu_seqlens[i] up to cu_seqlens[i + 1]. The last one is L,
which nothing checks, because that would wait for the device. Attention is flash-attn's for documents of
different lengths where it is installed and takes the tensors; elsewhere a mask [L, L] keeps documents apart.
"""

from pathlib import Path

import torch
from torch import Tensor

from moe_runtime.optional import installed

FLASH_DEVICES = ("cuda",)
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_WIDTHS = range(8, 257, 8)


def _flash_version() -> int | None:
    """3 or 2, the higher one that is installed. Nothing is imported."""
    if installed("flash_attn_interface") is not None:
        return 3
    package = installed("flash_attn")  # version 4 has a package of this name too, without the module
    folders = [] if package is None else package.submodule_search_locations or []
    return 2 if any(Path(folder, "flash_attn_interface.py").exists() for folder in folders) else None


FLASH_VERSION = _flash_version()


def packed_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """position_BL [1, num_tokens], int64: of each token in its own document, for `rotary_tables`.

    Args:
        cu_seqlens: see above; a document may be empty.
        num_tokens: L, all documents together.

    Raises:
        ValueError: cu_seqlens is not int32 with one axis and an element.
    """
    check_cu_seqlens("cu_seqlens", cu_seqlens)
    token_L, document_L = _documents(cu_seqlens, num_tokens)
    return (token_L - cu_seqlens[document_L]).long().unsqueeze(0)


def same_document(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """bool [num_tokens, num_tokens]: whether two tokens are of one document."""
    _, document_L = _documents(cu_seqlens, num_tokens)
    return document_L[:, None] == document_L


def _documents(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens 0 to L - 1, and which document each is of."""
    token_L = torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32)
    return token_L, torch.searchsorted(cu_seqlens.contiguous(), token_L, right=True) - 1


def check_packed(query: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    """Both or neither are given, in the form that flash-attn takes, with one row of tokens.

    Raises:
        ValueError: they are not.
    """
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"cu_seqlens must be given with max_seqlen ({max_seqlen}), got None")
        return
    check_cu_seqlens("cu_seqlens", cu_seqlens)
    if type(max_seqlen) is not int:
        raise ValueError(
            "max_seqlen must be the length of the longest document as a number on the host, so that nothing "
            f"waits for the device; got {'None' if max_seqlen is None else type(max_seqlen).__name__}"
        )
    if query.shape[0] != 1:
        raise ValueError(
            f"x must be one row [1, L, D] that holds all documents with cu_seqlens, got {query.shape[0]} rows"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor) -> None:
    """Raise ValueError, with the name that the caller knows it by, unless it has the form above."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"{name} must be int32 of shape (documents + 1,), got "
            f"{str(cu_seqlens.dtype).removeprefix('torch.')} of shape {tuple(cu_seqlens.shape)}"
        )


def flash_takes(query: Tensor) -> bool:
    """Whether flash-attn is installed and its kernels take tensors [1, heads, L, P] like this one."""
    fits = query.dtype in FLASH_DTYPES and query.shape[-1] in FLASH_WIDTHS and query.shape[2] > 0
    return FLASH_VERSION is not None and query.device.type in FLASH_DEVICES and fits


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    sliding_window: int | None,
    scale: float | None,
    logit_cap: float | None,
) -> Tensor:
    """Causal attention of each document by flash-attn: query [1, heads, L, P], key and value [1, kv heads, L,
    P] -> [1, L, heads, P].
    """
    if FLASH_VERSION == 3:
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
    cu_seqlens = cu_seqlens.contiguous()
    attended = flash_attn_varlen_func(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),  # [L, heads, P]
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=query.shape[-1] ** -0.5 if scale is None else scale,
        **({} if logit_cap is None else {"softcap": logit_cap}),  # which early versions lack
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),  # besides the token
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # early versions of FlashAttention 3 return the softmax's logarithms too
    return (attended[0] if isinstance(attended, tuple) else attended).unsqueeze(0)
