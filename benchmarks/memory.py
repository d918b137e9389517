"""`python -m benchmarks memory RECIPE`: the plan of a training run's memory beside what the run takes.

The run is `moe-runtime train` in a process of its own, cut to a few updates, with an allocator that gives
memory back at once, so that the process holds what its tensors hold. Its peak is less what it held before
anything was loaded: Python and its libraries.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from moe_runtime.train.recipe import load_recipe

UPDATES = 3
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


def main(arguments: argparse.Namespace) -> int:
    from moe_runtime.hf.quiet import quiet_transformers
    from moe_runtime.train.memory import plan_memory

    with tempfile.TemporaryDirectory(prefix="memory-", suffix=".part") as folder:
        recipe = load_recipe(arguments.recipe)
        section = replace(
            recipe.train, steps=UPDATES, epochs=None, restarts=(), warmup_steps=0, save_every=None
        )
        recipe = replace(recipe, output=str(Path(folder) / "output"), train=section)
        with quiet_transformers():
            planned = plan_memory(recipe).peak
        file = Path(folder) / "recipe.json"
        file.write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
        peak = measured_bytes(file)
    print(f"planned {planned / 1e9:.3f} GB, measured {peak / 1e9:.3f} GB, {peak / planned:.3f} of the plan")
    return 0 if abs(peak - planned) <= 0.1 * planned else 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a recipe of `moe-runtime train`; its output is not made")
