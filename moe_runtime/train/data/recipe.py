"""The `data:` section of a training's recipe: what is read, and how it becomes rows. Torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from moe_runtime.errors import RecipeError
from moe_runtime.recipe_checks import check_choice, check_type, check_whole

TooLong = Literal["refuse", "cut", "drop"]
Counted = Literal["completion", "all"]


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Files of samples, and the rows they are put into.

    A file ending in .jsonl or .ndjson has one sample per line, a folder of `datasets` (`save_to_disk`), a
    .parquet or .arrow file one per row, with the keys that `moe_runtime.train.data.samples` lists; any other
    file is plain text.
    """

    train: tuple[str, ...]
    eval: tuple[str, ...] = ()  # FILE or NAME=FILE; the name of a file is its set's
    max_length: int = 1024  # tokens of a row
    packing: bool = True  # several samples in a row, none of which sees another; False: one, and padding
    streaming: bool = False  # read while training, in the order of the files; nothing is held in memory
    too_long: TooLong = "refuse"  # what happens to samples of more than max_length tokens
    loss: Counted = "completion"  # all: prompts and other roles' messages count too

    def __post_init__(self) -> None:
        for name in ("train", "eval"):
            check_type(f"data.{name}", getattr(self, name), tuple)
            for path in getattr(self, name):
                check_type(f"data.{name}", path, str)
        if not self.train:
            raise RecipeError("data.train must name one or more files, got none")
        check_whole("data.max_length", self.max_length, 2)
        for name in ("packing", "streaming"):
            check_type(f"data.{name}", getattr(self, name), bool)
        check_choice("data.too_long", self.too_long, get_args(TooLong))
        check_choice("data.loss", self.loss, get_args(Counted))
        self.eval_files()

    def eval_files(self) -> dict[str, str]:
        """The files of `eval` by name.

        Raises:
            RecipeError: a name is there twice.
        """
        files: dict[str, str] = {}
        for entry in self.eval:
            name, equals, path = entry.partition("=")
            if not equals:
                name, path = Path(entry).stem, entry
            if name in files:
                raise RecipeError(
                    f"data.eval must name each set once, got {name!r} twice; write NAME={path} to "
                    "choose another"
                )
            files[name] = path
        return files
