"""The `upcycle` and `verify` commands of `moe-runtime`, as plain functions."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_runtime.recipe_file import read_yaml
from upcycle.errors import RecipeError
from upcycle.mergekit import is_mergekit, translate
from upcycle.plan import UpcyclePlan
from upcycle.recipe import Recipe, recipe_from_dict
from upcycle.run import UpcycleResult, upcycle
from upcycle.targets import eager_experts_note
from upcycle.tasks import (
    Change,
    Normal,
    NormalNoise,
    Orthogonal,
    Redraw,
    Scale,
    TensorTask,
    Uniform,
    UniformNoise,
    Zeros,
)
from upcycle.verify import verify


def upcycle_command(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe, or mergekit-moe configuration (YAML).", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write here instead of the recipe's 'output'.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the plan; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Make a Mixture-of-Experts model from dense ones, by a recipe or a configuration of mergekit-moe."""
    result = upcycle(_read(recipe, output), dry_run=dry_run)
    if as_json:
        tensors = {"plan": _rows(result.plan)} if dry_run else {}
        typer.echo(json.dumps({**result.to_dict(), **tensors}, indent=2))
        return
    if dry_run:
        _console().print(_plan_table(result.plan))
    typer.echo(_summary(result))
    note = eager_experts_note(result.plan.recipe.target, result.plan.model, result.plan.dtype)
    if note is not None:
        typer.echo(note)


def replicas_command(
    model: Annotated[
        Path, typer.Argument(help="Folder of a mixture with its tokenizer.", show_default=False)
    ],
    text: Annotated[list[str], typer.Option(help="A text file to learn from; may be given again.")],
    experts: Annotated[int, typer.Option(help="Experts of the mixture to make.")],
    most: Annotated[int, typer.Option(help="Copies of one expert at most.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each file at most.")] = 20480,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Choose which experts `replicate` copies, by their gradients; prints that section of a recipe."""
    from rich.progress import Progress

    from moe_runtime.hf.quiet import quiet_transformers
    from upcycle.replicas import choose_counts

    for name, value in (("--most", most), ("--max-tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    console = Console(stderr=True)
    with (
        quiet_transformers(),
        Progress(console=console, transient=True, disable=not console.is_terminal) as bars,
    ):
        bar = bars.add_task("Gradients", total=1.0)
        counts = choose_counts(
            model,
            text,
            num_experts=experts,
            most=most,
            max_tokens=max_tokens,
            on_share=lambda share: bars.update(bar, completed=share),
        )
    if as_json:
        typer.echo(json.dumps({"counts": counts}))
        return
    typer.echo("replicate:\n  counts:")
    for of_layer in counts:
        typer.echo(f"    - {list(of_layer)}")


def verify_command(
    path: Annotated[Path, typer.Argument(help="Folder that upcycle wrote.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compare an upcycled model with the dense model it came from.

    The exit code is 1 if the method keeps the function and the logits differ.
    """
    result = verify(path)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        table = Table(show_header=False, box=None)
        table.add_row("model", escape(f"{result.path} ({result.method}, {result.target})"))
        table.add_row("base", escape(result.base))
        table.add_row("largest difference of a logit", f"{result.max_abs_diff:.2e}")
        table.add_row("the same with equal gates", f"{result.max_abs_diff_equal_gates:.2e}")
        table.add_row("the same in float64", f"{result.max_abs_diff_float64:.2e}")
        table.add_row("divergence from the base, nats per token", f"{result.divergence:.2e}")
        table.add_row("largest logit of the base", f"{result.max_abs_logit:.2e}")
        table.add_row("float32 rounding of the base", f"{result.rounding:.2e}")
        if result.must_be_equal:
            table.add_row("must be equal", f"yes, within {result.tolerance:.0e}")
        else:
            table.add_row("must be equal", "no: " + "; ".join(result.not_equal_because))
        if result.other_tensors is not None:
            others = result.other_tensors
            told = f"{len(others)} differ: {', '.join(others[:3])}" if others else "those of the recipe"
            table.add_row("tensors", escape(told + (" …" if len(others) > 3 else "")))
        table.add_row("result", "passed" if result.passed else "FAILED")
        _console().print(table)
    if not result.passed:
        raise typer.Exit(1)


def _read(path: Path, output: Path | None) -> Recipe:
    """The recipe in a file, or the one that a configuration of mergekit-moe amounts to, with notes."""
    values = read_yaml(path)
    if not is_mergekit(values):
        recipe = recipe_from_dict(values, where=str(path))
        return recipe if output is None else replace(recipe, output=str(output))
    if output is None:
        raise RecipeError(f"{path} is a configuration of mergekit-moe, which names no output; give --output")
    recipe, notes = translate(values, str(output), where=str(path))
    for note in notes:
        typer.echo(f"Otherwise than mergekit-moe: {note}.", err=True)
    return recipe


# --- what is printed ---


def _console() -> Console:
    """A pipe has no width; the 80 columns that rich would take break every name."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _summary(result: UpcycleResult) -> str:
    plan = result.plan
    done = "Would write" if result.dry_run else "Wrote"
    took = "" if result.dry_run else f" in {result.seconds:.1f} s"
    cost = ""
    if result.estimate is not None:
        memory, rate = result.estimate.memory_bytes / 1e9, result.estimate.bytes_per_s / 1e9
        cost = (
            f"\nAt most {memory:.2f} GB of memory; about {result.estimate.seconds:.0f} s at the "
            f"{rate:.2f} GB/s of a short copy to that disk"
        )
    rounds = ""
    if result.rounded_types and plan.recipe.dtype is None:
        rounds = (
            f"\nTensors of type {', '.join(result.rounded_types)} are rounded to {plan.dtype}, that of the "
            "base's embeddings; 'dtype' in the recipe chooses another"
        )
    return (
        f"{done} {result.output}: {plan.num_parameters:,} parameters, {plan.num_bytes / 1e9:.2f} GB "
        f"({plan.dtype}) in {len(result.files)} file(s){took}{rounds}{cost}"
    )


def _rows(plan: UpcyclePlan) -> list[dict[str, Any]]:
    """One row for tensors that differ in numbers of layer and expert only."""
    rows: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for task in plan.tasks:
        key = (re.sub(r"\.\d+(?=\.)", ".*", task.name), task.shape, _made_from(task))
        rows.setdefault(key, []).append(task.num_bytes)
    return [
        {"name": name, "count": len(sizes), "shape": list(shape), "bytes": sum(sizes), "from": made}
        for (name, shape, made), sizes in rows.items()
    ]


def _made_from(task: TensorTask) -> str:
    match task.content:
        case Zeros():
            return "zeros"
        case Normal(std=std, seed=seed, repeats=repeats):
            return f"normal, std {std}, seed {seed}{_times(repeats)}"
        case Orthogonal(norm=norm, seed=seed, repeats=repeats):
            return f"orthogonal rows of length {norm}, seed {seed}{_times(repeats)}"
        case Uniform(bound=bound, seed=seed, where=where):
            return f"zeros, {len(where)} of them within {bound}, seed {seed}"
        case _:
            pieces = task.pieces
            tensors = dict.fromkeys(
                re.sub(r"\.experts\.\d+\.", ".experts.*.", piece.tensor) for piece in pieces
            )
            names = (re.sub(r"^model\.layers\.\d+\.", "", tensor) for tensor in tensors)
            sources = sorted({source for piece in pieces for source in piece.sources})
            verb = "mean" if task.is_averaged else "copy"
            made = f"{verb} of {', '.join(names)} from source {', '.join(map(str, sources))}"
            shuffled = any(piece.row_order or piece.column_order for piece in pieces)
            changes = dict.fromkeys(_words_of(change) for change in task.changes)
            return ", ".join([made, *(["shuffled"] if shuffled else []), *changes])


def _times(repeats: int) -> str:
    return f", each row {repeats} times" if repeats > 1 else ""


def _words_of(change: Change) -> str:
    match change:
        case Scale(factor=factor):
            return f"times {factor:g}"
        case NormalNoise(std=std, share=share, seed=seed):
            return f"noise of std {std} on {share:.0%}, seed {seed}"
        case UniformNoise(bound=bound, seed=seed):
            return f"noise within {bound}, seed {seed}"
        case Redraw(axis=axis, entries=entries):
            return f"{entries.count} of {entries.total} {axis} drawn anew, seed {entries.seed}"


def _plan_table(plan: UpcyclePlan) -> Table:
    table = Table(title=f"{plan.recipe.method} to {plan.recipe.target}", title_justify="left")
    for heading in ("tensor", "count", "shape", "MB", "from"):
        justify: Literal["left", "right"] = "right" if heading in ("count", "MB") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in _rows(plan):
        shape, size = " x ".join(map(str, row["shape"])), f"{row['bytes'] / 1e6:,.1f}"
        table.add_row(row["name"], str(row["count"]), shape, size, row["from"])
    for number, source in enumerate(plan.sources):
        table.caption = f"{table.caption or ''}source {number}: {escape(source.title)}\n"
    if not plan.recipe.router.is_drawn:
        table.caption = (
            f"{table.caption}source {len(plan.sources)}: {escape(plan.recipe.router.describe())}\n"
        )
    table.caption_justify = "left"
    return table
