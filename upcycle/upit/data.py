"""Training samples from files, in the forms that `moe_runtime.train.data.samples` lists.

A file that is not .jsonl or .ndjson is plain text, cut into samples of `max_length` tokens that count whole.
What is longer is cut; a sample of which nothing that counts is left is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe_runtime.train.data.samples import (
    Encoded,
    Sample,
    encode_blocks,
    encode_sample,
    has_lines,
    json_objects,
    make_sample,
)
from upcycle.errors import UpcycleError
from upcycle.upit.files import generator


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
        for encoded in _encoded(path, text, tokenizer, max_length):
            sample = make_sample(encoded, max_length)
            if sample is None:
                left_out += 1
            else:
                samples.append(sample)
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


def _encoded(path: Path, text: str, tokenizer: Any, max_length: int) -> Iterator[Encoded]:
    if not has_lines(path):
        yield from encode_blocks([text], tokenizer, max_length)
        return
    for where, values in json_objects(path, text.split("\n")):
        yield encode_sample(where, values, tokenizer)
