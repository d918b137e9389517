"""A sample's tokens, and which of them count: instructions, conversations and texts. Torch-free.

One sample is `{"prompt": …, "completion": …}`, `{"messages": [{"role": …, "content": …}, …]}` or
`{"text": …}`; other keys are left alone. The loss counts what the model is to say: the completion with its
end-of-text token, the assistant's messages, or a whole text.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import RunError

IGNORED = -100  # the label of a token that does not count

Encoded = tuple[list[int], list[bool]]  # tokens, and whether each counts


@dataclass(frozen=True)
class Sample:
    """Tokens of one sample, and as labels those that count."""

    ids_L: NDArray[np.int64]
    labels_L: NDArray[np.int64]


def make_sample(encoded: Encoded, max_length: int) -> Sample | None:
    """The first `max_length` tokens; None if nothing that counts is among them.

    A first token that counts keeps its label, though nothing before it could predict it.
    """
    ids, counted = encoded
    ids_L = np.array(ids[:max_length], np.int64)
    labels_L = np.where(np.array(counted[:max_length], bool), ids_L, IGNORED)
    return Sample(ids_L, labels_L) if (labels_L[1:] != IGNORED).any() else None


def json_objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on every line that is not empty, after the words that say where it is.

    Raises:
        RunError: a line holds anything else.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise RunError(f"{where}: must be one JSON object") from None
        if not isinstance(values, dict):
            raise RunError(f"{where}: must be one JSON object, got {type(values).__name__}")
        yield where, values


def encode_sample(where: str, values: dict[str, Any], tokenizer: Any) -> Encoded:
    """Tokens of one sample.

    Raises:
        RunError: it has another form, which the message, beginning with `where`, tells.
    """
    ids: list[int] = []
    counted: list[bool] = []
    for part, counts in _parts(where, values, tokenizer):
        # a chat template writes the token for a beginning itself
        of_part = encode(tokenizer, part, more=bool(ids) or "messages" in values)
        ids += of_part
        counted += [counts] * len(of_part)
    if "messages" not in values and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        counted.append(True)
    return ids, counted


def encode_blocks(pieces: Iterable[str], tokenizer: Any, max_length: int) -> Iterator[Encoded]:
    """The tokens of a text that comes in pieces, all of which count, in blocks of `max_length`; the last is
    shorter.
    """
    ids: list[int] = []
    for piece in pieces:
        ids += encode(tokenizer, piece)
        whole = len(ids) // max_length * max_length
        for start in range(0, whole, max_length):
            yield ids[start : start + max_length], [True] * max_length
        ids = ids[whole:]
    if ids:
        yield ids, [True] * len(ids)


def _parts(where: str, values: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """Texts of one sample, and whether the model is to say them."""
    prompt, completion, text = (values.get(key) for key in ("prompt", "completion", "text"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return [(prompt, False), (completion, True)]
    if isinstance(text, str):
        return [(text, True)]
    return _turns(where, _messages(where, values, tokenizer), tokenizer)


def encode_prompt(where: str, values: dict[str, Any], tokenizer: Any) -> list[int]:
    """Tokens of a `prompt`, or of `messages` that the assistant is to answer.

    Raises:
        RunError: there is neither.
    """
    if isinstance(values.get("prompt"), str):
        return encode(tokenizer, values["prompt"], more=False)
    messages = _messages(where, values, tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return encode(tokenizer, text)


def _messages(where: str, values: dict[str, Any], tokenizer: Any) -> list[dict[str, str]]:
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise RunError(
            f"{where}: must have 'prompt' and 'completion', both texts, or 'messages' with 'role' and "
            "'content', or 'text'"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise RunError(
            f"{where}: 'messages' need a chat template, and the model's tokenizer has none; "
            "use 'prompt' and 'completion'"
        )
    return messages


def _turns(where: str, messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """A conversation as its template writes it, cut where the assistant begins and ends to speak."""
    parts: list[tuple[str, bool]] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for until, counts in ((place, False), (place + 1, True)):
            text = tokenizer.apply_chat_template(
                messages[:until], tokenize=False, add_generation_prompt=not counts
            )
            if not text.startswith(done):
                raise RunError(
                    f"{where}: the chat template rewrites earlier messages, so that what counts cannot be "
                    "told; write one answer per line"
                )
            parts.append((text.removeprefix(done), counts))
            done = text
    return parts


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def encode(tokenizer: Any, text: str, *, more: bool = True) -> list[int]:
    """The tokens of a text; with `more` it goes on, or is plain, and no token for a beginning comes."""
    ids = tokenizer(text, add_special_tokens=not more, verbose=False)["input_ids"]
    # some tokenizers end every text, which would stand between prompt and completion
    return ids[:-1] if not more and ids and ids[-1] == tokenizer.eos_token_id else ids
