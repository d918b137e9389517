"""The `flan` command of `moe-runtime`, as a plain function."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def flan_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see docs/flan.md.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Tune a mixture and its dense twin in the three set-ups of FLAN-MoE, and compare them.

    A run that was cut off goes on where it stopped.
    """
    from .recipe import load_recipe

    loaded = load_recipe(recipe)
    if find_spec("matplotlib") is None:
        raise ValueError("flan needs matplotlib for its plots; run: pip install 'moe-runtime[demo]'")
    import torch

    from moe_runtime.machine import keep_freed_memory

    from .report import print_report
    from .run import run_comparison

    keep_freed_memory()
    if not torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # for both models
    console = Console(stderr=json_output)  # stdout is for the report
    if not console.is_terminal:  # a file or a pipe has no width; the table needs this much
        console.width = 160
    report = run_comparison(loaded, console)
    print_report(console, report, Path(loaded.output))
    if json_output:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
