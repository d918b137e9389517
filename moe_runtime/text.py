"""A text file as rows of token ids."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROW_LENGTH = 512
# A longer file is read no further than so many characters for every token that is wanted.
_CHARACTERS_PER_TOKEN = 16


def token_rows(
    path: str | Path, tokenizer: Any, *, max_tokens: int, longest_row: int, min_tokens: int = 1
) -> tuple[Tensor, ...]:
    """The first `max_tokens` tokens of a file in rows [1, L]; only the last is shorter, and none is padded.

    Args:
        path: of UTF-8 text.
        tokenizer: of transformers.
        max_tokens: tokens at most, with those that the tokenizer adds.
        longest_row: what the model takes; rows have at most 512 tokens.
        min_tokens: of the whole file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8 text, or too short.
    """
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            text = file.read(_CHARACTERS_PER_TOKEN * max_tokens)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, and is not: {error.reason}") from None
    rows = rows_of_text(text, tokenizer, max_tokens=max_tokens, longest_row=longest_row)
    num_tokens = sum(row.shape[1] for row in rows)
    if num_tokens < min_tokens:
        raise ValueError(f"{path} must give at least {min_tokens} tokens, got {num_tokens}")
    return rows


def rows_of_text(text: str, tokenizer: Any, *, max_tokens: int, longest_row: int) -> tuple[Tensor, ...]:
    """The same of a text in memory; no rows of no tokens."""
    ids = tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
    rows = torch.tensor(ids, dtype=torch.int64).split(min(ROW_LENGTH, longest_row))
    return tuple(row[None] for row in rows if len(row))
