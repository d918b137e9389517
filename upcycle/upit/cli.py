"""The `upit` command of `moe-runtime`."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from upcycle.upit.recipe import load_upit_recipe


class StageName(StrEnum):
    """The stages, in order."""

    PREPARE = "prepare"
    EXPAND = "expand"
    ROUTE = "route"
    ASSEMBLE = "assemble"
    POST_TRAIN = "post_train"


def upit_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)],
    stage: Annotated[StageName | None, typer.Option(help="Run this stage only.", show_default=False)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check base and data, print the stages; train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Fine-tune a dense model into a trained mixture of experts (UpIT).

    A run that was stopped goes on where it was when the command is given again.
    """
    from upcycle.upit.pipeline import Run

    loaded = load_upit_recipe(recipe)
    run = Run(loaded, lambda line: print(line, file=sys.stderr, flush=True))
    if dry_run:
        planned = run.plan()
        if as_json:
            typer.echo(json.dumps(planned, indent=2))
        else:
            _print_plan(planned)
        return
    results = run.run(stage.value if stage else None)
    if as_json:
        typer.echo(json.dumps({"output": loaded.output, "work": loaded.work, "stages": results}, indent=2))
    elif "post_train" in results:
        typer.echo(f"Wrote {loaded.output}; what happened in each stage is in {loaded.work}")


def _print_plan(planned: dict[str, Any]) -> None:
    table = Table(title="Stages", title_justify="left")
    for heading in ("stage", "epochs", "done"):
        table.add_column(heading)
    for row in planned["stages"]:
        epochs = "" if row["epochs"] is None else f"{row['epochs']:g}"
        table.add_row(row["stage"], epochs, "yes" if row["done"] else "no")
    Console().print(table)
    typer.echo(
        f"{planned['samples']:,} samples ({planned['samples_left_out']:,} left out), "
        f"{planned['tokens']:,} tokens, {planned['steps_per_epoch']:,} steps per epoch, "
        f"{planned['seed_samples']:,} samples for routers"
    )
    typer.echo(f"Would write {planned['parameters']:,} parameters, {planned['bytes'] / 1e9:.2f} GB")
