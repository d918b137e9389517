"""The texts of a recipe, one per expert."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_runtime.text import rows_of_text, token_rows
from upcycle.provenance import hash_file
from upcycle.recipe import name_of_data

MIN_TOKENS = 64  # of a file


@dataclass(frozen=True)
class Text:
    """The first tokens of a file, or those of all prompts, in rows [1, L]."""

    name: str
    sha256: str  # of the whole file
    rows: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.shape[1] for row in self.rows)


def read_text(text: str | tuple[str, ...], tokenizer: Any, *, max_tokens: int, longest_row: int) -> Text:
    """At most `max_tokens` tokens from the beginning of a file or of each prompt.

    Raises:
        OSError, ValueError: a file is no UTF-8 text or has fewer than 64 tokens, or the prompts have none.
    """
    if isinstance(text, str):
        rows = token_rows(
            text, tokenizer, max_tokens=max_tokens, longest_row=longest_row, min_tokens=MIN_TOKENS
        )
        return Text(text, hash_file(Path(text).expanduser()), rows)
    rows = tuple(
        row
        for prompt in text
        for row in rows_of_text(prompt, tokenizer, max_tokens=max_tokens, longest_row=longest_row)
    )
    if not rows:
        raise ValueError(f"the prompts of router.data must not be empty, got {list(text)}")
    return Text(name_of_data(text), sha256("\0".join(text).encode()).hexdigest(), rows)
