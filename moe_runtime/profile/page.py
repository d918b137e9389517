"""report.html: one page that needs nothing beside it."""

from html import escape
from typing import Any

from ..html import bullets, commit_text, page, table, versions_line
from .tables import (
    agreement_notes,
    cell_name,
    component_table,
    latency_table,
    megabytes,
    operation_table,
    phases,
    roof_table,
    variant_table,
)


def render_page(report: dict[str, Any]) -> str:
    """The whole page as HTML text."""
    from .plots import component_figure, latency_figure, layer_figure, percentile_figure, variant_colours

    last = report["cells"][-1]
    sections = [
        f"<h1>Profile of {escape(report['model'])}</h1><p class='small'>{_subtitle(report)}</p>",
        bullets([*agreement_notes(report), *report["notes"]]),
        "<h2>Variants</h2>",
        table(*variant_table(report)),
        _resident(report),
        "<h2>Latency</h2>",
        latency_figure(report),
        table(*latency_table(report)),
        f"<p class='small'>{escape(_how_measured(report))}</p>",
    ]
    if any("decode" in phases(cell) for cell in report["cells"]):
        sections += ["<h2>Latency of decode steps</h2>", percentile_figure(report)]
    for cell in report["cells"]:
        sections += [f"<h2>What a step is made of: {cell_name(cell)}</h2>", component_figure(cell)]
        sections += [_titled(phase, component_table(cell, phase)) for phase in phases(cell)]
    sections += [f"<h2>Layers: {cell_name(last)}</h2>", layer_figure(last, variant_colours(report))]
    sections += _operations(report)
    if roof_table(report)[1]:
        sections += ["<h2>Beside what the device can do</h2>", table(*roof_table(report)), _roof_note(report)]
    return page(f"moe-runtime profile: {report['model']}", [*sections, versions_line(report["machine"])])


def _subtitle(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return escape(
        f"{report['dtype']} on {report['device']} ({machine['device']}, {machine['threads']} threads), "
        f"weights {report['weights']}; {report['seconds']:.0f} seconds, {machine['time']}, "
        f"{commit_text(machine)}"
    )


def _resident(report: dict[str, Any]) -> str:
    resident = report["process_resident_bytes"]
    if resident is None:
        return ""
    return (
        f"<p class='small'>With all of them loaded the process held {megabytes(resident)} MB of memory, "
        "files of weights that are mapped among it.</p>"
    )


def _how_measured(report: dict[str, Any]) -> str:
    rounds = report["settings"]["rounds"]
    memory = (
        "of PyTorch's tensors" if report["device"].startswith("cuda") else "of the process's resident memory"
    )
    return (
        f"Milliseconds; medians of {rounds} runs per cell, and quantiles of single decode steps over all "
        "runs, linear between neighbours: with few steps p99 is little below the slowest. Variants took "
        "turns after an untimed start each. Random tokens, greedy decoding, a growing cache, logits of the "
        "last position. "
        f"Added memory: the peak {memory} during one more run, above what was there before it, weights not "
        "among it."
    )


def _titled(phase: str, rows: tuple[list[str], list[list[str]]]) -> str:
    return f"<p class='small'>{phase.capitalize()}, ms and share of the step</p>{table(*rows)}"


def _operations(report: dict[str, Any]) -> list[str]:
    operations = report["operations"]
    sections = [
        f"<h2>Operations: {cell_name(operations['cell'])}</h2>",
        "<p class='small'>One prefill, and a few decode steps together, under PyTorch's profiler, whose own "
        "cost is in the times. Operations with the most time of their own, and all of moe_runtime's.</p>",
    ]
    for name, by_phase in operations["variants"].items():
        for phase, rows in by_phase.items():
            sections.append(f"<p><b>{escape(name)}</b>, {phase}</p>{table(*operation_table(rows))}")
    return sections


def _roof_note(report: dict[str, Any]) -> str:
    roof = report["roof"]
    return (
        "<p class='small'>Prefill: FLOPs by formula over the time, beside a large product's "
        f"{roof['flops_per_s'] / 1e12:.2f} TFLOP/s. Decoding: bytes by formula, experts as "
        "independent tokens would choose them, beside a copy's "
        f"{roof['bytes_per_s'] / 1e9:.1f} GB/s read and written.</p>"
    )
