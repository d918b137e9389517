"""report.html: one page that needs nothing beside it."""

from html import escape
from typing import Any

from ..html import bullets, commit_text, page, table, versions_line


def render_page(report: dict[str, Any]) -> str:
    """The whole page as HTML text."""
    from .plots import perplexity_figure, routing_figure, training_figure

    sections = [
        f"<h1>From a dense checkpoint to mixtures of experts</h1><p class='small'>{_subtitle(report)}</p>",
        bullets(report["conclusions"]),
        "<h2>Perplexity on held-out text</h2>",
        perplexity_figure(report),
        _perplexity_rows(report),
        "<h2>Where tokens go</h2>",
        routing_figure(report),
        "<h2>Cost</h2>",
        _cost_rows(report),
        "<h2>Continuations of held-out text</h2>",
        _continuations(report),
        "<h2>Training</h2>",
        training_figure(report),
        "<h2>Texts</h2>",
        _texts(report),
        "<h2>Time of each stage</h2>",
        table(["stage", "seconds"], [[n, f"{s['seconds']:.1f}"] for n, s in report["stages"].items()]),
        versions_line(report["machine"]),
    ]
    return page("moe-runtime demo", sections)


def _subtitle(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return escape(
        f"{report['source']} on {machine['device']}, {machine['threads']} threads, "
        f"{report['seconds'] / 60:.1f} minutes, {machine['time']}, {commit_text(machine)}, "
        f"seed {report['settings']['seed']}"
    )


def _perplexity_rows(report: dict[str, Any]) -> str:
    domains = [domain["name"] for domain in report["domains"]]
    entries = list(report["models"].values())
    means = [entry["mean_perplexity"] for entry in entries]
    rows = [
        [
            entry["title"],
            *(f"{entry['perplexity'][name]:.2f}" for name in domains),
            f"{entry['mean_perplexity']:.2f}",
            f"{entry['geometric_mean_perplexity']:.2f}",
            f"{entry['tokens_seen']:,}",
        ]
        for entry in entries
    ]
    headings = ["model", *domains, "mean", "geometric mean", "tokens seen"]
    return table(headings, rows, best=means.index(min(means)))


def _cost_rows(report: dict[str, Any]) -> str:
    from .report import cost_figures

    names = ["dense" if name == "dense" else name.upper() for name in report["latency"]]
    rows = [[label, *figures] for label, figures in cost_figures(report).items()]
    settings = report["settings"]
    return table(["", *names], rows) + (
        f"<p class='small'>FLOPs at a context of {settings['row_length']} tokens, causal; latency of one "
        f"sequence in {escape(report['latency']['dense'][0]['dtype'])}, medians of two rounds in opposite "
        "orders. Decoding reads every active weight, so it follows bytes more than FLOPs.</p>"
    )


def _continuations(report: dict[str, Any]) -> str:
    names = {"reference": "the text itself", "dense": "dense source", "btx": "BTX", "bam": "BAM"}
    parts = []
    for domain, texts in report["continuations"].items():
        rows = "".join(
            f"<tr><td>{label}</td><td class='text'>{escape(texts[name])}</td></tr>"
            for name, label in names.items()
        )
        prompt = f"<tr><th>{escape(domain)}</th><td class='text'>{escape(texts['prompt'])}</td></tr>"
        parts.append(f"<table>{prompt}{rows}</table>")
    return "".join(parts)


def _texts(report: dict[str, Any]) -> str:
    headings = ["domain", "text", "from", "licence", "documents", "specialist", "tuning", "held out"]
    rows = [
        [
            domain["name"],
            domain["title"],
            domain["origin"],
            domain["licence"],
            f"{domain['documents']:,}",
            *(f"{domain[kind]:,}" for kind in ("specialist_tokens", "tuning_tokens", "heldout_tokens")),
        ]
        for domain in report["domains"]
    ]
    return table(headings, rows) + "<p class='small'>No document gives tokens to two of the parts.</p>"
