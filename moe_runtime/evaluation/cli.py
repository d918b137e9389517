"""The `eval` command of `moe-runtime`, as a plain function."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def eval_command(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder with its tokenizer.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text file, or NAME=FILE; once for each domain.", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A file of JSON lines; see docs/eval.md.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each text at most.")] = 65536,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure a model: perplexity of texts; choices, exact answers and completions from JSON lines."""
    from ..profile.cli import chosen_device
    from ..stats.cli import texts_by_domain

    if not text and not task:
        raise ValueError("--text or --task must be given, got neither")
    if max_tokens < 2:
        raise ValueError(f"--max-tokens must be at least 2, got {max_tokens}")
    texts = texts_by_domain(text or [])
    for file in task or []:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--task: there is no file {file}")
    from .run import evaluate_folder
    from .tables import print_evaluation

    console = Console(stderr=json_output)  # stdout is for the report
    if not console.is_terminal:  # a file or a pipe has no width; the tables need this much
        console.width = 140
    report = evaluate_folder(
        model,
        texts,
        task or [],
        max_tokens=max_tokens,
        device=chosen_device(device),
        console=Console(stderr=True),
    )
    print_evaluation(console, report)
    if json_output:
        typer.echo(json.dumps(report, indent=2))
