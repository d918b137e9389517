"""report.html: one page that needs nothing beside it."""

from collections.abc import Mapping
from html import escape
from typing import Any

from matplotlib.figure import Figure

from moe_runtime.html import bullets, commit_text, page, plain_axes, svg, table, versions_line

from .report import SETUPS, conclusions, score_table

COLOURS = {"mixture": "#c8431b", "dense": "#1f5fa8"}
MARKERS = {"untuned": "o", "task": "s", "instructions": "^", "instructions-task": "D"}


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page as HTML text."""
    machine = report["machine"]
    about = (
        f"{report['recipe']['mixture']} and {report['recipe']['dense']} on {machine['device']}, "
        f"{machine['threads']} threads, {report['seconds'] / 60:.1f} minutes, {machine['time']}, "
        f"{commit_text(machine)}, seed {report['recipe']['seed']}"
    )
    sections = [
        f"<h1>Instruction tuning of a mixture and its dense twin</h1><p class='small'>{escape(about)}</p>",
        bullets(conclusions(report)),
        "<h2>Quality against FLOPs</h2>",
        quality_figure(report),
        table(*score_table(report)),
        "<p class='small'>A score is the share of right choices by log-likelihood per byte, of exact "
        "answers, or of right tokens of a completion. Training FLOPs are by formula, those of all tunings "
        "before the question; inference FLOPs those of a forward pass per token.</p>",
        "<h2>Instruction tuning</h2>",
        loss_figure(report),
        versions_line(machine),
    ]
    return page("moe-runtime flan", sections)


def quality_figure(report: Mapping[str, Any]) -> str:
    """Mean score over training FLOPs, and over inference FLOPs per token; a mark per model and set-up."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for mean in report["means"]:
        for axes, key in ((left, "training_flops"), (right, "inference_flops_per_token")):
            filled = COLOURS[mean["model"]] if mean["shots"] == 0 else "white"
            axes.plot(
                mean[key],
                mean["score"],
                MARKERS[mean["setup"]],
                color=COLOURS[mean["model"]],
                markerfacecolor=filled,
                label=_label(mean) if axes is left else None,
            )
    left.set_ylabel("mean score")
    left.set_xlabel("training FLOPs")
    right.set_xlabel("inference FLOPs per token")
    for axes in (left, right):
        plain_axes(axes)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return svg(figure)


def _label(mean: Mapping[str, Any]) -> str:
    shots = f", {mean['shots']} examples" if mean["shots"] else ""
    return f"{mean['model']}, {SETUPS[mean['setup']]}{shots}"


def loss_figure(report: Mapping[str, Any]) -> str:
    """Loss of both models over the FLOPs that instruction tuning has cost so far."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    for name, model in report["models"].items():
        total = next(
            mean["training_flops"]
            for mean in report["means"]
            if (mean["model"], mean["setup"]) == (name, "instructions")
        )
        losses = model["losses"]
        flops = [total * (place + 1) / len(losses) for place in range(len(losses))]
        axes.plot(flops, losses, color=COLOURS[name], linewidth=1.6, label=name)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize=8, frameon=False)
    plain_axes(axes)
    return svg(figure)
