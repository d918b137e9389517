"""Whether tokens mean the same in all sources, as far as the files beside their weights can tell."""

import filecmp
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.checkpoint import Checkpoint, read_json
from upcycle.errors import UpcycleError

# The vocabulary alone, of tokenizers whose merges or scores are in other files or inside.
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_MODEL = "tokenizer.model"


def check_vocabularies(base: Checkpoint, sources: Sequence[Checkpoint]) -> None:
    """Compare each source's tokens with the base's. A source without a tokenizer, or in a GGUF file, passes.

    Raises:
        UpcycleError: two vocabularies differ; names the first token that does.
    """
    expected = _vocabulary(base)
    for source in sources:
        if source.location == base.location or _same_file(base, source):
            continue
        found = _vocabulary(source)
        if expected is not None and found is not None and expected != found:
            raise UpcycleError(
                f"the sources must share one vocabulary, but {_difference(expected, found)} in {base.folder} "
                f"and {source.folder}"
            )
        if expected is None and found is None and _both_have(base, source, _MODEL):
            raise UpcycleError(
                f"the sources must share one vocabulary, but {_MODEL} differs in {base.folder} and "
                f"{source.folder}"
            )


def _same_file(base: Checkpoint, source: Checkpoint) -> bool:
    return any(
        _both_have(base, source, name)
        and filecmp.cmp(base.folder / name, source.folder / name, shallow=False)
        for name in (*_TOKENIZERS, _MODEL)
    )


def _both_have(base: Checkpoint, source: Checkpoint, name: str) -> bool:
    return all(c.file is None and (c.folder / name).is_file() for c in (base, source))


def _vocabulary(source: Checkpoint) -> dict[str, int] | None:
    """Token -> number, added ones included; None if no file says."""
    if source.file is not None:
        return None
    for name in _TOKENIZERS:
        path = source.folder / name
        if not path.is_file():
            continue
        values = read_json(path)
        try:
            return (
                _of_tokenizer(values) if name == "tokenizer.json" else {t: int(n) for t, n in values.items()}
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UpcycleError(f"{path} is no tokenizer that transformers wrote; fetch it again") from None
    return None


def _of_tokenizer(values: Mapping[str, Any]) -> dict[str, int]:
    stored = values["model"].get("vocab") or {}
    # Unigram models keep a list of (token, score)
    entries = stored.items() if isinstance(stored, Mapping) else ((t, n) for n, (t, _) in enumerate(stored))
    vocabulary = {token: int(number) for token, number in entries}
    return vocabulary | {added["content"]: int(added["id"]) for added in values.get("added_tokens") or ()}


def _difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str:
    names = [token for token in (*expected, *found) if expected.get(token) != found.get(token)]
    token = names[0]

    def said(vocabulary: Mapping[str, int]) -> str:
        return f"number {vocabulary[token]}" if token in vocabulary else "missing"

    return f"token {token!r} is {said(expected)} and {said(found)}"
