"""Parts of a report page that needs nothing beside it: its frame, tables, lists and figures."""

import io
import json
import os
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; }
body { max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; margin: .6em 0; } th, td { padding: .25em .8em; text-align: right; }
th { border-bottom: 2px solid #9aa5b1; font-weight: 600; } td { border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child { text-align: left; } tr.best td { font-weight: 700; }
td.text { text-align: left; font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap; }
svg { width: 100%; height: auto; } .small { color: #5b6573; font-size: 13px; } li { margin: .3em 0; }
"""
GRID = "#e4e7eb"


def page(title: str, sections: list[str]) -> str:
    """A whole HTML document of sections that are HTML already."""
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )


def versions_line(machine: dict[str, Any]) -> str:
    """The last line of a page: what `describe_machine` found installed."""
    return f"<p class='small'>{escape(', '.join(f'{n} {v}' for n, v in machine['versions'].items()))}</p>"


def commit_text(machine: dict[str, Any]) -> str:
    """`commit 0123456789ab`, and whether the checkout had changes."""
    if machine["commit"] is None:
        return "no commit"
    return f"commit {machine['commit'][:12]}{' with changes' if machine['dirty'] else ''}"


def bullets(sentences: list[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def table(headings: list[str], rows: list[list[str]], best: int | None = None) -> str:
    """Rows of plain texts, the one numbered `best` in bold."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f"<tr class='best'>{cells}</tr>" if number == best else f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


# --- figures of matplotlib, which only a command that draws needs ---


def plain_axes(axes: Any) -> None:
    """No frame but the bottom line, a light grid across the values."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9aa5b1")
    axes.tick_params(length=0, labelsize=8)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def svg(figure: Any) -> str:
    """The figure as an <svg> element; the same figure gives the same text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_report(folder: Path, report: dict[str, Any], html: str) -> None:
    """report.json and report.html, each replaced when whole."""
    for name, text in {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False),
        "report.html": html,
    }.items():
        unfinished = folder / f"{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / name)
