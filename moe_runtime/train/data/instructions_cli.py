"""The `instructions` command of `moe-runtime`, as a plain function."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def instructions_command(
    folder: Annotated[Path, typer.Argument(help="A new folder for the files.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task, see docs/data.md; once for each. All by default.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(help="Lines to train on, of each task, at most.")] = 2000,
    heldout: Annotated[int, typer.Option(help="Lines that are held out, of each task, at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Write instructions made of real text on this machine: dictionary, Python and the King James Bible."""
    from .instructions import TASKS, write_instructions

    for name, value in (("--samples", samples), ("--heldout", heldout)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    summary = write_instructions(folder, task or list(TASKS), samples=samples, heldout=heldout, seed=seed)
    if json_output:
        typer.echo(json.dumps(summary, indent=2))
        return
    table = Table(title=f"Instructions in {folder}", title_justify="left")
    for heading in ("task", "train", "held out", "source", "licence"):
        table.add_column(heading, justify="right" if heading in ("train", "held out") else "left")
    for name, counts in summary["tasks"].items():
        row = (counts["train"], counts["heldout"], counts["origin"], counts["licence"])
        table.add_row(name, *map(str, row))
    Console().print(table)
