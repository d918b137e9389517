"""`python -m benchmarks expert_load`: how evenly experts are used while a mixture of equal ones is trained.

SmolLM2 becomes a mixture of four copies of its feed-forward, and `moe-runtime train`, in a process of its
own, trains it by the recipe's defaults on the demonstration's texts. All figures are of the run's own log.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.result_file import RESULTS, write_result
from moe_runtime.demo.checkpoint import smollm2_checkpoint
from moe_runtime.demo.text import BUILT_IN
from moe_runtime.machine import describe_machine

EXPERTS, TOP_K = 4, 2
STEPS, ROWS, MAX_LENGTH = 200, 2, 256
SAMPLES, CHARACTERS = 500, 450  # of each text; two such samples or three fill a row
TINY_TEXTS = ("scripture", "dictionary")  # reading the Python library takes long
TINY_STEPS, TINY_SAMPLES = 20, 20
TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
FIGURES = (
    "load_cv",
    "load_cv_worst",
    "load_highest",
    "load_lowest",
    "dead_experts",
    "balance_loss",
    "router_entropy",
    "lm_loss",
)


# --- what is trained, on what ---


def tiny_checkpoint(folder: Path) -> Path:
    """SmolLM2's tokenizer, and random weights of a small model of its kind."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from moe_runtime.hf.loading import load_tokenizer

    config = AutoConfig.from_pretrained(smollm2_checkpoint(), **TINY)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(smollm2_checkpoint()).save_pretrained(folder)
    return folder


def make_mixture(base: Path, folder: Path) -> Path:
    """Every expert a copy of the base's feed-forward, with a random router."""
    import upcycle

    values = {
        "method": "copy",
        "base": str(base),
        "output": str(folder),
        "target": "moe_runtime",
        "experts": EXPERTS,
        "experts_per_token": TOP_K,
    }
    upcycle.upcycle(upcycle.recipe_from_dict(values))
    return folder


def write_samples(folder: Path, names: Iterable[str], samples: int, length: int = CHARACTERS) -> list[Path]:
    """A file of each text: its documents in a drawn order, cut into samples of `length` characters."""
    folder.mkdir()
    files = []
    for name in names:
        documents = BUILT_IN[name]().documents
        text = "\n".join(random.Random(name).sample(documents, len(documents)))
        cut = [text[place * length : (place + 1) * length] for place in range(samples)]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": part}) + "\n" for part in cut), encoding="utf-8")
    return files


# --- the run ---


def train(folder: Path, tiny: bool) -> dict[str, Any]:
    """The record that `moe-runtime train` leaves of its run."""
    base = tiny_checkpoint(folder / "base") if tiny else smollm2_checkpoint()
    names = TINY_TEXTS if tiny else tuple(BUILT_IN)
    files = write_samples(folder / "texts", names, TINY_SAMPLES if tiny else SAMPLES)
    recipe = {
        "model": str(make_mixture(base, folder / "mixture")),
        "output": str(folder / "trained"),
        "data": {"train": list(map(str, files)), "max_length": MAX_LENGTH, "too_long": "cut"},
        "train": {
            "steps": TINY_STEPS if tiny else STEPS,
            "batch_size": ROWS,
            "precision": "bfloat16",
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    subprocess.run([sys.executable, "-m", "moe_runtime", "train", str(file)], check=True)
    return json.loads((folder / "trained" / "training.json").read_text(encoding="utf-8"))


def row_of(record: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """The row of a result file."""
    recipe, log = record["recipe"], record["result"]["log"]
    entries = [entry for entry in log if "load_cv" in entry]
    return {
        "case": {
            "model": "tiny" if tiny else "SmolLM2-135M",
            "experts": EXPERTS,
            "experts_per_token": TOP_K,
            "steps": record["result"]["steps"],
            "rows": ROWS,
            "length": MAX_LENGTH,
        },
        "texts": [Path(file["path"]).stem for file in record["data"]["files"]],
        "tokens": record["result"]["tokens"],
        "recipe": {name: recipe.get(name, "defaults") for name in ("train", "moe", "seed")},
        "log": [{name: entry[name] for name in ("step", *FIGURES)} for entry in entries],
        "load_of_experts": record["load"],  # of each layer, since the entry before the last
        "load_cv_of_layers": [_cv(load) for load in record["load"]],
    }


def _cv(load: list[float]) -> float:
    """Standard deviation over mean."""
    mean = sum(load) / len(load)
    return (sum((share - mean) ** 2 for share in load) / len(load)) ** 0.5 / mean


# --- its section of docs/performance.md ---


def section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    from benchmarks.sections import _origin, _table

    (row,) = content["rows"]
    case, log = row["case"], row["log"]
    every = max(1, len(log) // 4)
    shown = [log[0], *log[every - 1 :: every]] if every > 1 else log
    header = [
        "up to step",
        "CV, mean of layers",
        "worst layer",
        "highest load",
        "lowest load",
        "dead experts",
        "balance loss",
        "entropy",
        "loss",
    ]
    lines = [
        [
            str(entry["step"]),
            *(f"{entry[name]:{'d' if name == 'dead_experts' else '.3f'}}" for name in FIGURES),
        ]
        for entry in shown
    ]
    explained = (
        f"{case['model']} as a mixture of {case['experts']} copies of its feed-forward, "
        f"{case['experts_per_token']} per token, trained by `moe-runtime train` for {case['steps']} steps of "
        f"{case['rows']} rows with up to {case['length']} tokens of {', '.join(row['texts'])}; "
        f"{row['recipe']['train']['precision']}, all else the recipe's defaults. From the run's log; each "
        f"line is of {log[0]['step']} steps up to it. CV: standard deviation of the experts' loads "
        "over their mean. An even load is 1, and so is an even balance loss."
    )
    dead = max(entry["dead_experts"] for entry in log)
    cvs = row["load_cv_of_layers"]
    verdict = (
        f"Most dead experts in any entry: {dead}. CV at the end below 0.5: "
        f"{'yes' if log[-1]['load_cv'] < 0.5 else 'no'} on average, "
        f"{'yes' if log[-1]['load_cv_worst'] < 0.5 else 'no'} in the worst layer, "
        f"in {sum(cv < 0.5 for cv in cvs)} of {len(cvs)} layers."
    )
    title = "## Load of experts in training"
    return [title, explained, _table(header, lines), verdict, _origin(content, path, root)]


# --- the command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, to show that all runs")
    parser.add_argument("--output", type=Path, default=RESULTS)


def main(arguments: argparse.Namespace) -> int:
    machine = describe_machine()  # before the run: of the code that runs
    with tempfile.TemporaryDirectory(prefix="expert-load-") as folder:
        row = row_of(train(Path(folder), arguments.tiny), arguments.tiny)
    write_result(arguments.output, {"suite": "expert_load", "machine": machine, "rows": [row]})
    return 0
