"""The statistics as one page that needs nothing beside it."""

from html import escape
from typing import Any

from ..html import bullets, commit_text, page, table, versions_line
from .tables import KINDS, load_table, notes, router_table


def render_page(report: dict[str, Any]) -> str:
    """The whole page as HTML text."""
    from .plots import cosine_figure, layer_figure, load_figure

    machine = report["machine"]
    subtitle = f"{report['dtype']} on {report['device']}, {machine['time']}, {commit_text(machine)}"
    sections = [
        f"<h1>Experts of {escape(report['model'])}</h1><p class='small'>{escape(subtitle)}</p>",
        bullets(notes(report)),
    ]
    by_kind = {kind: [r for r in report["routers"] if r["kind"] == kind] for kind in KINDS}
    for kind, routers in by_kind.items():
        if routers:
            sections += [f"<h2>Load of the {KINDS[kind]} experts</h2>", load_figure(routers)]
    sections += ["<h2>Layer by layer</h2>", layer_figure(report["routers"])]
    if all(by_kind.values()):
        sections.append("<p class='small'>Blue: feed-forward. Red: attention.</p>")
    sections += [table(*router_table(report)), f"<p class='small'>{escape(_MEANING)}</p>"]
    for routers in by_kind.values():
        compared = [router for router in routers if router["num_experts"] > 1 and _has_cosines(router)]
        if compared:
            last = compared[-1]
            sections += [f"<h2>How alike the experts of {escape(last['name'])} are</h2>", cosine_figure(last)]
    tables = [
        f"<p><b>{escape(router['name'])}</b></p>{table(*load_table(router))}"
        for router in report["routers"]
        if router["num_experts"] <= _LONGEST_ROW
    ]
    if tables:
        sections.append(f"<details><summary>Loads as numbers</summary>{''.join(tables)}</details>")
    return page(f"moe-runtime stats: {report['model']}", [*sections, versions_line(machine)])


# Experts in one row of a table; of more there is the figure, and the numbers in the JSON.
_LONGEST_ROW = 16

_MEANING = (
    "max / mean: load of the busiest expert over the mean load. variation: standard deviation of the load "
    "over its mean. dead: experts that no token chose. entropy: of the router's scores, mean over tokens. "
    "margin: least score of a chosen expert minus largest score of one that was not, mean over tokens. "
    "Cosines: mean over pairs of experts."
)


def _has_cosines(router: dict[str, Any]) -> bool:
    return router["weight_cosine"] is not None or router["output_cosine"] is not None
