"""`python -m benchmarks flan REPORT`: keep the report.json of a finished `moe-runtime flan` as a result file.

Device, date and commit are those of the run, which may have been in another checkout.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.result_file import RESULTS, write_result

KEYS = ("machine", "recipe", "models", "matched", "rows", "means", "seconds")
SHOWS = (
    "Mean score over training FLOPs, and over inference FLOPs per token: filled without worked examples, "
    "hollow with them."
)


def stored(report_file: Path, output: Path) -> Path:
    """Write the report among the results; returns its path there.

    Raises:
        ValueError: the file is no report of a comparison.
    """
    report = json.loads(report_file.read_text(encoding="utf-8"))
    missing = [key for key in KEYS if key not in report]
    if missing:
        raise ValueError(
            f"{report_file} must be a report.json of moe-runtime flan, and has no {missing[0]!r}"
        )
    return write_result(output, {"suite": "flan", **report})


def section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    """Of docs/performance.md: scores of a mixture and its dense twin in all set-ups."""
    from benchmarks.sections import _origin, _table
    from moe_runtime.flan.report import conclusions, score_table

    sentences = "\n".join(f"- {sentence}" for sentence in conclusions(content))
    return [
        "## Instruction tuning of a mixture and its dense twin",
        explained(content),
        _table(*score_table(content)),
        sentences,
        caveat(content),
        _origin(content, path, root),
    ]


def explained(content: dict[str, Any]) -> str:
    """What was tuned and measured, from the recipe."""
    recipe, models = content["recipe"], content["models"]
    questions = {row["task"]: row["examples"] for row in content["rows"]}
    asked = " and ".join(f"{count} questions of {task}" for task, count in questions.items())
    instructions = ", ".join(Path(file).name.partition(".")[0] for file in recipe["instructions"])
    first, task = recipe["instruction_tuning"], recipe["task_tuning"]
    rows = {name: section["batch_size"] * section["accumulate"] for name, section in _tunings(recipe)}
    return (
        f"`moe-runtime flan`: {Path(models['mixture']['folder']).name} and its dense twin, "
        f"{Path(models['dense']['folder']).name}, measured with {asked}. Instructions ({instructions}): "
        f"{first['steps']} steps of {rows['instruction_tuning']} rows; a task: {task['steps']} steps of "
        f"{rows['task_tuning']}. Those are the mixture's; its twin gets as many as cost the same FLOPs "
        f"({models['dense']['instruction_steps']} for the instructions). Scores are shares of right choices, "
        f"exact answers or right tokens, measured in {recipe['measure_precision']}. The whole run took "
        f"{content['seconds'] / 60:.0f} minutes."
    )


def _tunings(recipe: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, recipe[name]) for name in ("instruction_tuning", "task_tuning")]


def caveat(content: dict[str, Any]) -> str:
    """How far a score may be off by its number of questions alone."""
    fewest = min(row["examples"] for row in content["rows"])
    return (
        f"Read with care: one run with seed {content['recipe']['seed']}. The standard error of a share of "
        f"{fewest} questions is up to {0.5 / math.sqrt(fewest):.3f}."
    )


def draw_flan(content: dict[str, Any]) -> str:
    from moe_runtime.flan.page import quality_figure

    return quality_figure(content)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, help="report.json of a finished comparison")
    parser.add_argument("--output", type=Path, default=RESULTS)


def main(arguments: argparse.Namespace) -> int:
    stored(arguments.report, arguments.output)
    return 0
