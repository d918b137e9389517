"""The `profile` command of `moe-runtime`, as a plain function."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .settings import ProfileSettings, parse_sizes

REPORT, PAGE = "report.json", "report.html"


def profile_command(  # noqa: PLR0913 - every option of the command is an argument
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder; or a config.json or a named shape, which get random weights."
        ),
    ],
    batch: Annotated[str, typer.Option(help="Sequences at once; several joined by commas.")] = "1",
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt; several joined by commas.")] = "32,128",
    output: Annotated[str, typer.Option(help="Tokens that are made; several joined by commas.")] = "16",
    compare: Annotated[
        str | None,
        typer.Option(
            help="Variants, joined by commas: implementations of the experts such as moe_runtime, grouped_mm "
            "or eager, and dense, a dense model of equal active FLOPs. Default: moe_runtime,grouped_mm,dense."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed runs of every variant for each size.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (that of the file), float32, bfloat16 or float16.")
    ] = "auto",
    output_dir: Annotated[Path, typer.Option(help="Folder of report.json and report.html.")] = Path(
        "runs/profile"
    ),
    html: Annotated[bool, typer.Option("--html", help="Write report.html with plots too.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of the last size to this file.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Time a model by step, layer and operation, on moe_runtime's kernels and on what else it can run on.

    Variants of one model must agree in their logits before they are timed, in turns.
    """
    settings = ProfileSettings(
        batches=parse_sizes("--batch", batch),
        prompts=parse_sizes("--prompt", prompt),
        outputs=parse_sizes("--output", output),
        rounds=rounds,
    )
    _check_files(output_dir, trace, html=html)
    from .run import run_profile
    from .tables import print_profile

    console = Console(stderr=json_output)  # stdout is for the report
    if not console.is_terminal:  # a file or a pipe has no width; the tables need this much
        console.width = 140
    report = run_profile(
        model,
        settings=settings,
        compare=None if compare is None else [name.strip() for name in compare.split(",")],
        device=chosen_device(device),
        dtype=_checked_dtype(dtype),
        trace=trace,
        console=console,
    )
    written = _write_report(output_dir, report, html=html)
    print_profile(console, report)
    files = [*written, *([trace] if trace else [])]
    console.print(f"\nWritten: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
    if json_output:
        typer.echo(json.dumps(report, indent=2))


# --- checks, before anything is measured ---


def chosen_device(device: str | None) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if device is None:
        return "cuda" if has_gpu else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device.startswith("cuda") and not has_gpu:
        raise ValueError(f"--device must be cpu where there is no CUDA GPU, got {device!r}")
    return device


def _checked_dtype(dtype: str) -> str:
    from .variants import DTYPES

    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def _check_files(output_dir: Path, trace: Path | None, *, html: bool) -> None:
    check_folder("--output-dir must be a folder", output_dir)
    if trace is not None:
        if trace.is_dir():
            raise ValueError(f"--trace must be a file, and {trace} is a folder")
        if trace.resolve() in [(output_dir / name).resolve() for name in (REPORT, PAGE)]:
            raise ValueError(
                f"--trace must be another file than {REPORT} and {PAGE} of --output-dir, got {trace}"
            )
        check_folder("--trace must be in a folder", trace.absolute().parent)
    if html and find_spec("matplotlib") is None:
        raise ValueError("--html needs matplotlib for its plots; run: pip install 'moe-runtime[demo]'")


def check_folder(demand: str, folder: Path) -> None:
    """The folder is there and can be written to, or can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{demand}, and {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{demand} that can be written to, and {there} is not")


# --- the report ---


def _write_report(folder: Path, report: dict[str, Any], *, html: bool) -> list[Path]:
    """report.json and, on request, report.html, each replaced when whole."""
    from .page import render_page

    texts = {REPORT: json.dumps(report, indent=1)}
    if html:
        texts[PAGE] = render_page(report)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        unfinished = folder / f"{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / name)
    return [folder / name for name in texts]
