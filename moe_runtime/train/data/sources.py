"""Samples of files, one after another: nothing is read before it is asked for, and never a whole file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe_runtime.errors import RunError
from moe_runtime.optional import installed

from .recipe import DataRecipe
from .samples import (
    IGNORED,
    Encoded,
    Sample,
    encode_blocks,
    encode_sample,
    has_lines,
    json_objects,
    make_sample,
)

TABLES = (".parquet", ".arrow")
# of a plain text, read and made tokens at once
_PIECE_CHARACTERS = 1 << 16


@dataclass
class Tally:
    """What became of the samples that were read."""

    samples: int = 0
    tokens: int = 0
    counted_tokens: int = 0  # that something before them predicts
    cut: int = 0  # samples
    cut_tokens: int = 0
    dropped: int = 0  # longer than max_length
    nothing_counts: int = 0  # left out: the loss would see nothing of them

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.tokens += len(sample.ids_L)
        self.counted_tokens += int((sample.labels_L[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Share:
    """The samples number `index`, `index + count`, … of all."""

    index: int = 0
    count: int = 1


@dataclass
class Reader:
    """Reads files with one tokenizer; `tally` counts what came out."""

    recipe: DataRecipe
    tokenizer: Any
    tally: Tally = field(default_factory=Tally)

    def samples(self, paths: Sequence[str], share: Share) -> Iterator[tuple[int, Sample]]:
        """Samples with their numbers, which go on from file to file and count those that are left out too.

        Raises:
            RunError: a file is missing, empty or damaged, or a sample has another form or is too long.
        """
        number = -1
        for path in map(Path, paths):
            before = number
            for where, record in self._records(path):
                number += 1
                if number % share.count != share.index:
                    continue
                encoded = record if isinstance(record, tuple) else self._encode(where, record)
                sample = self._fit(where, encoded)
                if sample is not None:
                    self.tally.add(sample)
                    yield number, sample
            if number == before:
                raise RunError(f"data: {path} is empty")

    def _records(self, path: Path) -> Iterator[tuple[str, dict[str, Any] | Encoded]]:
        """Objects of a file that has samples, or the tokens of blocks of a text."""
        if not path.exists():
            raise RunError(f"data: there is no file {path}")
        if path.is_dir() or path.suffix.lower() in TABLES:
            for row, values in enumerate(_table(path)):
                yield f"{path}, row {row}", values
        elif has_lines(path):
            yield from json_objects(path, read_lines(path))
        else:
            for encoded in encode_blocks(_pieces(path), self.tokenizer, self.recipe.max_length):
                yield str(path), encoded

    def _encode(self, where: str, values: dict[str, Any]) -> Encoded:
        ids, counted = encode_sample(where, values, self.tokenizer)
        return ids, [True] * len(ids) if self.recipe.loss == "all" else counted

    def _fit(self, where: str, encoded: Encoded) -> Sample | None:
        length, longest = len(encoded[0]), self.recipe.max_length
        if length > longest:
            if self.recipe.too_long == "refuse":
                raise RunError(
                    f"{where}: has {length} tokens, more than data.max_length ({longest}); raise it, or say "
                    "with data.too_long whether to cut or to drop such samples"
                )
            if self.recipe.too_long == "drop":
                self.tally.dropped += 1
                return None
            self.tally.cut += 1
            self.tally.cut_tokens += length - longest
        sample = make_sample(encoded, longest)
        if sample is None:
            self.tally.nothing_counts += 1
        return sample


def file_hash(path: Path) -> str:
    """sha256 of a file, or of all files of a folder with their names."""
    digest = sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            if path.is_dir():
                digest.update(file.relative_to(path).as_posix().encode() + b"\0")
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def read_lines(path: Path) -> Iterator[str]:
    """Lines of UTF-8 text. Raises RunError, with the number of the line, where it is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RunError(
                    f"{path}, line {number}: must be UTF-8 text, and is not at byte {error.start} of the line"
                ) from None


def _pieces(path: Path) -> Iterator[str]:
    """Some lines at a time, from the first that is not blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            begun = False
            while piece := "".join(file.readlines(_PIECE_CHARACTERS)):
                begun = begun or bool(piece.strip())
                if begun:
                    yield piece
    except UnicodeDecodeError as error:
        raise RunError(f"data: {path} cannot be read as UTF-8 text: {error}") from None


def _table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder or file of `datasets`."""
    if installed("datasets") is None:
        raise RunError(f"data: {path} needs datasets; run: pip install 'moe-runtime[train]'")
    import datasets

    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
            if isinstance(table, datasets.DatasetDict):
                raise RunError(
                    f"data: {path} must hold one set, and has the splits {', '.join(table)}; name one of "
                    f"them, such as {path / next(iter(table))}"
                )
        elif path.suffix.lower() == ".arrow":
            table = datasets.Dataset.from_file(str(path))
        else:
            # without streaming it would be copied into a cache
            table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from table
    except RunError:
        raise
    except (OSError, ValueError) as error:
        raise RunError(f"data: {path} cannot be read: {' '.join(str(error).split())}") from error
