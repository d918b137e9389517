"""From the `data:` section of a recipe to what a trainer reads."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import RunError

from .packing import pack_best_fit
from .recipe import DataRecipe
from .rows import PaddingCollator, Rows, StreamedRows, collate_packed
from .sources import Reader, Share, file_hash


@dataclass(frozen=True)
class TrainData:
    """Rows to train on and to evaluate with.

    `summary` has the files with sha256 of each, how many samples, tokens and tokens that count there are,
    how many samples were cut, dropped or left out because nothing of them counts, how many rows, how full
    they are on average (`row_fill`) and, under `eval`, the same of every set. A stream knows its files only.
    """

    dataset: Rows | StreamedRows
    eval: dict[str, Rows]
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    summary: dict[str, Any]

    def read(self) -> dict[str, int]:
        """What became of the samples that this process has read of a stream so far; {} if it is none."""
        return asdict(self.dataset.tally) if isinstance(self.dataset, StreamedRows) else {}


def check_max_length(recipe: DataRecipe, model_max_length: int | None) -> None:
    """Refuse rows that are longer than the model takes."""
    if model_max_length is not None and recipe.max_length > model_max_length:
        raise RunError(
            f"data.max_length must be at most {model_max_length}, which the model takes, got "
            f"{recipe.max_length}"
        )


def load_train_data(
    recipe: DataRecipe, tokenizer: Any, seed: int, model_max_length: int | None = None
) -> TrainData:
    """Read, tokenise and pack; with `streaming` all but the sets to evaluate with is read later.

    Args:
        recipe: what to read.
        tokenizer: of transformers; with a chat template if there are conversations.
        seed: of the order in which samples are packed.
        model_max_length: tokens that the model takes.

    Raises:
        RunError: a file is missing, empty or damaged, a sample has another form or is too long, nothing
            counts, or `max_length` is more than the model takes.
    """
    check_max_length(recipe, model_max_length)
    dataset: Rows | StreamedRows
    if recipe.streaming:
        for path in recipe.train:
            if not Path(path).exists():
                raise RunError(f"data: there is no file {path}")
        dataset = StreamedRows(Reader(recipe, tokenizer))
        summary: dict[str, Any] = {"files": [{"path": path} for path in recipe.train]}
    else:
        dataset, summary = load_rows(recipe.train, recipe, tokenizer, seed)
    sets, summary["eval"] = {}, {}
    for name, path in recipe.eval_files().items():
        sets[name], summary["eval"][name] = load_rows((path,), recipe, tokenizer, seed)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collator = collate_packed if recipe.packing else PaddingCollator(pad_id or 0)
    return TrainData(dataset, sets, collator, summary)


def load_rows(
    paths: Sequence[str], recipe: DataRecipe, tokenizer: Any, seed: int
) -> tuple[Rows, dict[str, Any]]:
    """Rows of some files in memory, and their summary."""
    reader = Reader(recipe, tokenizer)
    samples = list(reader.samples(paths, Share()))
    if not samples:
        raise RunError(
            "data must hold samples with tokens that count within data.max_length "
            f"({recipe.max_length}), got none in {', '.join(paths)}"
        )
    lengths = [len(sample.ids_L) for _, sample in samples]
    places = (
        pack_best_fit(lengths, recipe.max_length, seed)
        if recipe.packing
        else [[place] for place in range(len(samples))]
    )
    summary = {
        "files": [{"path": path, "sha256": file_hash(Path(path))} for path in paths],
        **asdict(reader.tally),
        "rows": len(places),
        "row_fill": reader.tally.tokens / (len(places) * recipe.max_length),
    }
    return Rows(samples, places, packed=recipe.packing), summary
