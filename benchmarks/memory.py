"""`python -m benchmarks memory [RECIPE]`: the plan of a training run's memory beside what the run takes.

Without a recipe the runs are those of CASES, on SmolLM2, and give a result file. A run is `moe-runtime train`
in a process of its own, cut to a few updates, with an allocator that gives memory back at once, so that the
process holds what its tensors hold. Its peak is less what it held before anything was loaded: Python and its
libraries.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.expert_load import (
    EXPERTS,
    MAX_LENGTH,
    ROWS,
    TOP_K,
    make_mixture,
    tiny_checkpoint,
    write_samples,
)
from benchmarks.result_file import RESULTS, write_result
from moe_runtime.demo.checkpoint import smollm2_checkpoint
from moe_runtime.machine import describe_machine
from moe_runtime.train.recipe import TrainRecipe, load_recipe, recipe_from_dict

UPDATES = 3
TOLERANCE = 0.1
CHARACTERS = 3000
# the model, and its section `train`
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "mixture": ("experts", {}),
    "mixture, layers made again": ("experts", {"gradient_checkpointing": True}),
    "mixture, experts frozen": ("experts", {"freeze": "experts"}),
    "mixture, adapters": ("experts", {"lora": {"rank": 8}}),
    "dense, bfloat16": ("dense", {"precision": "bfloat16"}),
    "mixture, bfloat16": ("experts", {"precision": "bfloat16"}),
    "mixture, adapters, bfloat16": ("experts", {"lora": {"rank": 8}, "precision": "bfloat16"}),
}
CHILD = """
import json, sys
import transformers, torch, moe_runtime.train.run as run
from moe_runtime.train.recipe import recipe_from_dict
def field(name):
    return 1024 * int(open("/proc/self/status").read().split(name + ":")[1].split()[0])
recipe = recipe_from_dict(json.load(open(sys.argv[1])))
before = field("VmRSS")
run.run_training(recipe)
print("\\n" + json.dumps({"before": before, "peak": field("VmHWM")}))
"""


def measured_bytes(recipe_file: Path) -> int:
    """The peak of a process that trains by a recipe, less what its libraries take."""
    # every block of 64 kB and more is a mapping of its own, which ends when it is freed
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(recipe_file)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"the run failed: {done.stderr[-2000:]}")
    seen = json.loads(done.stdout.splitlines()[-1])
    return seen["peak"] - seen["before"]


def compare(recipe: TrainRecipe) -> tuple[dict[str, int], int]:
    """The plan of a recipe's run, and the peak of such a run of a few updates."""
    from moe_runtime.hf.quiet import quiet_transformers
    from moe_runtime.train.memory import plan_memory

    with tempfile.TemporaryDirectory(prefix="memory-", suffix=".part") as folder:
        section = replace(
            recipe.train, steps=UPDATES, epochs=None, restarts=(), warmup_steps=0, save_every=None
        )
        recipe = replace(recipe, output=str(Path(folder) / "output"), train=section)
        with quiet_transformers():
            plan = plan_memory(recipe).to_dict()
        file = Path(folder) / "recipe.json"
        file.write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
        return plan, measured_bytes(file)


def report(name: str, plan: dict[str, int], peak: int) -> bool:
    """Print a comparison; whether the plan holds."""
    planned = plan["peak"]
    print(
        f"{name}: planned {planned / 1e9:.3f} GB, measured {peak / 1e9:.3f} GB, {peak / planned:.3f} of it",
        flush=True,
    )
    return holds(plan, peak)


def holds(plan: dict[str, int], peak: int) -> bool:
    return abs(peak - plan["peak"]) <= TOLERANCE * plan["peak"]


# --- the runs of the result file ---


def recipes(folder: Path, tiny: bool) -> Iterator[tuple[str, TrainRecipe]]:
    """Every case, with rows that are full."""
    base = tiny_checkpoint(folder / "base") if tiny else smollm2_checkpoint()
    models = {"dense": str(base), "experts": str(make_mixture(base, folder / "mixture"))}
    # as many characters as always make a whole row
    files = write_samples(folder / "texts", ("scripture",), 2 * UPDATES, CHARACTERS)
    data = {"train": list(map(str, files)), "max_length": MAX_LENGTH, "too_long": "cut"}
    for name, (model, section) in CASES.items():
        values = {"model": models[model], "output": str(folder / "trained"), "data": data}
        train = {"steps": UPDATES, "batch_size": ROWS, **section}
        yield name, recipe_from_dict(values | {"train": train})


def measure_cases(tiny: bool) -> list[dict[str, Any]]:
    """Rows of a result file."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        for name, recipe in recipes(Path(folder), tiny):
            plan, peak = compare(recipe)
            report(name, plan, peak)
            case = {"name": name, "model": "tiny" if tiny else "SmolLM2-135M", "rows": ROWS}
            case |= {"length": MAX_LENGTH, "steps": UPDATES}
            rows.append({"case": case, "plan": plan, "measured_bytes": peak})
    return rows


def section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    """Of docs/performance.md."""
    from benchmarks.sections import _origin, _table

    rows, case = content["rows"], content["rows"][0]["case"]
    header = ["run", "parameters", "trained", "planned (GB)", "measured (GB)", "measured / planned"]
    lines = [
        [
            row["case"]["name"],
            f"{row['plan']['total_parameters'] / 1e6:.1f} M",
            f"{row['plan']['trained_parameters'] / 1e6:.1f} M",
            f"{row['plan']['peak'] / 1e9:.2f}",
            f"{row['measured_bytes'] / 1e9:.2f}",
            f"{row['measured_bytes'] / row['plan']['peak']:.2f}",
        ]
        for row in rows
    ]
    held = sum(holds(row["plan"], row["measured_bytes"]) for row in rows)
    explained = (
        "`moe-runtime plan` beside the peak of the run's process, less what it held before anything was "
        f"loaded. {case['model']}, dense and as a mixture of {EXPERTS} copies of its feed-forward, "
        f"{TOP_K} per token; {case['steps']} steps of {case['rows']} rows of {case['length']} tokens, "
        f"float32 unless its name says bfloat16, fused AdamW. Within a tenth: {held} of {len(rows)}."
    )
    title = "## Memory of training beside its plan"
    return [title, explained, _table(header, lines), _origin(content, path, root)]


# --- the command ---


def main(arguments: argparse.Namespace) -> int:
    if arguments.recipe is not None:
        plan, peak = compare(load_recipe(arguments.recipe))
        return 0 if report(arguments.recipe.name, plan, peak) else 1
    machine = describe_machine()  # before the runs: of the code that runs
    rows = measure_cases(arguments.tiny)
    write_result(arguments.output, {"suite": "memory", "machine": machine, "rows": rows})
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, nargs="?", help="a recipe of `moe-runtime train`; its output is not made"
    )
    parser.add_argument("--tiny", action="store_true", help="models of seconds, to show that all runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
