"""The figures of a profile, as SVG text that stands in the page itself."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..html import GRID, plain_axes, svg
from .breakdown import COMPONENTS
from .tables import cell_name, phases

COLOURS = ("#c8431b", "#1f5fa8", "#5b6573", "#8f7aa8", "#7d8f69")
COMPONENT_COLOURS = dict(
    zip(
        COMPONENTS,
        (
            "#1f5fa8",
            "#7fa6d0",
            "#3f9c8f",
            "#e08e0b",
            "#c8431b",
            "#e3a587",
            "#8f7aa8",
            "#7d8f69",
            "#9aa5b1",
            "#b9a27c",
            "#5b6573",
            "#c9ced6",
        ),
        strict=True,
    )
)


def variant_colours(report: dict[str, Any]) -> dict[str, str]:
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(report["variants"])}


def latency_figure(report: dict[str, Any]) -> str:
    """First token and decoded token of every cell: the median as a bar, every measured run or step a dot."""
    cells, colours = report["cells"], variant_colours(report)
    height = 0.24 * len(cells) * (len(colours) + 1) + 1.0
    figure = Figure(figsize=(11, height), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    kinds = {"first token (ms)": "prefill", "one decoded token (ms)": "decode"}
    for axes, (title, kind) in zip(panels, kinds.items(), strict=True):
        highest = max((_bars(axes, cells, kind, colours)), default=1.0)
        axes.set_xlim(0, 1.15 * highest)
        axes.set_title(title, fontsize=10, fontweight="bold")
        plain_axes(axes)
    group = len(colours) + 1
    ticks = [-(number * group + (len(colours) - 1) / 2) for number in range(len(cells))]
    panels[0].set_yticks(ticks, [cell_name(cell) for cell in cells], fontsize=9)
    _legend(figure, colours)
    return svg(figure)


def _bars(axes: Axes, cells: list[dict[str, Any]], kind: str, colours: dict[str, str]) -> list[float]:
    """Draw one panel; returns the medians and the samples that are shown, in ms."""
    shown = []
    for number, cell in enumerate(cells):
        for place, (name, entry) in enumerate(cell["variants"].items()):
            times = [1e3 * seconds for seconds in entry["samples"][kind]]
            if not times:
                continue
            y = -(number * (len(colours) + 1) + place)
            measure = "time_to_first_token_s" if kind == "prefill" else "time_per_output_token_s"
            median = 1e3 * entry[measure]["p50"]
            axes.barh(y, median, height=0.8, color=colours[name], alpha=0.75)
            axes.plot(times, [y] * len(times), "|", color="#1c2530", markersize=5, alpha=0.5)
            axes.annotate(f"{median:,.1f}", (max(times), y), (5, -3), textcoords="offset points", fontsize=8)
            shown += [median, *times]
    return shown


def percentile_figure(report: dict[str, Any]) -> str:
    """Share of decode steps that took at most so long, one panel per cell."""
    cells = [cell for cell in report["cells"] if "decode" in phases(cell)]
    colours = variant_colours(report)
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(11, 2.4 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, cell in zip(panels, cells, strict=False):
        for name, entry in cell["variants"].items():
            times = sorted(1e3 * seconds for seconds in entry["samples"]["decode"])
            shares = [(place + 1) / len(times) for place in range(len(times))]
            axes.step([times[0], *times], [0.0, *shares], where="post", color=colours[name], linewidth=1.6)
        axes.set_title(cell_name(cell), fontsize=9)
        plain_axes(axes)
        axes.set_ylim(0, 1.03)
        axes.set_yticks([0, 0.5, 0.9, 0.99], ["0", "50%", "90%", "99%"])
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    for axes in panels[len(cells) :]:
        axes.set_visible(False)
    figure.supxlabel("ms of a decode step", fontsize=9)
    _legend(figure, colours)
    return svg(figure)


def component_figure(cell: dict[str, Any]) -> str:
    """What a step is made of, one bar per variant; prefill on the left, decoding on the right."""
    shown = phases(cell)
    names = list(cell["variants"])
    figure = Figure(figsize=(11, 0.45 * len(names) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    present: dict[str, str] = {}
    for axes, phase in zip(panels, shown, strict=True):
        for place, entry in enumerate(cell["variants"].values()):
            left = 0.0
            for component in COMPONENTS:
                width = 1e3 * entry["breakdown"][phase]["components"].get(component, 0.0)
                if width > 0:
                    present[component] = COMPONENT_COLOURS[component]
                    axes.barh(-place, width, left=left, height=0.7, color=COMPONENT_COLOURS[component])
                    left += width
            axes.annotate(f"{left:,.1f}", (left, -place), (5, -3), textcoords="offset points", fontsize=8)
        axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
        axes.set_title(f"{phase} (ms)", fontsize=10, fontweight="bold")
        plain_axes(axes)
    panels[0].set_yticks([-place for place in range(len(names))], names, fontsize=9)
    _legend(figure, {name: present[name] for name in COMPONENTS if name in present})
    return svg(figure)


def layer_figure(cell: dict[str, Any], colours: dict[str, str]) -> str:
    """Milliseconds of every layer, one line per variant."""
    shown = phases(cell)
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, phase in zip(panels, shown, strict=True):
        for name, entry in cell["variants"].items():
            times = [1e3 * seconds for seconds in entry["breakdown"][phase]["layers"]]
            axes.plot(range(len(times)), times, "o-", color=colours[name], markersize=3, linewidth=1.2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer", fontsize=9)
        axes.set_title(f"{phase} (ms)", fontsize=10, fontweight="bold")
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain_axes(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    _legend(figure, colours)
    return svg(figure)


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
        loc="outside upper center",
        ncols=min(6, len(colours)),
        fontsize=8,
        frameon=False,
    )
