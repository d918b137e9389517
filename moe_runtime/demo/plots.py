"""The report's figures, as SVG text that stands in the page itself."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..html import GRID, plain_axes, svg

KIND_COLOURS = {
    "dense": "#5b6573",
    "specialist": "#b9a27c",
    "average": "#8f7aa8",
    "dense-tuned": "#1f5fa8",
    "copy": "#9aa5b1",
    "untuned": "#e3a587",
    "mixture": "#c8431b",
}


def perplexity_figure(report: dict[str, Any]) -> str:
    """A panel per domain and one for the mean; a dot per model, a line where the tuned dense source is."""
    models = report["models"]
    domains = [domain["name"] for domain in report["domains"]]
    figure = Figure(figsize=(11, 0.36 * len(models) + 1.1), layout="constrained")
    panels = figure.subplots(1, len(domains) + 1, sharey=True)
    heights = range(len(models), 0, -1)
    for axes, column in zip(panels, [*domains, "mean"], strict=True):
        values = [
            entry["mean_perplexity"] if column == "mean" else entry["perplexity"][column]
            for entry in models.values()
        ]
        baseline = values[list(models).index("dense-tuned")]
        axes.axvline(baseline, color=KIND_COLOURS["dense-tuned"], linewidth=0.9, linestyle=(0, (4, 3)))
        for height, name, value in zip(heights, models, values, strict=True):
            axes.plot(value, height, "o", color=KIND_COLOURS[_kind(name)], markersize=7)
            axes.annotate(f"{value:.2f}", (value, height), (7, -3), textcoords="offset points", fontsize=8)
        spread = max(values) - min(values)
        axes.set_xlim(min(values) - 0.12 * spread, max(values) + 0.38 * spread)
        axes.set_title("mean over domains" if column == "mean" else column, fontsize=10, fontweight="bold")
        plain_axes(axes)
    panels[0].set_yticks(list(heights), [entry["title"] for entry in models.values()], fontsize=9)
    figure.supxlabel(
        "held-out perplexity (lower is better); dashed: dense source tuned on the same tokens", fontsize=9
    )
    return svg(figure)


def routing_figure(report: dict[str, Any]) -> str:
    """Where the tokens of each domain go: mean over layers as a grid, one grid per router of each mixture."""
    domains = [domain["name"] for domain in report["domains"]]
    grids = {}
    for mixture in report["comparisons"]:
        evaluation = report["models"][mixture]["evaluation"]
        grids[f"{mixture.upper()}: feed-forward choices"] = evaluation["expert_share"]
        if evaluation["attention_gate"]:
            grids[f"{mixture.upper()}: attention gates"] = evaluation["attention_gate"]
    figure = Figure(figsize=(11, 0.5 * len(domains) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    even = 1.0 / len(domains)
    for axes, (title, by_domain) in zip(panels, grids.items(), strict=True):
        rows = [_mean_over_layers(by_domain[name]) for name in domains]
        darkest = max(2 * even, max(map(max, rows)))
        axes.imshow(rows, cmap="YlOrBr", vmin=0.0, vmax=darkest, aspect="auto")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                colour = "white" if value > 0.6 * darkest else "#333333"
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(range(len(domains)), domains, fontsize=9)
        axes.set_yticks(range(len(domains)), domains, fontsize=9)
        axes.set_title(title, fontsize=10, fontweight="bold")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.supxlabel(
        f"expert, by the specialist it came from; an even router gives each {even:.0%}", fontsize=9
    )
    return svg(figure)


def training_figure(report: dict[str, Any]) -> str:
    """Training loss over tokens: the specialists on the left, what saw all domains on the right."""
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = ("#b9a27c", "#7d8f69", "#8f7aa8", "#c98f9a", "#6c8ea3")
    specialists = [name for name in report["models"] if name.startswith("specialist-")]
    for number, name in enumerate(specialists):
        label = name.removeprefix("specialist-")
        _loss_line(left, report["models"][name]["training"], label, shades[number % len(shades)])
    left.set_title("specialists", fontsize=10, fontweight="bold")
    colours = {"dense-tuned": "#1f5fa8", "btx": "#c8431b", "bam": "#e08e0b"}
    for name, colour in colours.items():
        label = name if name == "dense-tuned" else f"{name.upper()} tuning"
        _loss_line(right, report["models"][name]["training"], label, colour)
    right.set_title("on all domains", fontsize=10, fontweight="bold")
    for axes in (left, right):
        axes.set_xlabel("tokens", fontsize=9)
        axes.set_ylabel("loss (nats per token)", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
        plain_axes(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    return svg(figure)


def _loss_line(axes: Axes, training: dict[str, Any], label: str, colour: str) -> None:
    """Losses of single steps, faint, and their running mean."""
    losses = training["losses"]
    per_step = training["tokens"] / len(losses)
    tokens = [per_step * (step + 1) for step in range(len(losses))]
    window = max(1, len(losses) // 6)
    means = [
        sum(losses[max(0, n - window) : n]) / len(losses[max(0, n - window) : n])
        for n in range(1, len(losses) + 1)
    ]
    axes.plot(tokens, losses, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(tokens, means, color=colour, linewidth=1.8, label=label)


def _mean_over_layers(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _kind(name: str) -> str:
    if name.startswith("specialist-"):
        return "specialist"
    if name.endswith("-untuned"):
        return "untuned"
    return name if name in KIND_COLOURS else "mixture"
