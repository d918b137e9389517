"""The report of a run: every figure and every sentence is computed from the run's own results."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..machine import describe_machine
from .conclusions import conclude
from .evaluate import Evaluation, compare
from .pipeline import MIXTURES, Plan
from .stages import StageResult

TITLES = {
    "dense": "dense source",
    "average": "weight average of the specialists",
    "dense-tuned": "dense source tuned on the same tokens",
    "copy": "copy: {experts} copies of the dense feed-forward",
    "copy-tuned": "copy, tuned",
    "btx-untuned": "BTX before tuning",
    "btx": "BTX, tuned",
    "bam-untuned": "BAM before tuning",
    "bam": "BAM, tuned",
}


def build_report(plan: Plan, results: Mapping[str, StageResult]) -> dict[str, Any]:
    """All of a run as JSON values."""
    values = {name: result.values for name, result in results.items()}
    evaluations = {name: Evaluation(**values[f"evaluate-{name}"]) for name in plan.models}
    models = {name: _model_entry(plan, name, evaluations[name], values) for name in plan.models}
    # "lower than" is asked of these
    others = ("dense", *plan.specialists, "average", "dense-tuned")
    comparisons = {
        mixture: {other: asdict(compare(evaluations[mixture], evaluations[other])) for other in others}
        for mixture in MIXTURES
    }
    report = {
        "machine": describe_machine(),
        "source": str(plan.source),
        "settings": asdict(plan.settings),
        "domains": [_domain_entry(plan, name) for name in plan.names],
        "models": models,
        "comparisons": comparisons,
        "cost": values["cost"],
        "latency": values["latency"],
        "copy_check": values["upcycle-copy"]["verify"],
        "continuations": {
            name: {"prompt": plan.rows[name].prompt, "reference": plan.rows[name].reference, **texts}
            for name, texts in values["continuations"].items()
        },
        "stages": {
            name: {"seconds": result.seconds, "ran_now": result.ran} for name, result in results.items()
        },
        "seconds": sum(result.seconds for result in results.values()),
    }
    # tuples become lists, so that the report in memory equals the one in the file
    report = json.loads(json.dumps(report))
    return report | {"conclusions": conclude(report)}


def print_report(console: Console, report: dict[str, Any], folder: Path) -> None:
    """The table of perplexities, what the mixtures cost, and the conclusions."""
    console.print()
    console.print(perplexity_table(report))
    console.print(cost_table(report))
    for sentence in report["conclusions"]:
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    console.print(f"\nReport: {folder / 'report.html'} and {folder / 'report.json'}", highlight=False)


def perplexity_table(report: dict[str, Any]) -> Table:
    """Held-out perplexity: one row per model, one column per domain."""
    table = Table(title="Held-out perplexity (lower is better)", title_justify="left")
    table.add_column("model")
    for domain in report["domains"]:
        table.add_column(domain["name"], justify="right")
    table.add_column("mean", justify="right")
    table.add_column("tokens seen", justify="right")
    best = min(entry["mean_perplexity"] for entry in report["models"].values())
    for entry in report["models"].values():
        table.add_row(
            entry["title"],
            *(f"{value:.2f}" for value in entry["perplexity"].values()),
            f"{entry['mean_perplexity']:.2f}",
            f"{entry['tokens_seen']:,}",
            style="bold" if entry["mean_perplexity"] == best else "",
        )
    return table


def cost_table(report: dict[str, Any]) -> Table:
    """Parameters, FLOPs and measured latency, each beside the dense source."""
    shown = report["latency"]
    table = Table(title="Cost beside the dense source", title_justify="left")
    table.add_column("")
    for name in shown:
        table.add_column("dense" if name == "dense" else name.upper(), justify="right")
    for label, figures in cost_figures(report).items():
        table.add_row(label, *figures)
    return table


def cost_figures(report: dict[str, Any]) -> dict[str, list[str]]:
    """Label -> one text per model of the latency stage, later ones with their ratio to the dense source."""
    names = list(report["latency"])
    costs = report["cost"]
    prompt = report["settings"]["latency_prompt"]
    rows = {
        "parameters (M)": [costs[name]["total_parameters"] / 1e6 for name in names],
        "active parameters (M)": [costs[name]["active_parameters"] / 1e6 for name in names],
        "forward MFLOPs per token": [costs[name]["forward_flops"] / 1e6 for name in names],
        f"prefill of {prompt} tokens (ms)": [1e3 * latency(report, name, "prefill_s") for name in names],
        "one decoded token (ms)": [1e3 * latency(report, name, "decode_s") for name in names],
    }
    return {
        label: [f"{row[0]:,.1f}", *(f"{value:,.1f} ({value / row[0]:.2f}x)" for value in row[1:])]
        for label, row in rows.items()
    }


def latency(report: dict[str, Any], name: str, kind: str) -> float:
    """Mean of the medians of both rounds, in seconds."""
    medians = [timed[kind]["median"] for timed in report["latency"][name]]
    return sum(medians) / len(medians)


# --- parts of the report ---


def _domain_entry(plan: Plan, name: str) -> dict[str, Any]:
    domain = next(domain for domain in plan.domains if domain.name == name)
    rows = plan.rows[name]
    return {
        "name": name,
        "title": domain.title,
        "origin": domain.origin,
        "licence": domain.licence,
        "documents": len(domain.documents),
        "fingerprint": domain.fingerprint,
        "specialist_tokens": rows.train_NL.numel(),
        "tuning_tokens": rows.tune_NL.numel(),
        "heldout_tokens": rows.heldout_NL.numel(),
    }


def _model_entry(
    plan: Plan, name: str, evaluation: Evaluation, values: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    title = TITLES.get(name, name.replace("specialist-", "specialist for "))
    training = values.get(f"train-{name}")
    return {
        "title": title.format(experts=len(plan.names)),
        "perplexity": evaluation.perplexities,
        "mean_perplexity": evaluation.mean_perplexity,
        "geometric_mean_perplexity": evaluation.geometric_mean_perplexity,
        "tokens_seen": _tokens_seen(plan, name),
        "training": training,
        "evaluation": asdict(evaluation),
        "folder": None if name == "average" else str(plan.model_folder(name)),
    }


def _tokens_seen(plan: Plan, name: str) -> int:
    """Tokens that had a part in a model's weights, those of its specialists included."""
    of_specialists = sum(rows.train_NL.numel() for rows in plan.rows.values())
    of_tuning = sum(rows.tune_NL.numel() for rows in plan.rows.values())
    if name in ("dense", "copy"):
        return 0
    if name == "copy-tuned":
        return of_tuning
    if name in plan.specialists:
        return plan.rows[name.removeprefix("specialist-")].train_NL.numel()
    if name == "average" or name.endswith("-untuned"):
        return of_specialists
    return of_specialists + of_tuning
