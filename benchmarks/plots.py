"""Plots of docs/performance.md, drawn from the rows of result files: suite -> pictures of its section.

The same rows give the same bytes. Of suites whose rows lack what a plot shows there is no picture.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks import flan
from benchmarks.ablation.section import SHOWS, draw_ablation
from moe_runtime.html import plain_axes, svg

Rows = list[dict[str, Any]]
OURS, DENSE, OTHERS = "#c8431b", "#5b6573", ("#1f5fa8", "#7fa6d0", "#8f7aa8", "#7d8f69", "#b9a27c")
COLOURS = {
    "moe_runtime": OURS,
    "transformers_moe_runtime": "#e3a587",
    "transformers_accelerated": "#e08e0b",
    "moe": OURS,
    "dense_active_flops": DENSE,
    "dense_width": "#9aa5b1",
}


def draw(contents: Mapping[str, dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """File name -> suite in whose section it stands, what it shows, the picture as SVG text."""
    rows = {suite: content["rows"] for suite, content in contents.items() if "rows" in content}
    found: dict[str, tuple[str, str, str]] = {}
    for suite in ("experts_cpu", "end_to_end", "expert_lora", "expert_ffn"):
        if any(len(row["timings"]) > 1 for row in rows.get(suite, ())):
            shown = "Time of other implementations as a multiple of ours, on a logarithmic scale."
            found[f"speedup_{suite}.svg"] = (suite, shown, _speedups(rows[suite]))
    timed = [row for row in rows.get("end_to_end", ()) if "percentiles" in row]
    if timed:
        shown = "One decoded token: median, 90th and 99th percentile of the calls."
        found["latency.svg"] = ("end_to_end", shown, _latency(timed))
    if "moe_layer" in rows:
        shown = "FLOPs and time as multiples of the dense layer of one expert's width."
        found["flops_dense.svg"] = ("moe_layer", shown, _against_dense(rows["moe_layer"]))
    if "ablation" in contents:
        found["ablation.svg"] = ("ablation", SHOWS, draw_ablation(contents["ablation"]))
    if "flan" in contents:
        found["flan.svg"] = ("flan", flan.SHOWS, flan.draw_flan(contents["flan"]))
    placed = {
        suite: _placed(rows[suite]) for suite in ("experts_cpu", "end_to_end", "expert_ffn") if suite in rows
    }
    for suite, points in placed.items():
        if points:
            shown = "FLOP/s over the FLOPs per byte that a call needs at least, below the measured roofs."
            found[f"roofline_{suite}.svg"] = (suite, shown, _roofline(points))
    return found


def case_name(case: Mapping[str, Any]) -> str:
    """A case in a few words: what is not the same for every reader of a plot."""
    words = [
        str(case[key]) for key in ("model", "shape", "direction", "phase", "dtype", "routing") if key in case
    ]
    if "tokens" in case:
        words.append(f"{case['tokens']:,} token{'' if case['tokens'] == 1 else 's'}")
    return " · ".join(words)


def colours(names: Iterable[str]) -> dict[str, str]:
    rest = iter(OTHERS * 4)
    return {name: COLOURS[name] if name in COLOURS else next(rest) for name in names}


# --- how many times as long the others take ---


def _speedups(rows: Rows) -> str:
    named = colours(dict.fromkeys(name for row in rows for name in row["timings"] if name != "moe_runtime"))
    values = []
    for row in rows:
        ratios = row["ratios"]  # to whatever the suite compares with
        values.append({name: ratios[name] / ratios["moe_runtime"] for name in named if name in ratios})
    return _bars(rows, values, named, "times the time of ours")


def _against_dense(rows: Rows) -> str:
    named = {"FLOPs of moe": "#b9a27c", "time of dense_active_flops": DENSE, "time of moe": OURS}
    values = []
    for row in rows:
        flops, ratios = row["flops"], row["ratios"]
        both = (flops["moe"] / flops["dense_width"],)
        both += tuple(ratios[name] / ratios["dense_width"] for name in ("dense_active_flops", "moe"))
        values.append(dict(zip(named, both, strict=True)))
    return _bars(rows, values, named, "times the dense layer of one expert's width")


def _bars(rows: Rows, values: list[dict[str, float]], named: dict[str, str], label: str) -> str:
    """Bars from 1 to each value of a row: to the right what is longer, to the left what is shorter."""
    lines = sum(len(bars) + 1 for bars in values)
    figure = Figure(figsize=(10, 0.14 * lines + 1.1), layout="constrained")
    axes = figure.subplots()
    ticks, y = [], 0
    for bars in values:
        ticks.append(y - (len(bars) - 1) / 2)
        for name, ratio in bars.items():
            axes.barh(y, ratio - 1, left=1, height=0.85, color=named[name])
            side = 1 if ratio >= 1 else -1
            axes.annotate(
                f"{ratio:.2f}",
                (ratio, y),
                (3 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=6.5,
            )
            y -= 1
        y -= 1
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.01)
    axes.axvline(1, color="#1c2530", linewidth=0.8)
    axes.set_yticks(ticks, [case_name(row["case"]) for row in rows], fontsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(_plainly))
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(label, fontsize=9)
    plain_axes(axes)
    _legend(figure, named)
    return svg(figure)


def _plainly(value: float, _position: int) -> str:
    return f"{value:g}"


# --- latency ---


def _latency(rows: Rows) -> str:
    """A panel per model; a line per implementation, from its median to its 99th percentile."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        named = colours(row["percentiles"])
        for place, (name, colour) in enumerate(named.items()):
            times = [1e3 * seconds for seconds in row["percentiles"][name].values()]
            axes.plot(times, [-place] * 3, color=colour, linewidth=2)
            for time, marker in zip(times, ("o", "|", ">"), strict=True):
                axes.plot(time, -place, marker, color=colour, markersize=7)
        axes.set_yticks([-place for place in range(len(named))], list(named), fontsize=8)
        axes.set_xlim(left=0)
        axes.set_title(row["case"]["model"], fontsize=9, fontweight="bold")
        axes.set_xlabel("ms per decoded token: ● median, | 90%, ▶ 99%", fontsize=8)
        plain_axes(axes)
    return svg(figure)


# --- roofline ---


def _placed(rows: Rows) -> Rows:
    return [row for row in rows if "useful_flops" in row or "formula_bytes" in row]


def _intensity(row: dict[str, Any], name: str) -> float:
    """FLOPs per byte: of the row's work, or of the implementation's own."""
    if "useful_flops" in row:
        return row["useful_flops"] / row["bytes"]
    return row["formula_flops"][name] / row["formula_bytes"][name]


def _roofline(rows: Rows) -> str:
    """A panel per dtype: its measured roofs, and a point per case of ours and of what is closest to it."""
    dtypes = list(dict.fromkeys(row["case"]["dtype"] for row in rows))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False)[0]
    names = list(dict.fromkeys(name for row in rows for name in row["flops_per_s"]))
    named = colours(names)
    for axes, dtype in zip(panels, dtypes, strict=True):
        _roofs(axes, [row for row in rows if row["case"]["dtype"] == dtype], named)
        axes.set_title(dtype, fontsize=9, fontweight="bold")
    _legend(figure, named)
    return svg(figure)


def _roofs(axes: Axes, rows: Rows, named: dict[str, str]) -> None:
    points = [
        (_intensity(row, name), speed, name)
        for row in rows
        for name, speed in sorted(row["flops_per_s"].items(), reverse=True)
    ]
    intensity = [x for x, *_ in points]
    moved, made = rows[0]["copy_bytes_per_s"], rows[0]["product_flops_per_s"]
    ends = (0.5 * min(intensity), max(2 * max(intensity), 2 * made / moved))
    corner = made / moved
    axes.plot(
        [ends[0], corner, ends[1]],
        [ends[0] * moved / 1e9, made / 1e9, made / 1e9],
        color="#1c2530",
        linewidth=1,
    )
    for x, speed, name in points:
        axes.plot(x, speed / 1e9, "o", color=named[name], markersize=5, markeredgecolor="white")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_plainly))
    axes.yaxis.set_major_formatter(FuncFormatter(_plainly))
    axes.set_xlabel("useful FLOPs per byte that must move", fontsize=9)
    axes.set_ylabel("GFLOP/s", fontsize=9)
    plain_axes(axes)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)


def _legend(figure: Figure, named: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in named.items()],
        loc="outside upper center",
        ncols=min(4, len(named)),
        fontsize=8,
        frameon=False,
    )
