"""From the stages' values to what is compared: per method means and spreads over seeds, and sentences."""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.ablation.settings import AblationSettings

METHODS = {
    "dense": "dense, equal tokens",
    "copy": "copy",
    "drop": "drop",
    "btx": "BTX",
    "bam": "BAM",
    "upit-drawn-recorded": "UpIT, drawn routers, recorded experts",
    "upit-drawn-expanded": "UpIT, drawn routers, expanded experts",
    "upit-routed-recorded": "UpIT, trained routers, recorded experts",
    "upit-routed-expanded": "UpIT, trained routers, expanded experts",
}
CLEAR = 2.0  # standard errors


def summarise(values: dict[str, dict[str, Any]], settings: AblationSettings) -> dict[str, Any]:
    """Rows of the table and the paired differences, in nats per token, over seeds."""
    of_seed = {
        seed: {
            name.partition("-")[2]: found
            for name, found in values.items()
            if name.startswith(f"seed{seed}-") and "mean_loss" in found
        }
        for seed in settings.seeds
    }
    base = values["base"]
    rows = [
        {
            "method": name,
            "title": METHODS.get(name) or f"dense, FLOPs of {METHODS[name.removeprefix('dense-at-')]}",
            "tokens": statistic([found[name]["tokens"] for found in of_seed.values()])["mean"],
            "flops": statistic([found[name]["flops"] for found in of_seed.values()])["mean"],
            "loss": statistic([found[name]["mean_loss"] for found in of_seed.values()]),
            "perplexity": {
                domain: statistic([found[name]["perplexity"][domain] for found in of_seed.values()])
                for domain in base["perplexity"]
            },
            **{
                key: statistic([found[name][key] for found in of_seed.values()])
                for key in ("expert_cosine",)
                if key in next(iter(of_seed.values()))[name]
            },
        }
        for name in next(iter(of_seed.values()))
    ]
    return {
        "base": {key: base[key] for key in ("perplexity", "mean_loss", "texts", "samples")},
        "rows": rows,
        "against_dense": _against_dense(of_seed),
        "factors": _factors(of_seed),
        "seeds": {str(seed): found for seed, found in of_seed.items()},
    }


def statistic(numbers: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and standard error of the mean."""
    mean = sum(numbers) / len(numbers)
    spread = math.sqrt(sum((x - mean) ** 2 for x in numbers) / max(1, len(numbers) - 1))
    return {"mean": mean, "std": spread, "error": spread / math.sqrt(len(numbers))}


def _difference(of_seed: dict[int, dict[str, Any]], name: str, other: str) -> dict[str, float]:
    """Of the mean losses, paired by seed."""
    return statistic([found[name]["mean_loss"] - found[other]["mean_loss"] for found in of_seed.values()])


def _against_dense(of_seed: dict[int, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Each method's loss minus that of the dense model of as many tokens, and of as many FLOPs where run."""
    first = next(iter(of_seed.values()))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in METHODS:
        if name == "dense":
            continue
        found[name] = {"tokens": _difference(of_seed, name, "dense")}
        # drop costs what copy costs, and UpIT's variants differ by the routers' seed samples
        matched = {"drop": "copy"}.get(name, "upit-routed-expanded" if name.startswith("upit") else name)
        if f"dense-at-{matched}" in first:
            found[name]["flops"] = _difference(of_seed, name, f"dense-at-{matched}")
    return found


def _factors(of_seed: dict[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What UpIT's two parts change, each averaged over the other, paired by seed."""

    def effect(with_: tuple[str, str], without: tuple[str, str]) -> dict[str, float]:
        return statistic(
            [
                sum(found[f"upit-{a}"]["mean_loss"] - found[f"upit-{b}"]["mean_loss"] for a, b in pairs) / 2
                for found in of_seed.values()
                for pairs in [tuple(zip(with_, without, strict=True))]
            ]
        )

    return {
        "router": effect(("routed-recorded", "routed-expanded"), ("drawn-recorded", "drawn-expanded")),
        "expansion": effect(("drawn-expanded", "routed-expanded"), ("drawn-recorded", "routed-recorded")),
    }


def conclude(content: dict[str, Any]) -> list[str]:
    """What the numbers say, each with its spread; "not told apart" within two standard errors."""
    sentences = []
    for name, against in content["against_dense"].items():
        parts = [
            f"{_told(difference)} at equal {'tokens' if kind == 'tokens' else 'FLOPs'}"
            for kind, difference in against.items()
        ]
        sentences.append(f"{METHODS[name]} against continued dense training: {'; '.join(parts)}.")
    factors = content["factors"]
    sentences.append(f"UpIT's router initialisation, over both kinds of experts: {_told(factors['router'])}.")
    sentences.append(
        "UpIT's expansion of half as many checkpoints, against recording them all: "
        f"{_told(factors['expansion'])}."
    )
    return sentences


def _told(difference: dict[str, float]) -> str:
    mean, error = difference["mean"], difference["error"]
    if error == 0:  # one seed
        return f"{mean:+.4f} nats per token, one seed"
    number = f"{mean:+.4f} ± {error:.4f} nats per token"
    if abs(mean) <= CLEAR * error:
        return f"not told apart ({number})"
    return f"{'better' if mean < 0 else 'worse'} ({number})"
