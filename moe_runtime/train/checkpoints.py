"""Checkpoints of a run: written under another name, renamed when whole, and the newest whole one found."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe_runtime.errors import RunError

from .recipe import MoeSection, TrainRecipe, recipe_from_dict
from .schedule import first_difference

FOLDER = "checkpoints"
UNFINISHED = ".unfinished"
RUN_NAME = "run.json"  # what the checkpoint is of; written last
PIECE, PIECES = 1 << 16, 256  # bytes of a file that are looked at
# what a resumed run may say otherwise: nothing of it changes a weight up to the checkpoint
FREE = ("save_every", "keep", "log_every", "eval_every", "report_to")
EXTENDED = ("steps", "restarts")  # if the learning rates up to the checkpoint stay as they were
CUT = ("batch_size", "accumulate")  # if a step still has as many rows
SPREAD = ("parallel.data", "parallel.experts")
MAY_CHANGE = {"output", *SPREAD, *(f"train.{name}" for name in (*FREE, *EXTENDED, *CUT))}


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / FOLDER / f"checkpoint-{step}"


def newest(output: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return max(_all(output), key=_step, default=None)


def write(
    output: Path,
    step: int,
    keep: int,
    values: dict[str, Any],
    save: Callable[[Path], None],
    agree: Callable[[str | None], str | None] = lambda error: error,
    is_main: bool = True,
) -> None:
    """Have `save` fill a folder, add run.json, and put it in place; then remove all but the `keep` newest.

    Every process calls it: all of them save, the main one does the rest. `agree` waits for all processes and
    returns the error of one that has one.

    Raises:
        RunError: it could not be written, such as on a full disk. The checkpoint before it is still there.
    """
    before = newest(output)
    unfinished = output / FOLDER / UNFINISHED
    folder = checkpoint_folder(output, step)
    filled = unfinished / folder.name

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        filled.mkdir(parents=True)

    def put_in_place() -> None:
        write_json(filled / RUN_NAME, values)
        os.rename(filled, folder)

    for work, everywhere in ((begin, False), (lambda: save(filled), True), (put_in_place, False)):
        error = agree(_error_of(work) if everywhere or is_main else None)
        if error is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
            left = "there is none before it" if before is None else f"the one before it, {before}, is whole"
            raise RunError(f"the checkpoint of step {step} could not be written ({error}); {left}")
    if is_main:
        for old in sorted(_all(output), key=_step)[:-keep]:
            # renamed first: a folder that is half removed must not look like a checkpoint
            shutil.rmtree(unfinished, ignore_errors=True)
            os.rename(old, unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)


def _error_of(work: Callable[[], None]) -> str | None:
    try:
        work()
    except Exception as error:  # of the disk by many names: those of safetensors, of torch, of Python
        return " ".join(str(error).split()) or type(error).__name__
    return None


def write_json(path: Path, values: Any) -> None:
    """Replace the file by a whole one, or leave it as it was."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What run.json of a checkpoint says.

    Raises:
        RunError: it cannot be read.
    """
    try:
        values = json.loads((checkpoint / RUN_NAME).read_text(encoding="utf-8"))
        values["recipe"], values["steps"], values["rows"], values["data"], values["base"]
    except OSError as error:
        raise RunError(
            f"{checkpoint / RUN_NAME} must say what the checkpoint is of: {error.strerror}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"{checkpoint / RUN_NAME} must say what the checkpoint is of, and is damaged"
        ) from None
    return values


def fingerprint(model: str) -> str:
    """sha256 of the names and sizes of a model's weight files, and of pieces all over each of them."""
    digest = sha256()
    for path in sorted(path for path in Path(model).iterdir() if path.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(PIECE, size // PIECES)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def check_same_base(checkpoint: Path, model: str) -> None:
    """Refuse adapters that were trained for other weights than those in the folder `model`.

    Raises:
        RunError: the weights have changed since.
    """
    if read_run(checkpoint)["base"] != fingerprint(model):
        raise RunError(
            f"model must hold the weights that the adapters in {checkpoint} were trained for, and those of "
            f"{model} have changed"
        )


def check_same_run(checkpoint: Path, recipe: TrainRecipe, steps: int, rows: int, data: Any) -> None:
    """Refuse a checkpoint that another recipe or other data made; `rows` are those of a step.

    Raises:
        RunError: naming the first field that differs.
    """
    values = read_run(checkpoint)
    old, new = (_fields(of) for of in (recipe_from_dict(values["recipe"], where=str(checkpoint)), recipe))
    for name in sorted(new.keys() - MAY_CHANGE):
        before, now = old[name], new[name]
        if before != now:
            raise RunError(
                f"{name} must be {before!r} as in the checkpoint {checkpoint}, got {now!r}; a changed recipe "
                "needs another output"
            )
    if values["rows"] != rows:
        raise RunError(
            f"train.batch_size times train.accumulate times processes must be {values['rows']} as in the "
            f"checkpoint {checkpoint}, got {rows}"
        )
    if values["data"] != json.loads(json.dumps(data)):
        raise RunError(
            f"data must be what the checkpoint {checkpoint} was trained on, but its files have changed"
        )
    _check_schedule(checkpoint, recipe, values, steps)


def _check_schedule(checkpoint: Path, recipe: TrainRecipe, values: dict[str, Any], steps: int) -> None:
    done, old_steps = _step(checkpoint), values["steps"]
    if steps < done:
        raise RunError(f"train.steps must be at least {done}, the step of {checkpoint}, got {steps}")
    old = recipe_from_dict(values["recipe"]).train
    other = first_difference(old, recipe.train, old_steps, steps, done)
    if other is not None:
        raise RunError(
            f"train.steps and train.restarts must leave the learning rates up to {checkpoint} as they were, "
            f"but that of step {other} changes; to train longer, keep them and add {old_steps} to "
            "train.restarts"
        )


def _fields(recipe: TrainRecipe) -> dict[str, Any]:
    """The fields of all sections under names such as "train.steps"; without a section, its defaults."""
    fields: dict[str, Any] = {}
    for name, value in replace(recipe, moe=recipe.moe or MoeSection()).to_dict().items():
        of_section = value.items() if isinstance(value, dict) else ()
        fields |= {f"{name}.{key}": element for key, element in of_section}
        if not isinstance(value, dict):
            fields[name] = value
    return fields


def _all(output: Path) -> list[Path]:
    numbered = (path for path in (output / FOLDER).glob("checkpoint-*") if path.name[11:].isdecimal())
    return [path for path in numbered if (path / RUN_NAME).is_file()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
