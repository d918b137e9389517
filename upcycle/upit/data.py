"""Training samples from files: instructions in JSON lines, conversations, or plain text.

A line is `{"prompt": …, "completion": …}` or `{"messages": [{"role": …, "content": …}, …]}`. The loss counts
what the model is to say: the completion with its end-of-text token, or the assistant's messages. A file that
is not .jsonl is plain text, cut into samples of `max_length` tokens that count whole.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.errors import UpcycleError
from upcycle.upit.files import generator

IGNORED = -100  # the label of a token that does not count


@dataclass(frozen=True)
class Sample:
    """Tokens of one sample, and as labels those that count."""

    ids_L: NDArray[np.int64]
    labels_L: NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """All samples, how many had to be left out, and each file in order with sha256 of its text."""

    samples: tuple[Sample, ...]
    left_out: int  # nothing that counts lies within max_length
    hashes: tuple[tuple[str, str], ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.ids_L) for sample in self.samples)


def load_data(paths: Sequence[str | Path], tokenizer: Any, max_length: int) -> Data:
    """Read and tokenise all files.

    Raises:
        UpcycleError: a file is missing, empty or damaged, a line has another form, or no sample is left.
    """
    samples: list[Sample] = []
    left_out = 0
    hashes: list[tuple[str, str]] = []
    for path in map(Path, paths):
        text = _read(path)
        hashes.append((str(path), sha256(text.encode()).hexdigest()))
        made = (
            _lines(path, text, tokenizer) if path.suffix == ".jsonl" else _blocks(text, tokenizer, max_length)
        )
        for ids, counted in made:
            ids_L = np.array(ids[:max_length], np.int64)
            labels_L = np.where(np.array(counted[:max_length], bool), ids_L, IGNORED)
            # the first token has nothing before it that could predict it
            if len(ids_L) > 1 and (labels_L[1:] != IGNORED).any():
                samples.append(Sample(ids_L, labels_L))
            else:
                left_out += 1
    if not samples:
        raise UpcycleError(
            f"data must hold samples with tokens that count within max_length ({max_length}), got none in "
            f"{', '.join(map(str, paths))}"
        )
    return Data(tuple(samples), left_out, tuple(hashes))


def draw_seed_set(num_samples: int, fraction: float, seed: int, experts: int, quota: int) -> list[int]:
    """Places of the samples that routers start from: a share of the data, drawn without repetition, in order.

    Raises:
        UpcycleError: the share holds fewer samples than `quota` for each expert.
    """
    count, needed = round(num_samples * fraction), experts * quota
    if count < needed:
        way_out = f"set it to {needed / num_samples:.6g} or more"
        if needed > num_samples:
            way_out = "take more data or fewer experts"
        raise UpcycleError(
            f"route.seed_fraction must leave route.min_per_expert ({quota}) samples for each of the "
            f"{experts} experts, but {fraction} of {num_samples} samples are {count}; {way_out}"
        )
    drawn = generator(seed, "seed set").permutation(num_samples)[:count]
    return sorted(int(place) for place in drawn)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UpcycleError(f"data: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UpcycleError(f"data: {path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise UpcycleError(f"data: {path} is empty")
    return text


def _blocks(text: str, tokenizer: Any, max_length: int) -> Iterator[tuple[list[int], list[bool]]]:
    ids = _encode(tokenizer, text)
    for start in range(0, len(ids), max_length):
        block = ids[start : start + max_length]
        yield block, [True] * len(block)


def _lines(path: Path, text: str, tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise UpcycleError(f"{where}: must be one JSON object") from None
        if not isinstance(values, dict):
            raise UpcycleError(f"{where}: must be one JSON object, got {type(values).__name__}")
        ids: list[int] = []
        counted: list[bool] = []
        for part, counts in _parts(where, values, tokenizer):
            # a chat template writes the token for a beginning itself
            of_part = _encode(tokenizer, part, more=bool(ids) or "messages" in values)
            ids += of_part
            counted += [counts] * len(of_part)
        if "completion" in values and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            counted.append(True)
        yield ids, counted


def _parts(where: str, values: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """Texts of one sample, and whether the model is to say them."""
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [(prompt, False), (completion, True)]
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UpcycleError(
            f"{where}: must have 'prompt' and 'completion', both texts, or 'messages' with 'role' and "
            "'content'"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise UpcycleError(
            f"{where}: 'messages' need a chat template, and the base's tokenizer has none; "
            "use 'prompt' and 'completion'"
        )
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
                raise UpcycleError(
                    f"{where}: the chat template rewrites earlier messages, so that what counts cannot be "
                    "told; write one answer per line"
                )
            parts.append((text.removeprefix(done), counts))
            done = text
    return parts


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _encode(tokenizer: Any, text: str, *, more: bool = True) -> list[int]:
    """`more`: the text goes on, or is plain: no token for a beginning."""
    ids = tokenizer(text, add_special_tokens=not more, verbose=False)["input_ids"]
    # some tokenizers end every text, which would stand between prompt and completion
    return ids[:-1] if not more and ids and ids[-1] == tokenizer.eos_token_id else ids
