"""The statistics as tables of text, for the terminal and for the page."""

from typing import Any

from rich.console import Console
from rich.table import Table

Rows = list[list[str]]

KINDS = {"feed_forward": "feed-forward", "attention": "attention"}


def router_table(report: dict[str, Any]) -> tuple[list[str], Rows]:
    """One row per router."""
    headings = ["router", "E", "K", "max / mean", "variation", "dead", "entropy / ln E", "margin"]
    headings += ["weights' cosine", "outputs' cosine"]
    rows = [
        [
            router["name"],
            str(router["num_experts"]),
            str(router["experts_per_token"]),
            f"{router['max_over_mean']:.2f}",
            f"{router['variation']:.2f}",
            str(len(router["dead"])),
            f"{router['normalised_entropy']:.3f}",
            number(router["margin"]),
            number(router["mean_weight_cosine"]),
            number(router["mean_output_cosine"]),
        ]
        for router in report["routers"]
    ]
    return headings, rows


def load_table(router: dict[str, Any]) -> tuple[list[str], Rows]:
    """Share of the choices of every expert, over all text and by domain."""
    loads = {"all": router["load"]}
    if len(router["load_by_domain"]) > 1:
        loads |= router["load_by_domain"]
    return ["load", *map(str, range(router["num_experts"]))], [
        [name, *(f"{share:.1%}" for share in load)] for name, load in loads.items()
    ]


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know."""
    tokens = ", ".join(f"{count:,} of {name}" for name, count in report["tokens"].items())
    dead = [
        f"{router['name']}: no token chose expert {', '.join(map(str, router['dead']))}."
        for router in report["routers"]
        if router["dead"]
    ]
    return [f"Tokens: {tokens}.", *dead]


def number(value: float | None) -> str:
    """Blank for what was not measured."""
    return "" if value is None else f"{value:.3f}"


def print_stats(console: Console, report: dict[str, Any]) -> None:
    headings, rows = router_table(report)
    shown = Table(title=f"Routers of {report['model']}", title_justify="left")
    for place, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if place else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for note in notes(report):
        console.print(f"- {note}", highlight=False, soft_wrap=True, markup=False)
