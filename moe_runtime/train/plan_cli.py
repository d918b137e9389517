"""The `plan` command of `moe-runtime`, as a plain function."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from moe_runtime.train.memory import MemoryPlan


def plan_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe of `moe-runtime train`.")],
    processes: Annotated[int, typer.Option(help="How many torchrun will start.")] = 1,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a training run will hold in memory, before anything is loaded."""
    from moe_runtime.hf.quiet import quiet_transformers

    from .memory import plan_memory
    from .recipe import load_recipe

    with quiet_transformers():
        plan = plan_memory(load_recipe(recipe), processes)
    if json_output:
        typer.echo(json.dumps(plan.to_dict(), indent=2))
        return
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = 120
    print_plan(console, plan)


def print_plan(console: Console, plan: "MemoryPlan") -> None:
    console.print(
        f"{plan.total_parameters:,} parameters, {plan.trained_parameters:,} of them trained; {plan.tokens:,} "
        f"tokens in a micro-batch; one of {plan.processes} "
        f"{'process' if plan.processes == 1 else 'processes'}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", "GB", "what it is")
    table.columns[1].justify = "right"
    for name, what in ROWS.items():
        table.add_row(name.replace("_", " "), f"{getattr(plan, name) / 1e9:.3f}", what)
    console.print(table)


ROWS = {
    "weights": "all parameters of this process",
    "optimizer": "states of the optimizer",
    "gathered": "weights of others that are here for a time",
    "kernels": "that oneDNN compiles for bfloat16 on a CPU, and keeps",
    "step_peak": "gradients, activations and temporary tensors where they are largest together",
    "peak": "all of the above",
    "gradients": "of the step's peak: gradients at the end of backward",
    "activations": "of the step's peak: what is alive between forward and backward",
    "loss": "of the activations: gradients that the loss has made; none where it makes logits",
    "logits": "logits of all tokens in float32; not there where the row above is not 0",
}
