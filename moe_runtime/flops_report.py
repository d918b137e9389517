"""What `moe-runtime flops` shows: a model by component and layer, beside its dense baselines."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import BlockConfig, ModelConfig
from .flops import (
    Convention,
    ModelCost,
    layer_flops,
    layer_parameters,
    match_dense,
    model_cost,
    model_flops,
    model_parameters,
)

WIDTH_WITHOUT_TERMINAL = 160  # a pipe has no width; rich would take 80 and break lines

COST_ROWS = {
    "intermediate_size": "feed-forward width",
    "total_parameters": "parameters",
    "active_parameters": "active parameters",
    "forward_flops": "forward FLOPs / token",
    "training_flops": "training FLOPs / token",
    "training_flops_recompute": "  with full recompute",
    "six_n": "  6 x active parameters",
    "decode_flops": "decode FLOPs / token",
    "kv_cache_bytes_per_token": "KV cache bytes / token",
    "decode_weight_bytes": "weight bytes / decode step",
    "decode_total_bytes": "all bytes / decode step",
}


def describe_block(block: BlockConfig) -> str:
    """One layer in words: `parallel, 4 x 8 heads (expert kv), experts 1 of 4 x 2048`."""
    attention, ffn = block.attention, block.feed_forward
    heads = f"{attention.num_heads} heads"
    if attention.num_experts > 1:
        used = "" if attention.top_k is None else f"{attention.top_k} of "
        heads = f"{used}{attention.num_experts} x {heads} ({attention.kv} kv)"
    if attention.sliding_window is not None:
        heads += f" in a window of {attention.sliding_window}"
    if ffn.router is None:
        return f"{block.kind}, {heads}, dense {ffn.intermediate_size}"
    router = ffn.router
    experts = f"experts {router.experts_per_token} of {router.num_experts} x {ffn.intermediate_size}"
    shared = f" + shared {ffn.shared_intermediate_size}" if ffn.shared_intermediate_size else ""
    return f"{block.kind}, {heads}, {experts}{shared}"


def flops_report(
    config: ModelConfig,
    *,
    context: int,
    convention: Convention = "causal",
    batch_size: int = 1,
    bytes_per_value: int = 2,
) -> dict[str, Any]:
    """Every figure of a model as JSON values. FLOPs are per token; `dense` is empty for a dense model."""

    def cost(model: ModelConfig) -> ModelCost:
        return model_cost(model, context, convention, batch_size=batch_size, bytes_per_value=bytes_per_value)

    dense = {}
    if config.num_experts or config.num_attention_experts > 1:
        for on in ("active_flops", "width"):
            match = match_dense(config, on, context=context, convention=convention)
            dense[on] = {
                "intermediate_size": match.config.intermediate_size,
                "residual": match.residual,
                **asdict(cost(match.config)),
            }
    return {
        "context": context,
        "convention": convention,
        "batch_size": batch_size,
        "bytes_per_value": bytes_per_value,
        "model": {
            "intermediate_size": config.moe_intermediate_size or config.intermediate_size,
            **asdict(cost(config)),
        },
        "parameters_by_component": dict(model_parameters(config)),
        "active_parameters_by_component": dict(model_parameters(config, active=True)),
        "forward_flops_by_component": dict(model_flops(config, context, convention)),
        "layers": list(_layer_groups(config, context, convention)),
        "dense": dense,
    }


def _layer_groups(config: ModelConfig, context: int, convention: Convention) -> Iterator[dict[str, Any]]:
    """Runs of equal layers, each with the figures of one of them."""
    for block, run in groupby(range(config.num_hidden_layers), config.block_config):
        first, *others = run
        yield {
            "first": first,
            "last": [first, *others][-1],
            "block": describe_block(block),
            "parameters": layer_parameters(config, first).total(),
            "active_parameters": layer_parameters(config, first, active=True).total(),
            "forward_flops_by_component": dict(layer_flops(config, first, context, convention)),
            "forward_flops": layer_flops(config, first, context, convention).total(),
        }


# --- tables ---


def print_flops_report(name: str, report: dict[str, Any]) -> None:
    """Print a report of `flops_report` as tables; plain text without colours where stdout is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)
    console.print(
        f"[bold]{escape(name)}[/] at {report['context']:,} tokens of context, batch {report['batch_size']}"
    )
    console.print(
        f"forward FLOPs, 2 per multiply-add, attention counted {report['convention']}; "
        f"{report['bytes_per_value']} bytes per value\n"
    )
    console.print(_component_table(report))
    console.print(_layer_table(report))
    console.print(_comparison_table(report))
    if "active_flops" in report["dense"]:
        residual = report["dense"]["active_flops"]["residual"]
        console.print(f"equal FLOPs but for {residual:+,} per token: a width is a whole number")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0 and column != "kind")
    return table


def _component_table(report: dict[str, Any]) -> Table:
    total, active = report["parameters_by_component"], report["active_parameters_by_component"]
    flops = report["forward_flops_by_component"]
    table = _table("Components", "", "parameters", "active", "FLOPs / token", "share")
    all_flops = sum(flops.values())

    def add(label: str, of_total: int, of_active: int, of_flops: int) -> None:
        share = f"{of_flops / all_flops:.1%}"
        table.add_row(
            label, *(f"{count:,}" if count else "" for count in (of_total, of_active, of_flops)), share
        )

    for component in (*total, *(key for key in flops if key not in total)):
        figures = (counts.get(component, 0) for counts in (total, active, flops))
        add(component.replace("_", " "), *figures)
    table.add_section()
    add("all", sum(total.values()), sum(active.values()), all_flops)
    return table


def _layer_table(report: dict[str, Any]) -> Table:
    table = _table("One layer", "layers", "parameters", "active", "FLOPs / token", "kind")
    table.columns[-1].justify = "left"
    for group in report["layers"]:
        first, last = group["first"], group["last"]
        figures = (group[key] for key in ("parameters", "active_parameters", "forward_flops"))
        name = str(first) if first == last else f"{first}-{last}"
        table.add_row(name, *(f"{figure:,}" for figure in figures), group["block"])
    return table


def _comparison_table(report: dict[str, Any]) -> Table:
    headings = {"active_flops": "dense of\nequal FLOPs", "width": "dense of\nequal width"}
    models = {"this model": report["model"], **{headings[on]: cost for on, cost in report["dense"].items()}}
    table = _table("Model" if len(models) == 1 else "Model and dense baselines", "", *models)
    for key, label in COST_ROWS.items():
        table.add_row(label, *(f"{cost[key]:,}" for cost in models.values()))
    return table
