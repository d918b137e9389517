"""The comparison as JSON, tables and sentences: quality against FLOPs of training and of inference."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_runtime.demo.stages import StageResult
from moe_runtime.machine import describe_machine

from .run import DENSE, MIXTURE, Comparison

# What was done to a model before it was asked, in the order of the tables.
SETUPS = {
    "untuned": "not tuned",
    "task": "task tuning only",
    "instructions": "instruction tuning",
    "instructions-task": "instruction tuning, then task tuning",
}


def build_report(comparison: Comparison, results: Mapping[str, StageResult]) -> dict[str, Any]:
    """Everything as JSON values. `rows` has an entry per model, set-up, task and number of examples."""
    values = {name: result.values for name, result in results.items()}
    rows = [row for name in (MIXTURE, DENSE) for row in _rows(comparison, name, values)]
    report = {
        "machine": describe_machine(),
        "recipe": comparison.recipe.to_dict(),
        "models": {
            name: {
                "folder": comparison.sources[name],
                "training_flops_per_token": comparison.training_flops(name),
                "inference_flops_per_token": comparison.inference_flops(name),
                "instruction_steps": values[f"{name}-instructions"]["steps"],
                "losses": values[f"{name}-instructions"]["losses"],
            }
            for name in (MIXTURE, DENSE)
        },
        "matched": comparison.regimes(
            *(values[f"{name}-instructions"]["tokens"] for name in (MIXTURE, DENSE))
        ),
        "rows": rows,
        "means": _means(rows),
        "seconds": sum(result.seconds for result in results.values()),
    }
    return json.loads(json.dumps(report))


def _rows(comparison: Comparison, name: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    instructed = values[f"{name}-instructions"]["training_flops"]

    def add(setup: str, measured: Mapping[str, Any], training_flops: int) -> None:
        for shots, tasks in measured.items():
            for task, figures in tasks.items():
                rows.append(
                    {
                        "model": name,
                        "setup": setup,
                        "shots": int(shots),
                        "task": task,
                        "training_flops": training_flops,
                        "inference_flops_per_token": comparison.inference_flops(name),
                        **figures,
                    }
                )

    add("untuned", values[f"{name}-untuned"]["measured"], 0)
    add("instructions", values[f"{name}-after-instructions"]["measured"], instructed)
    for task in comparison.recipe.tasks:
        alone, after = (values[f"{name}-{setup}-{task.name}"] for setup in ("task", "instructions-task"))
        add("task", alone["measured"], alone["training_flops"])
        add("instructions-task", after["measured"], instructed + after["training_flops"])
    return rows


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over tasks: the mean score and the mean training FLOPs of each model, set-up and number of examples."""
    means = []
    for setup in SETUPS:
        for shots in sorted({row["shots"] for row in rows if row["setup"] == setup}):
            for model in (MIXTURE, DENSE):
                chosen = [r for r in rows if (r["setup"], r["shots"], r["model"]) == (setup, shots, model)]
                means.append(
                    {
                        "model": model,
                        "setup": setup,
                        "shots": shots,
                        "score": sum(row["score"] for row in chosen) / len(chosen),
                        "training_flops": sum(row["training_flops"] for row in chosen) / len(chosen),
                        "inference_flops_per_token": chosen[0]["inference_flops_per_token"],
                    }
                )
    return means


def conclusions(report: Mapping[str, Any]) -> list[str]:
    """What was equal, and where the mixture is ahead of its twin, in sentences made of the numbers."""
    models = report["models"]
    ratio = {
        kind: models[MIXTURE][f"{kind}_flops_per_token"] / models[DENSE][f"{kind}_flops_per_token"]
        for kind in ("training", "inference")
    }
    equal = ", ".join(name.replace("_", " ") for name in report["matched"]) or "nothing"
    sentences = [
        f"Equal in both models' tuning: {equal}. A token costs the mixture {ratio['training']:.2f} times the "
        f"twin's FLOPs in training and {ratio['inference']:.2f} times in inference."
    ]
    by_key = {(mean["setup"], mean["shots"], mean["model"]): mean["score"] for mean in report["means"]}
    for setup, title in SETUPS.items():
        for shots in sorted({key[1] for key in by_key if key[0] == setup}):
            mixture, dense = (by_key[setup, shots, model] for model in (MIXTURE, DENSE))
            after = f", {shots} worked examples" if shots else ""
            sentences.append(
                f"{title.capitalize()}{after}: mean score {mixture:.3f} of the mixture, {dense:.3f} of the "
                f"dense twin, {mixture - dense:+.3f}."
            )
    return sentences


def score_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row per set-up and model, a column per task."""
    tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
    scores = {(r["setup"], r["shots"], r["model"], r["task"]): r["score"] for r in report["rows"]}
    headings = ["set-up", "examples", "model", *tasks, "mean", "training FLOPs", "inference FLOPs / token"]
    rows = [
        [
            SETUPS[mean["setup"]],
            str(mean["shots"]),
            mean["model"],
            *(f"{scores[mean['setup'], mean['shots'], mean['model'], task]:.3f}" for task in tasks),
            f"{mean['score']:.3f}",
            f"{mean['training_flops']:.3g}",
            f"{mean['inference_flops_per_token']:.3g}",
        ]
        for mean in report["means"]
    ]
    return headings, rows


def print_report(console: Console, report: Mapping[str, Any], folder: Path) -> None:
    headings, rows = score_table(report)
    table = Table(title="Scores of held-out tasks (higher is better)", title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place in (0, 2) else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in conclusions(report):
        console.print(f"- {sentence}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"\nReport: {folder / 'report.html'} and {folder / 'report.json'}", highlight=False)
