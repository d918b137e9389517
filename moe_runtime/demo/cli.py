"""The `demo` command of `moe-runtime`, as a plain function."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo_command(
    output: Annotated[Path, typer.Option(help="Folder for models, recipes and the report.")] = Path(
        "runs/demo"
    ),
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text of your own as one more domain: NAME=PATH, UTF-8. Repeatable."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Start from this dense checkpoint folder instead of SmolLM2-135M."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do everything again instead of going on where a run stopped.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON for programs.")] = False,
) -> None:
    """Turn a dense checkpoint into MoE and BAM models and measure them against it, on real text.

    Takes about eight minutes on two cores; a run that was cut off goes on where it stopped.
    """
    import torch

    from ..machine import keep_freed_memory
    from .run import run_demo

    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # for all that is compared; perplexities do not need more
    # progress goes to stderr when stdout is for a program
    console = Console(stderr=as_json)
    if not console.is_terminal:  # a file or a pipe has no width; the tables need this much
        console.width = 120
    report = run_demo(output, texts=text or (), checkpoint=checkpoint, fresh=fresh, console=console)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
