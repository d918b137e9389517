"""What a run's numbers say, in sentences: which model is lower than which, and if it is not, why."""

from typing import Any

CLEAR = 2.0  # standard errors between two models that the held-out rows tell apart
LEARNED = 1.2  # a router that sends its own domain this many times the even share has learned the domains


def conclude(report: dict[str, Any]) -> list[str]:
    """Sentences on the tuned mixtures, on copy, and on what the comparison with the dense source is worth."""
    sentences = []
    for mixture in report["comparisons"]:
        sentences += _of_mixture(report, mixture)
    copy = report["copy_check"]
    sentences.append(
        f"Copy: before any training its logits differ from the dense source's by at most "
        f"{copy['max_abs_diff']:.1e} in float32 and {copy['max_abs_diff_float64']:.1e} in float64: "
        f"it computes the same function."
        if copy["passed"]
        else f"Copy: its logits differ by {copy['max_abs_diff']:.1e} from the dense source's: a fault."
    )
    return [*sentences, _regime(report), _made(report)]


def _of_mixture(report: dict[str, Any], mixture: str) -> list[str]:
    name, mean = mixture.upper(), report["models"][mixture]["mean_perplexity"]
    beaten: list[str] = []
    unbeaten: list[str] = []
    close: list[str] = []
    for other, comparison in report["comparisons"][mixture].items():
        entry = report["models"][other]
        told = f"the {entry['title']} ({entry['mean_perplexity']:.2f})"
        (beaten if comparison["ratio"] < 1.0 else unbeaten).append(told)
        if abs(comparison["ratio"] - 1.0) < CLEAR * comparison["error"]:
            close.append(told)
    sentences = []
    if beaten:
        sentences.append(
            f"{name}: a mean perplexity of {mean:.2f} over the domains, lower than {_listed(beaten)}."
        )
    if unbeaten:
        sentences.append(
            f"{name}: its mean perplexity of {mean:.2f} is not lower than {_listed(unbeaten)}. "
            + _why(report, mixture)
        )
    if close:
        sentences.append(
            f"{name}: the held-out text is too short to tell it from {_listed(close)}: the difference is "
            f"below {CLEAR:.0f} standard errors."
        )
    sentences.append(_routing(report, mixture))
    return sentences


def _why(report: dict[str, Any], mixture: str) -> str:
    """The likeliest causes, each read off the run's own numbers."""
    model, untuned = report["models"][mixture], report["models"][f"{mixture}-untuned"]
    reasons = _transfer(report)
    if own_share(report, mixture) < LEARNED * even_share(report):
        reasons.append(
            "the routers have not learned the domains (their own domain gets hardly more than an even share)"
        )
    losses = model["training"]["losses"]
    quarter = max(1, len(losses) // 4)
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if last < first:
        reasons.append(
            f"the tuning loss was still falling (from {first:.2f} in the first to {last:.2f} in the last "
            f"quarter of {len(losses)} steps), so that {model['training']['tokens']:,} tokens were too few"
        )
    if untuned["mean_perplexity"] < model["mean_perplexity"]:
        reasons.append(
            f"tuning made it worse (from {untuned['mean_perplexity']:.2f}), which points at the rates"
        )
    return f"Likely because {_listed(reasons)}." if reasons else "The numbers name no single cause."


def _transfer(report: dict[str, Any]) -> list[str]:
    """Domains that help each other leave separate experts nothing to win."""
    models = report["models"]
    tuned = models["dense-tuned"]["perplexity"]
    helped = [
        f"{name} ({tuned[name]:.2f} against {models[f'specialist-{name}']['perplexity'][name]:.2f})"
        for name in tuned
        if tuned[name] < models[f"specialist-{name}"]["perplexity"][name]
    ]
    if not helped:
        return []
    return [
        "one model learns from the text of all domains at this budget: tuned on all of it, the dense source "
        f"is lower than the specialist on the specialist's own domain for {_listed(helped)}"
    ]


def _routing(report: dict[str, Any], mixture: str) -> str:
    own, even = own_share(report, mixture), even_share(report)
    verdict = "have learned the domains" if own >= LEARNED * even else "are still close to even"
    return (
        f"{mixture.upper()}: the routers send {own:.0%} of a domain's choices to the expert of that domain, "
        f"where an even router sends {even:.0%}; they {verdict}."
    )


def own_share(report: dict[str, Any], mixture: str) -> float:
    """Share of a domain's routing choices that its own expert gets, mean over layers and domains.

    Expert n comes from the specialist of domain n.
    """
    share = report["models"][mixture]["evaluation"]["expert_share"]
    own = [
        layer[number] for number, domain in enumerate(report["domains"]) for layer in share[domain["name"]]
    ]
    return sum(own) / len(own)


def even_share(report: dict[str, Any]) -> float:
    return 1.0 / len(report["domains"])


def _regime(report: dict[str, Any]) -> str:
    models, cost = report["models"], report["cost"]
    flops = {name: cost[name]["forward_flops"] / cost["dense"]["forward_flops"] for name in cost}
    mixtures = " and ".join(f"{flops[name]:.2f} for {name.upper()}" for name in report["comparisons"])
    return (
        f"The comparison with the dense source tuned on the same tokens is data-matched: all saw "
        f"{models['dense-tuned']['tokens_seen']:,} tokens. It is not compute-matched: a token costs "
        f"{mixtures} times the dense source's forward FLOPs."
    )


def _made(report: dict[str, Any]) -> str:
    """How the mixtures were made, where that is not the papers' way."""
    settings = report["settings"]
    tokens = settings["router_start_rows"] * settings["row_length"]
    return (
        "Both mixtures send each token to two feed-forward experts with gates that sum to 1 (BAM's paper: "
        "one, with its raw gate), have no balance loss, and start their routers at the centroids of "
        f"{tokens:,} tokens of each domain (the papers: at random), because so short a tuning does not find "
        "the domains by itself."
    )


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
