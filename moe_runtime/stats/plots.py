"""The figures of the statistics, as SVG text that stands in the page itself."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..html import GRID, plain_axes, svg

_KIND_COLOURS = {"feed_forward": "#1f5fa8", "attention": "#c8431b"}
_LINES = {
    "max_over_mean": "busiest expert over mean load",
    "normalised_entropy": "router entropy / ln E",
    "margin": "router margin",
    "mean_weight_cosine": "cosine of experts' weights",
    "mean_output_cosine": "cosine of experts' outputs",
}


def load_figure(routers: list[dict[str, Any]]) -> str:
    """Load of every expert (columns) in every layer (rows), times E: 1 is the mean.

    One panel for all text and, with several domains, one for each.
    """
    domains = routers[0]["load_by_domain"]
    panels = {"all text": [router["load"] for router in routers]}
    if len(domains) > 1:
        panels |= {name: [router["load_by_domain"][name] for router in routers] for name in domains}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    widest = max(router["num_experts"] for router in routers)
    figure = Figure(figsize=(11, rows * (0.22 * len(routers) + 1.1)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    image = None
    for axes, (name, loads) in zip(grid, panels.items(), strict=False):
        relative = [
            [share * len(load) for share in load] + [float("nan")] * (widest - len(load)) for load in loads
        ]
        image = axes.imshow(relative, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
        axes.set_title(name, fontsize=10, fontweight="bold")
        _ticks(axes, routers, widest)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(grid[: len(panels)]), ticks=[0, 0.5, 1, 1.5, 2], fraction=0.03)
    bar.ax.set_yticklabels(["0", "½", "mean", "1½", "2 or more"], fontsize=8)
    bar.outline.set_visible(False)
    return svg(figure)


def _ticks(axes: Axes, routers: list[dict[str, Any]], widest: int) -> None:
    step = max(1, widest // 8)
    axes.set_xticks(range(0, widest, step))
    axes.set_yticks(range(len(routers)), [short_name(router["name"]) for router in routers])
    axes.tick_params(length=0, labelsize=7)
    axes.set_xlabel("expert", fontsize=8)
    for side in axes.spines.values():
        side.set_visible(False)


def layer_figure(routers: list[dict[str, Any]]) -> str:
    """Each figure over the layers, one line per kind of router."""
    shown = {
        key: title for key, title in _LINES.items() if any(router[key] is not None for router in routers)
    }
    figure = Figure(figsize=(11, 2.4 * -(-len(shown) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(shown) // 3), 3, squeeze=False).flatten()
    for axes, (key, title) in zip(grid, shown.items(), strict=False):
        for kind, colour in _KIND_COLOURS.items():
            of_kind = [router for router in routers if router["kind"] == kind]
            measured = [
                (layer_number(router["name"], place), router[key])
                for place, router in enumerate(of_kind)
                if router[key] is not None
            ]
            if measured:
                axes.plot(*zip(*measured, strict=True), "o-", color=colour, markersize=3, linewidth=1.4)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("layer", fontsize=8)
        plain_axes(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    return svg(figure)


def cosine_figure(router: dict[str, Any]) -> str:
    """Cosines between the experts of one router: of weights and of outputs."""
    panels = {
        "weights": router["weight_cosine"],
        "outputs for the same tokens": router["output_cosine"],
    }
    panels = {name: matrix for name, matrix in panels.items() if matrix is not None}
    figure = Figure(figsize=(3.4 * len(panels) + 0.8, 3.2), layout="constrained")
    for axes, (name, matrix) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1.0, vmax=1.0)
        axes.set_title(name, fontsize=9)
        axes.tick_params(length=0, labelsize=7)
        for side in axes.spines.values():
            side.set_visible(False)
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0)
    return svg(figure)


def short_name(name: str) -> str:
    """`model.layers.12.mlp` -> `12 mlp`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return " ".join(parts[numbers[-1] :]) if numbers else name


def layer_number(name: str, otherwise: int) -> int:
    """`model.layers.12.mlp` -> 12; the place among its kind where the name has no number."""
    first = short_name(name).split(" ")[0]
    return int(first) if first.isdigit() else otherwise
