"""The `stats` command of `moe-runtime`, as a plain function."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def stats_command(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder with its tokenizer.")],
    text: Annotated[
        list[str],
        typer.Option(
            help="A text file, or NAME=FILE; once for each domain. The name of a file is its domain's."
        ),
    ],
    max_tokens: Annotated[int, typer.Option(help="Tokens of each file at most.")] = 4096,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots to this file.", show_default=False)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what routers and experts do with text: load, balance, entropy, margin, how alike experts are."""
    from ..profile.cli import check_folder, chosen_device

    texts = texts_by_domain(text)
    if max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {max_tokens}")
    if html is not None:
        if html.is_dir():
            raise ValueError(f"--html must be a file, and {html} is a folder")
        check_folder("--html must be in a folder", html.absolute().parent)
        if find_spec("matplotlib") is None:
            raise ValueError("--html needs matplotlib for its plots; run: pip install 'moe-runtime[demo]'")
    from .run import measure_model
    from .tables import print_stats

    console = Console(stderr=json_output)  # stdout is for the report
    if not console.is_terminal:  # a file or a pipe has no width; the table needs this much
        console.width = 140
    report = measure_model(
        model, texts, max_tokens=max_tokens, device=chosen_device(device), console=Console(stderr=True)
    )
    print_stats(console, report)
    if html is not None:
        from .page import render_page

        html.absolute().parent.mkdir(parents=True, exist_ok=True)
        unfinished = html.with_name(f"{html.name}.part")
        unfinished.write_text(render_page(report), encoding="utf-8")
        os.replace(unfinished, html)
        console.print(f"\nWritten: {html}", highlight=False, soft_wrap=True)
    if json_output:
        typer.echo(json.dumps(report, indent=2))


def texts_by_domain(arguments: list[str]) -> dict[str, str]:
    """Files by domain, from arguments FILE or NAME=FILE."""
    texts: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).is_file():
            name, path = Path(argument).stem, argument
        if not Path(path).is_file():
            raise FileNotFoundError(f"--text: there is no file {path}")
        if name in texts:
            raise ValueError(
                f"--text must name each domain once, got {name!r} twice; write NAME={path} to choose another"
            )
        texts[name] = path
    return texts
