"""What the models are asked: lines of a task's file, maybe behind worked examples; and one score."""

import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_runtime.errors import RunError
from moe_runtime.train.data.samples import json_objects
from moe_runtime.train.data.sources import read_lines
from moe_runtime.train.recipe import Precision

from .recipe import FlanTask

BETWEEN = "\n\n"
# The figure of each kind that is its score: a share of right answers, or of right tokens.
SCORES = {"choice": "accuracy_per_byte", "exact": "exact_match", "completion": "token_accuracy"}


def write_questions(task: FlanTask, shots: int, seed: int, folder: Path) -> Path:
    """The task's test file with so many worked examples of its training file in front of every prompt.

    Raises:
        RunError: a line has no `prompt`, or the training file too few examples.
    """
    examples = [
        values["prompt"] + values["completion"]
        for _, values in json_objects(Path(task.train), read_lines(Path(task.train)))
        if isinstance(values.get("prompt"), str) and isinstance(values.get("completion"), str)
    ]
    if len(examples) < shots:
        raise RunError(
            f"shots must be at most the lines with 'prompt' and 'completion' of {task.train}, which are "
            f"{len(examples)}, got {shots}"
        )
    draw = random.Random(f"{seed} {task.name}")
    lines = []
    for where, values in json_objects(Path(task.test), read_lines(Path(task.test))):
        if not isinstance(values.get("prompt"), str):
            raise RunError(f"{where}: must have 'prompt', a text, for worked examples in front of it")
        prompt = BETWEEN.join([*draw.sample(examples, shots), values["prompt"]])
        lines.append(json.dumps(values | {"prompt": prompt}, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{task.name}.{shots}-shot.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def measure(model: Path, files: dict[str, Path], precision: Precision) -> dict[str, Any]:
    """Figures of each task by its name, and as `score` the one that is compared. A file has one task."""
    import torch

    from moe_runtime.evaluation.run import evaluate_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = {}
    for name, file in files.items():
        report = evaluate_folder(
            model,
            {},
            [str(file)],
            max_tokens=2,
            device=device,
            console=Console(quiet=True),
            dtype=getattr(torch, precision),
        )
        (figures,) = report["tasks"].values()
        measured[name] = {**figures, "score": figures[SCORES[figures["kind"]]]}
    return measured
