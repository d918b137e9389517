"""The `export` command of `moe-runtime`."""

from pathlib import Path
from typing import Annotated

import typer


def export_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint-… folder of a training run.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", show_default=False)],
) -> None:
    """Write the model of a training run's checkpoint, also one of several processes, as a plain folder."""
    from .export import export_checkpoint

    export_checkpoint(checkpoint, output)
    typer.echo(f"Wrote {output}")
