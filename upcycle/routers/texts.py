"""The texts of a recipe, one per expert."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_runtime.text import token_rows
from upcycle.provenance import hash_file

MIN_TOKENS = 64


@dataclass(frozen=True)
class Text:
    """The first tokens of a file, in rows [1, L]."""

    path: str
    sha256: str  # of the whole file
    rows: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.shape[1] for row in self.rows)


def read_text(path: str, tokenizer: Any, *, max_tokens: int, longest_row: int) -> Text:
    """At most `max_tokens` tokens from the beginning of a file.

    Raises:
        OSError, ValueError: the file is no UTF-8 text or has fewer than 64 tokens.
    """
    rows = token_rows(path, tokenizer, max_tokens=max_tokens, longest_row=longest_row, min_tokens=MIN_TOKENS)
    return Text(path, hash_file(Path(path).expanduser()), rows)
