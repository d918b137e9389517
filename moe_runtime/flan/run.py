"""The runs of a comparison, in stages that can be resumed.

Each of the two models is measured as it is, tuned on instructions and then measured without and with worked
examples, tuned on each task from where it began, and tuned on each task after the instructions. Models that
are tuned on a task are measured and removed; those tuned on instructions stay under models/.
"""

import gc
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_runtime.config import ModelConfig
from moe_runtime.demo.stages import Stage, run_stages
from moe_runtime.errors import RunError
from moe_runtime.families import model_config
from moe_runtime.flops import matched_regimes, model_flops, model_parameters, training_flops
from moe_runtime.hf.loading import json_object
from moe_runtime.html import write_report
from moe_runtime.progress import StageProgress
from moe_runtime.train.data.sources import file_hash
from moe_runtime.train.recipe import TrainRecipe, TrainSection

from .questions import measure, write_questions
from .recipe import FlanRecipe, FlanTask

MIXTURE, DENSE = "mixture", "dense"


class Comparison:
    """A recipe with what follows from it: both models' configurations and steps."""

    def __init__(self, recipe: FlanRecipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.sources = {MIXTURE: recipe.mixture, DENSE: recipe.dense}
        self.configs = {name: _described(folder) for name, folder in self.sources.items()}
        if not self.configs[MIXTURE].num_experts:
            raise RunError(f"mixture must have experts, and {recipe.mixture} has none")
        if self.configs[DENSE].num_experts:
            raise RunError(
                f"dense must have no experts, and {recipe.dense} has {self.configs[DENSE].num_experts}"
            )
        for path in (
            *recipe.instructions,
            *(file for task in recipe.tasks for file in (task.train, task.test)),
        ):
            if not Path(path).is_file():
                raise RunError(f"there is no file {path}")

    def training_flops(self, name: str) -> int:
        """Of a token."""
        return training_flops(self.configs[name], self.recipe.max_length)

    def inference_flops(self, name: str) -> int:
        """Of a token."""
        return model_flops(self.configs[name], self.recipe.max_length).total()

    def steps(self, name: str, section: TrainSection) -> int:
        """Updates of a tuning: for the twin as many as cost the mixture's FLOPs, to the nearest whole one."""
        assert section.steps is not None
        if name == MIXTURE:
            return section.steps
        return max(1, round(section.steps * self.training_flops(MIXTURE) / self.training_flops(DENSE)))

    def training(
        self, name: str, start: Path, output: Path, files: tuple[str, ...], section: TrainSection
    ) -> TrainRecipe:
        """The recipe of one tuning of a model from `start`."""
        return self.recipe.training(
            str(start), output, files, section, self.steps(name, section), mixes=name == MIXTURE
        )

    def question_files(self, shots: int, folder: Path | None = None) -> dict[str, Path]:
        """Each task's test file with so many worked examples in front of every question; a file of its own in
        the folder, by default one in the output.
        """
        if not shots:
            return {task.name: Path(task.test) for task in self.recipe.tasks}
        folder = folder or self.folder / "questions"
        seed = self.recipe.seed
        return {task.name: write_questions(task, shots, seed, folder) for task in self.recipe.tasks}

    def regimes(self, mixture_tokens: int, dense_tokens: int) -> tuple[str, ...]:
        """In what two tunings on so many tokens are equal."""
        return matched_regimes(
            self.configs[MIXTURE],
            mixture_tokens,
            self.configs[DENSE],
            dense_tokens,
            context=self.recipe.max_length,
            tolerance=0.02,
        )


def run_comparison(recipe: FlanRecipe, console: Console) -> dict[str, Any]:
    """Do what is not yet done of a comparison, and write report.json and report.html into its output.

    Raises:
        RunError: a model, a file or a tuning is not usable.
    """
    from .check import check_comparison
    from .page import render_page
    from .report import build_report

    comparison = Comparison(recipe)
    check_comparison(comparison)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    results = run_stages(make_stages(comparison), comparison.folder, StageProgress(console))
    report = build_report(comparison, results)
    write_report(comparison.folder, report, render_page(report))
    return report


# --- stages ---


def make_stages(comparison: Comparison) -> list[Stage]:
    stages: list[Stage] = []
    for name in (MIXTURE, DENSE):
        stages += _stages_of(comparison, name)
    return stages


def _stages_of(comparison: Comparison, name: str) -> list[Stage]:
    recipe = comparison.recipe
    instructed = comparison.folder / "models" / f"{name}-instructions"
    source = {"model": file_hash(Path(comparison.sources[name])), "max_length": recipe.max_length}
    asked = {
        "questions": [(asdict(task), _hashes(task.train, task.test)) for task in recipe.tasks],
        "shots": recipe.shots,
        "measure_precision": recipe.measure_precision,
        "seed": recipe.seed,
    }
    measuring = sum(
        measuring_cost(comparison, name, recipe.tasks, shots) for shots in sorted({0, recipe.shots})
    )
    stages = [
        Stage(
            name=f"{name}-untuned",
            title=f"{name}: measure it as it is",
            work=partial(_measure, comparison, Path(comparison.sources[name])),
            settings=source | asked,
            cost=measuring,
        ),
        Stage(
            name=f"{name}-instructions",
            title=f"{name}: instruction tuning",
            work=partial(_instruct, comparison, name, instructed),
            settings=source
            | {"files": _hashes(*recipe.instructions)}
            | _tuning(comparison, name, recipe.instruction_tuning),
            makes=(instructed,),
            cost=tuning_cost(comparison, name, recipe.instructions, recipe.instruction_tuning),
        ),
        Stage(
            name=f"{name}-after-instructions",
            title=f"{name}: measure it after instructions",
            work=partial(_measure, comparison, instructed),
            settings={"max_length": recipe.max_length} | asked,
            inputs=(f"{name}-instructions",),
            cost=measuring,
        ),
    ]
    for task in recipe.tasks:
        for setup, start in (("task", Path(comparison.sources[name])), ("instructions-task", instructed)):
            stages.append(
                Stage(
                    name=f"{name}-{setup}-{task.name}",
                    title=f"{name}: {task.name}" + (" after instructions" if start == instructed else ""),
                    work=partial(_tune_and_measure, comparison, name, start, task),
                    settings=source
                    | {"task": asdict(task), "files": _hashes(task.train, task.test)}
                    | {"measure_precision": recipe.measure_precision}
                    | _tuning(comparison, name, recipe.task_tuning),
                    inputs=(f"{name}-instructions",) if start == instructed else (),
                    cost=tuning_cost(comparison, name, (task.train,), recipe.task_tuning)
                    + measuring_cost(comparison, name, (task,), 0),
                )
            )
    return stages


def _tuning(comparison: Comparison, name: str, section: TrainSection) -> dict[str, Any]:
    recipe = comparison.recipe
    moe = asdict(recipe.moe) if name == MIXTURE else None
    return {
        "train": asdict(section),
        "steps": comparison.steps(name, section),
        "moe": moe,
        "seed": recipe.seed,
    }


def _hashes(*files: str) -> list[str]:
    return [file_hash(Path(file)) for file in files]


# --- what stages cost, in rough seconds on two cores ---

_FLOPS_PER_SECOND = 1.5e11
_PARAMETERS_PER_SECOND = 2.5e8  # of an update, which reads and writes all of a mixture for a few tokens
_WRITTEN_PER_SECOND = 3e7  # parameters of a checkpoint with the optimizer's states, and of the model
_BYTES_PER_TOKEN = 5  # of JSON lines


def measuring_cost(comparison: Comparison, name: str, tasks: Sequence[FlanTask], shots: int) -> float:
    """Worked examples are about as long as questions."""
    tokens = sum(Path(task.test).stat().st_size for task in tasks) / _BYTES_PER_TOKEN * (1 + shots)
    return tokens * comparison.inference_flops(name) / _FLOPS_PER_SECOND


def tuning_cost(comparison: Comparison, name: str, files: Sequence[str], section: TrainSection) -> float:
    lines = [line for file in files for line in Path(file).read_bytes().splitlines()]
    tokens = min(sum(map(len, lines)) / _BYTES_PER_TOKEN / max(1, len(lines)), comparison.recipe.max_length)
    rows = section.batch_size * section.accumulate
    parameters = model_parameters(comparison.configs[name]).total()
    step = rows * tokens * comparison.training_flops(name) / _FLOPS_PER_SECOND
    step += parameters / _PARAMETERS_PER_SECOND
    return comparison.steps(name, section) * step + parameters / _WRITTEN_PER_SECOND


# --- work ---


def _instruct(comparison: Comparison, name: str, output: Path, on_share: Any) -> dict[str, Any]:
    recipe = comparison.recipe
    return _tune(
        comparison,
        name,
        Path(comparison.sources[name]),
        output,
        recipe.instructions,
        recipe.instruction_tuning,
    )


def _tune(
    comparison: Comparison,
    name: str,
    start: Path,
    output: Path,
    files: tuple[str, ...],
    section: TrainSection,
) -> dict[str, Any]:
    """Train, and say what it cost."""
    from moe_runtime.train.run import run_training

    result = run_training(comparison.training(name, start, output, files, section))
    gc.collect()  # a trainer and its model hold each other, and the next ones need the memory
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    losses = result.values("lm_loss")
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "training_flops": result.tokens * comparison.training_flops(name),
        "seconds": result.seconds,
        "losses": losses,
    }


def _tune_and_measure(
    comparison: Comparison, name: str, start: Path, task: FlanTask, on_share: Any
) -> dict[str, Any]:
    output = comparison.folder / "models" / f"{name}-{task.name}.part"
    shutil.rmtree(output, ignore_errors=True)
    try:
        cost = _tune(comparison, name, start, output, (task.train,), comparison.recipe.task_tuning)
        asked = {task.name: Path(task.test)}
        return {**cost, "measured": {"0": measure(output, asked, comparison.recipe.measure_precision)}}
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _measure(comparison: Comparison, model: Path, on_share: Any) -> dict[str, Any]:
    """All tasks without worked examples, and with `shots` of them in front."""
    precision = comparison.recipe.measure_precision
    numbers = sorted({0, comparison.recipe.shots})
    return {
        "measured": {
            str(shots): measure(model, comparison.question_files(shots), precision) for shots in numbers
        }
    }


def _described(folder: str) -> ModelConfig:
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise RunError(f"{folder} must be a checkpoint folder with a config.json, and has none")
    return model_config(json_object(file))
