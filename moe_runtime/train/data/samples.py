"""A sample's tokens, and which of them count: instructions, conversations and texts. Torch-free.

One sample is `{"prompt": …, "completion": …}`, `{"messages": [{"role": …, "content": …}, …]}` or
`{"text": …}`, and one of these only; other keys are left alone. The loss counts what the model is to say: the
completion with its end-of-text token, the assistant's messages, or a whole text.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import RunError

IGNORED = -100  # the label of a token that does not count
# keys that make a sample; a prompt beside a conversation is its first message, and left alone
_TEXTS = (["prompt", "completion"], ["text"])
_CHATS = (["messages"], ["prompt", "messages"])
LINES = (".jsonl", ".ndjson")  # endings of files with one sample per line
_NOT_READ = (".json", ".csv", ".tsv", ".gz", ".zip")

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


def has_lines(path: Path) -> bool:
    """Whether a file has one sample per line; otherwise it is plain text.

    Raises:
        RunError: its ending says that it is neither.
    """
    ending = path.suffix.lower()
    if ending in _NOT_READ:
        raise RunError(
            f"data: {path} must be JSON lines ({' or '.join(LINES)}), a table or plain text, and a {ending} "
            "file is not read; write one JSON object per line"
        )
    return ending in LINES


def json_objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on every line that is not empty, after the words that say where it is.

    Raises:
        RunError: a line holds anything else.
    """
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix("\ufeff")  # a byte order mark
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise RunError(f"{where}: must be one JSON object") from None
        if not isinstance(values, dict):
            raise RunError(f"{where}: must be one JSON object, got {type(values).__name__}")
        if "\\u" in line:
            _check_unicode(where, values)
        yield where, values


def _check_unicode(where: str, values: dict[str, Any]) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise RunError(
            f"{where}: must be text that UTF-8 can hold, and has half a character, {half}"
        ) from None


def encode_sample(where: str, values: dict[str, Any], tokenizer: Any) -> Encoded:
    """Tokens of one sample.

    Raises:
        RunError: it has another form, which the message, beginning with `where`, tells.
    """
    parts = _parts(where, values, tokenizer)
    # a chat template writes the tokens for a beginning and an end itself
    is_chat = values.get("messages") is not None
    ids, part_of = encode_parts(tokenizer, [text for text, _ in parts], more=is_chat)
    counted = [parts[part][1] for part in part_of]
    if not is_chat and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        counted.append(True)
    return ids, counted


def encode_parts(tokenizer: Any, texts: Sequence[str], *, more: bool) -> tuple[list[int], list[int]]:
    """The tokens of a text that is given in parts, and of each the part that its last character lies in.

    The text is tokenized as a whole. Tokenizers that cannot tell where a token lies, which are the slow ones,
    take the parts one by one; some of them begin each with a blank of their own.

    Args:
        tokenizer: of transformers.
        texts: one or more parts.
        more: as `encode` has it.
    """
    if not getattr(tokenizer, "is_fast", False):
        by_part = [encode(tokenizer, text, more=more or part > 0) for part, text in enumerate(texts)]
        return [i for ids in by_part for i in ids], [part for part, ids in enumerate(by_part) for _ in ids]
    encoding = tokenizer(
        "".join(texts), add_special_tokens=not more, return_offsets_mapping=True, verbose=False
    )
    ids = _without_end(tokenizer, encoding["input_ids"], more=more)
    ends = list(accumulate(map(len, texts)))
    # whitespace may have been cut off at a token's beginning, and never at its end
    return ids, [bisect_left(ends, end) for _, end in encoding["offset_mapping"][: len(ids)]]


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
    given = [key for key in ("prompt", "completion", "text", "messages") if values.get(key) is not None]
    if given in _CHATS and _are_messages(values["messages"]):
        return _turns(where, values["messages"], tokenizer)
    if given in _TEXTS and all(isinstance(values[key], str) for key in given):
        return [(values[key], key != "prompt") for key in given]
    raise RunError(
        f"{where}: must have 'prompt' and 'completion', both texts, or 'messages' with 'role' and 'content', "
        f"or 'text', and one of these only, got {', '.join(map(repr, given)) or 'none'}"
    )


def prompt_text(where: str, values: dict[str, Any], tokenizer: Any) -> tuple[str, bool]:
    """A `prompt`, or `messages` up to where the assistant is to answer, and whether the text has its own
    token for a beginning, as `encode` takes it.

    Raises:
        RunError: there is neither.
    """
    prompt, messages = values.get("prompt"), values.get("messages")
    if isinstance(prompt, str):
        return prompt, False
    if not _are_messages(messages):
        raise RunError(f"{where}: must have 'prompt', a text, or 'messages' with 'role' and 'content'")
    _check_messages(where, messages, tokenizer)
    return _written(where, messages, tokenizer, to_answer=True), True


def _check_messages(where: str, messages: list[dict[str, str]], tokenizer: Any) -> None:
    if not messages:
        raise RunError(f"{where}: 'messages' must be one or more, got none")
    if not getattr(tokenizer, "chat_template", None):
        raise RunError(
            f"{where}: 'messages' need a chat template, and the model's tokenizer has none; "
            "use 'prompt' and 'completion'"
        )


def _written(where: str, messages: list[dict[str, str]], tokenizer: Any, *, to_answer: bool) -> str:
    """A conversation as its template writes it, with `to_answer` up to where the assistant is to speak."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer)
    except (jinja2.TemplateError, LookupError, TypeError, ValueError) as error:
        raise RunError(f"{where}: the chat template refuses the messages: {error}") from error


def _turns(where: str, messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """A conversation as its template writes it, cut where the assistant begins and ends to speak."""
    _check_messages(where, messages, tokenizer)
    if messages[0]["role"] == "assistant":
        raise RunError(f"{where}: 'messages' must begin with another role than 'assistant'")
    parts: list[tuple[str, bool]] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for until, counts in ((place, False), (place + 1, True)):
            text = _written(where, messages[:until], tokenizer, to_answer=not counts)
            if not text.startswith(done):
                raise RunError(
                    f"{where}: the chat template rewrites earlier messages, so that what counts cannot be "
                    "told; write one answer per line"
                )
            parts.append((text.removeprefix(done), counts))
            done = text
    return parts


def _are_messages(messages: Any) -> TypeGuard[list[dict[str, str]]]:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )


def encode(tokenizer: Any, text: str, *, more: bool = True) -> list[int]:
    """The tokens of a text; with `more` it goes on, or is plain, and no token for a beginning comes."""
    ids = tokenizer(text, add_special_tokens=not more, verbose=False)["input_ids"]
    return _without_end(tokenizer, ids, more=more)


def _without_end(tokenizer: Any, ids: list[int], *, more: bool) -> list[int]:
    # some tokenizers end every text, which would stand between prompt and completion, or twice at the end
    return ids[:-1] if not more and ids and ids[-1] == tokenizer.eos_token_id else ids
