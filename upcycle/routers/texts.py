"""Text files as rows of token ids, one file per expert."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.errors import UpcycleError
from upcycle.provenance import hash_file

ROW_LENGTH = 512
MIN_TOKENS = 64
# A longer file is read no further than so many characters for every token that is wanted.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Text:
    """The first tokens of a file. `rows` are [1, L]; only the last is shorter, so that none is padded."""

    path: str
    sha256: str  # of the whole file
    rows: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.shape[1] for row in self.rows)


def read_text(path: str, tokenizer: Any, *, max_tokens: int, longest_row: int) -> Text:
    """At most `max_tokens` tokens from the beginning of a file.

    Raises:
        UpcycleError: the file is no UTF-8 text or has fewer than 64 tokens.
    """
    file = Path(path).expanduser()
    try:
        with file.open(encoding="utf-8") as opened:
            words = opened.read(_CHARACTERS_PER_TOKEN * max_tokens)
    except OSError as error:
        raise UpcycleError(f"router.data: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UpcycleError(f"router.data: {path} must be UTF-8 text, and is not: {error.reason}") from None
    ids = tokenizer(words, truncation=True, max_length=max_tokens)["input_ids"]
    if len(ids) < MIN_TOKENS:
        raise UpcycleError(
            f"router.data: {path} must give at least {MIN_TOKENS} tokens for its expert, got {len(ids)}"
        )
    length = min(ROW_LENGTH, longest_row)
    rows = torch.tensor(ids).split(length)
    return Text(path, hash_file(file), tuple(row[None] for row in rows))
