"""The report as tables of text, for the terminal and for the page."""

from typing import Any

from rich.console import Console
from rich.table import Table

from .breakdown import COMPONENTS

Rows = list[list[str]]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def megabytes(number: int | None) -> str:
    return "not measured" if number is None else f"{number / 1e6:,.1f}"


def latency_table(report: dict[str, Any]) -> tuple[list[str], Rows]:
    """One row per cell and variant; times in ms, the request's also over that of the first variant."""
    headings = ["batch x prompt + output", "variant", "first token", "per token p50", "p90", "p99"]
    headings += ["tokens/s", "request", f"over {next(iter(report['variants']))}'s", "added MB"]
    rows = []
    for cell in report["cells"]:
        base = next(iter(cell["variants"].values()))["request_s"]["p50"]
        name = cell_name(cell)
        for variant, entry in cell["variants"].items():
            step = entry["time_per_output_token_s"]
            rows.append(
                [
                    name,
                    variant,
                    milliseconds(entry["time_to_first_token_s"]["p50"]),
                    *(milliseconds(step[point]) if step else "" for point in ("p50", "p90", "p99")),
                    f"{entry['tokens_per_s']:,.1f}",
                    milliseconds(entry["request_s"]["p50"]),
                    f"{entry['request_s']['p50'] / base:.2f}x",
                    megabytes(entry["added_memory_bytes"]),
                ]
            )
            name = ""
    return headings, rows


def variant_table(report: dict[str, Any]) -> tuple[list[str], Rows]:
    """Sizes, FLOPs, and what the logits were compared with."""
    headings = ["variant", "what it is", "parameters (M)", "active (M)", "weights (MB)"]
    headings += ["MFLOPs / token", "logits differ by", "same top token"]
    rows = []
    for name, entry in report["variants"].items():
        agreement = report["agreement"].get(name)
        rows.append(
            [
                name,
                f"{entry['title']} ({entry['model_type']})",
                f"{entry['parameters'] / 1e6:,.1f}",
                _or_blank(entry.get("active_parameters")),
                megabytes(entry["weight_bytes"]),
                _or_blank(entry.get("forward_flops_per_token")),
                f"{agreement['difference']:.1e} of {agreement['reference']}" if agreement else "",
                f"{agreement['same_top_token']:.0%}" if agreement else "",
            ]
        )
    return headings, rows


def _or_blank(number: int | None) -> str:
    return "" if number is None else f"{number / 1e6:,.1f}"


def component_table(cell: dict[str, Any], phase: str) -> tuple[list[str], Rows]:
    """Milliseconds of every component and their share of the step; one column per variant."""
    steps = {name: entry["breakdown"][phase] for name, entry in cell["variants"].items()}
    present = [name for name in COMPONENTS if any(name in step["components"] for step in steps.values())]
    rows = [
        [name, *(_with_share(step["components"].get(name), step["total"]) for step in steps.values())]
        for name in present
    ]
    rows.append(["all", *(milliseconds(step["total"]) for step in steps.values())])
    return ["component", *steps], rows


def _with_share(seconds: float | None, total: float) -> str:
    return "" if seconds is None else f"{milliseconds(seconds)} ({seconds / total:.0%})"


def operation_table(operations: list[dict[str, Any]]) -> tuple[list[str], Rows]:
    """Calls and times of one phase of one variant."""
    rows = [
        [
            row["name"],
            f"{row['calls']:,}",
            milliseconds(row["self_s"]),
            f"{row['share']:.1%}",
            milliseconds(row["total_s"]),
        ]
        for row in operations
    ]
    return ["operation", "calls", "self ms", "share", "with what it calls, ms"], rows


def roof_table(report: dict[str, Any]) -> tuple[list[str], Rows]:
    """Shares of the measured speeds; no rows where FLOPs cannot be counted."""
    rows = [
        [
            cell_name(cell),
            name,
            f"{entry['prefill_share_of_product']:.0%}",
            f"{entry['decode_share_of_copy']:.0%}" if "decode_share_of_copy" in entry else "",
        ]
        for cell in report["cells"]
        for name, entry in cell["variants"].items()
        if "prefill_flops" in entry
    ]
    return ["batch x prompt + output", "variant", "prefill, of a product", "decoding, of a copy"], rows


def cell_name(cell: dict[str, Any]) -> str:
    return f"{cell['batch']} x {cell['prompt']:,} + {cell['output']:,}"


def phases(cell: dict[str, Any]) -> list[str]:
    """Those that the cell has: with one output token nothing is decoded."""
    first = next(iter(cell["variants"].values()))["breakdown"]
    return ["prefill", "decode"] if first["decode"] else ["prefill"]


# --- the terminal ---


def print_profile(console: Console, report: dict[str, Any]) -> None:
    """Latencies of every cell, the breakdown of the last, and what a reader must know."""
    console.print()
    console.print(
        _rich(f"{report['model']} in {report['dtype']} on {report['device']}, ms", latency_table(report))
    )
    last = report["cells"][-1]
    for phase in phases(last):
        title = f"{phase.capitalize()} of {cell_name(last)}, ms and share"
        console.print(_rich(title, component_table(last, phase)))
    for note in [*agreement_notes(report), *report["notes"]]:
        console.print(f"- {note}", highlight=False, soft_wrap=True, markup=False)


def agreement_notes(report: dict[str, Any]) -> list[str]:
    return [
        f"The logits of {name} differ from those of {found['reference']} by {found['difference']:.1e} of "
        f"their rms (at most {found['bound']:g} is let through); {found['same_top_token']:.0%} of positions "
        "have the same most likely token."
        for name, found in report["agreement"].items()
    ]


def _rich(title: str, table: tuple[list[str], Rows]) -> Table:
    headings, rows = table
    shown = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        is_text = number == 0 or heading == "variant"
        shown.add_column(heading, justify="left" if is_text else "right")
    for row in rows:
        shown.add_row(*row)
    return shown
