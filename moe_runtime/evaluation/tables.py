"""The report as tables for the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

TEXT_COLUMNS = {
    "tokens": "{:,}",
    "nats_per_token": "{:.4f}",
    "perplexity": "{:.3f}",
    "bits_per_byte": "{:.4f}",
}
TASK_COLUMNS = {
    "kind": "{}",
    "examples": "{:,}",
    "accuracy": "{:.1%}",
    "accuracy_per_byte": "{:.1%}",
    "chance": "{:.1%}",
    "exact_match": "{:.1%}",
    "nats_per_token": "{:.4f}",
    "perplexity": "{:.3f}",
    "bits_per_byte": "{:.4f}",
    "token_accuracy": "{:.1%}",
}


def print_evaluation(console: Console, report: dict[str, Any]) -> None:
    """One table of the texts and one of the tasks; no column that is empty in all rows."""
    for title, columns in (("texts", TEXT_COLUMNS), ("tasks", TASK_COLUMNS)):
        results: dict[str, dict[str, Any]] = report[title]
        if not results:
            continue
        shown = [name for name in columns if any(name in figures for figures in results.values())]
        table = Table(title=f"{title.capitalize()}: {report['model']}", title_justify="left")
        table.add_column(title.removesuffix("s"))
        for name in shown:
            table.add_column(name.replace("_", " "), justify="right")
        for name, figures in results.items():
            table.add_row(name, *(columns[c].format(figures[c]) if c in figures else "" for c in shown))
        console.print(table)
