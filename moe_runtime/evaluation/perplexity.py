"""Perplexity of a text file."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .scoring import Scored, score

# A longer file is read no further than so many characters for every token that is wanted.
_CHARACTERS_PER_TOKEN = 16


def text_rows(path: str | Path, tokenizer: Any, *, max_tokens: int, length: int) -> tuple[list[Scored], int]:
    """The first `max_tokens` tokens of a text in rows of `length`, and how many bytes of UTF-8 they are.

    Every token but the first of a row is scored.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8 text, has no two tokens, or the tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "--text needs a fast tokenizer, which tells where tokens end, and "
            f"{type(tokenizer).__name__} is none"
        )
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig") as file:
            text = file.read(_CHARACTERS_PER_TOKEN * max_tokens)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, and is not: {error.reason}") from None
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"][:max_tokens], encoding["offset_mapping"][:max_tokens]
    rows = [Scored(ids[start : start + length], 1) for start in range(0, len(ids), length)]
    if len(ids) < 2:
        raise ValueError(f"{path} must give at least 2 tokens, got {len(ids)}")
    return rows, len(text[: offsets[-1][1]].encode("utf-8"))


def perplexity(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    max_tokens: int,
    length: int,
    on_tokens: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """nats per token, e to the power of it, bits per byte of the text, and how many tokens and bytes.

        nats = -Σ log p / scored tokens,   bits per byte = nats · tokens / (bytes · ln 2)

    Raises:
        OSError, ValueError: as `text_rows`.
    """
    rows, num_bytes = text_rows(path, tokenizer, max_tokens=max_tokens, length=length)
    scores = score(model, rows, on_tokens)
    nats = -sum(s.log_likelihood for s in scores) / sum(s.tokens for s in scores)
    tokens = sum(len(row.ids) for row in rows)
    return {
        "tokens": tokens,
        "bytes": num_bytes,
        "nats_per_token": nats,
        "perplexity": math.exp(min(nats, 700.0)),  # no float holds more
        "bits_per_byte": nats * tokens / num_bytes / math.log(2),
    }
