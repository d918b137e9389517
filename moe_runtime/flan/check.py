"""What would stop a comparison hours later, found before its first stage. No weights are loaded."""

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from moe_runtime.errors import RunError
from moe_runtime.evaluation.run import examples_by_task
from moe_runtime.hf.loading import load_tokenizer
from moe_runtime.hf.quiet import quiet_transformers
from moe_runtime.train.data.load import load_train_data
from moe_runtime.train.model import set_up_model
from moe_runtime.train.packages import check_packages
from moe_runtime.train.recipe import TrainRecipe

from .run import Comparison


def check_comparison(comparison: Comparison) -> None:
    """Refuse what any tuning or any measuring of the comparison would refuse.

    Raises:
        RunError, ValueError: a package is missing, a section does not fit its model, or a file is not usable.
    """
    recipe = comparison.recipe
    for section in (recipe.instruction_tuning, recipe.task_tuning):
        check_packages(section)
    with quiet_transformers():
        for name, folder in comparison.sources.items():
            tokenizer = load_tokenizer(folder)
            longest = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
            for shots in sorted({0, recipe.shots}):
                for file in comparison.question_files(shots).values():
                    _check_questions(file, tokenizer, longest)
            for training in _tunings(comparison, name):
                load_train_data(training.data, tokenizer, training.seed, longest)
                _check_model(training)


def _tunings(comparison: Comparison, name: str) -> list[TrainRecipe]:
    """All that differ in files, options or steps."""
    recipe, start = comparison.recipe, Path(comparison.sources[name])
    asked = [(recipe.instructions, recipe.instruction_tuning)]
    asked += [((task.train,), recipe.task_tuning) for task in recipe.tasks]
    return [comparison.training(name, start, comparison.folder, files, section) for files, section in asked]


def _check_model(training: TrainRecipe) -> None:
    config = AutoConfig.from_pretrained(training.model)
    with FakeTensorMode():
        set_up_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), training)


def _check_questions(file: Path, tokenizer: Any, longest: int | None) -> None:
    tasks = examples_by_task([str(file)], tokenizer, longest)
    if len(tasks) != 1:
        raise RunError(f"{file} must hold one task, got {', '.join(tasks)}")
