"""What would stop a comparison hours later, found before its first stage. No weights are loaded."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moe_runtime.errors import RunError
from moe_runtime.evaluation.run import examples_by_task
from moe_runtime.hf.loading import load_tokenizer
from moe_runtime.hf.quiet import quiet_transformers
from moe_runtime.train.recipe import TrainRecipe
from moe_runtime.train.refusals import check_run, positions

from .run import Comparison


def check_comparison(comparison: Comparison) -> None:
    """Refuse what any tuning or any measuring of the comparison would refuse.

    Raises:
        RunError, ValueError: a package is missing, a section does not fit its model, or a file is not usable.
    """
    with quiet_transformers(), TemporaryDirectory(prefix="questions-") as written:
        for name, folder in comparison.sources.items():
            for training in _tunings(comparison, name):
                check_run(training)
            tokenizer, longest = load_tokenizer(folder), positions(folder)
            for shots in sorted({0, comparison.recipe.shots}):
                for file in comparison.question_files(shots, Path(written)).values():
                    _check_questions(file, tokenizer, longest)


def _tunings(comparison: Comparison, name: str) -> list[TrainRecipe]:
    """All that differ in files, options or steps."""
    recipe, start = comparison.recipe, Path(comparison.sources[name])
    asked = [(recipe.instructions, recipe.instruction_tuning)]
    asked += [((task.train,), recipe.task_tuning) for task in recipe.tasks]
    return [comparison.training(name, start, comparison.folder, files, section) for files, section in asked]


def _check_questions(file: Path, tokenizer: Any, longest: int | None) -> None:
    tasks = examples_by_task([str(file)], tokenizer, longest)
    if len(tasks) != 1:
        raise RunError(f"{file} must hold one task, got {', '.join(tasks)}")
