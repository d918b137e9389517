"""The ablation's section of docs/performance.md, and its picture."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.ablation.summary import METHODS, summarise
from moe_runtime.html import plain_axes, svg

SHOWS = (
    "Held-out loss of each method minus that of continued dense training, mean over seeds with its standard "
    "error: filled at equal tokens, hollow at equal FLOPs."
)


def ablation_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: losses in nats per token, mean and standard deviation over seeds."""
    domains = list(content["base"]["perplexity"])
    base = content["base"]
    head = ["model", "tokens", "FLOPs", "loss", *(f"perplexity, {domain}" for domain in domains)]
    rows = [["base", "", "", f"{base['mean_loss']:.4f}", *(f"{base['perplexity'][d]:.2f}" for d in domains)]]
    rows += [
        [
            row["title"],
            f"{row['tokens'] / 1e3:.0f} k",
            f"{row['flops'] / 1e12:.2f} T",
            f"{row['loss']['mean']:.4f} ± {row['loss']['std']:.4f}",
            *(f"{row['perplexity'][d]['mean']:.2f} ± {row['perplexity'][d]['std']:.2f}" for d in domains),
        ]
        for row in summarise(content)["rows"]
    ]
    return head, rows


def explained(content: dict[str, Any]) -> str:
    settings = content["settings"]
    model = settings["model"]
    texts = "; ".join(content["base"]["texts"].values())
    rounds = f"{settings['expert_epochs']:g} and {settings['mixture_epochs']:g}"
    return (
        f"A Llama of {model['num_hidden_layers']} layers of width {model['hidden_size']}, trained from "
        f"scratch on {3 * settings['base_samples']:,} samples of {settings['length']} tokens, then continued "
        f"by each method on {content['base']['samples']:,} new samples of the same texts ({texts}), in two "
        f"rounds of {rounds} epochs, with one learning rate for all; {len(settings['seeds'])} seeds, which "
        "change the order of the samples, routers, dropped neurons and children, not the base. Experts: "
        f"{settings['experts']}, two per token; BTX and BAM have one per text, whose specialists are trained "
        "in the first round, and BAM one per token. Loss: mean over texts, nats per token. "
        f"The whole run took {content['seconds'] / 60:.0f} minutes."
    )


def draw_ablation(content: dict[str, Any]) -> str:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    against = summarise(content)["against_dense"]
    names = list(against)
    for place, name in enumerate(names):
        for kind, filled in (("tokens", True), ("flops", False)):
            difference = against[name].get(kind)
            if difference is not None:
                axes.errorbar(
                    difference["mean"],
                    -place + (0.12 if filled else -0.12),
                    xerr=difference["error"],
                    fmt="o",
                    color="#c8431b",
                    markerfacecolor="#c8431b" if filled else "white",
                    capsize=2,
                    markersize=5,
                )
    axes.axvline(0, color="#1c2530", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(names))], [METHODS[name] for name in names], fontsize=8)
    axes.set_xlabel("loss minus the dense model's, nats per token", fontsize=9)
    plain_axes(axes)
    return svg(figure)
