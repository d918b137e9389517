"""The `train` command of `moe-runtime`."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def train_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load model and data, print what would happen; train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
) -> None:
    """Fine-tune a Mixture-of-Experts model, or a dense one."""
    from .recipe import load_recipe

    loaded = load_recipe(recipe)
    import torch

    from moe_runtime.machine import keep_freed_memory

    from .run import plan_training, run_training

    if dry_run:
        planned = plan_training(loaded, resume)
        if as_json:
            typer.echo(json.dumps(planned, indent=2))
        else:
            _print_plan(planned)
        return
    keep_freed_memory()
    if not torch.cuda.is_available():  # on a GPU it would mean TF32
        torch.set_float32_matmul_precision("high")
    result = run_training(loaded, resume, console=Console(file=sys.stderr))
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes one speaks
        return
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    for name, value in result.metrics.items():
        typer.echo(f"{name}: {value:.4f}")
    typer.echo(
        f"Wrote {result.output}: {result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:.0f} s"
    )


def _print_plan(planned: dict[str, Any]) -> None:
    table = Table(title="Parameters", title_justify="left")
    for heading in ("part", "all", "trained"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, counts in planned["parameters"].items():
        table.add_row(part, f"{counts['all']:,}", f"{counts['trained']:,}")
    Console().print(table)
    typer.echo(f"{planned['steps']:,} steps of {planned['rows_per_step']:,} rows")
    if planned["checkpoint"] is not None:
        typer.echo(f"Would go on from {planned['checkpoint']}")
    typer.echo(f"Would write {planned['output']}")
