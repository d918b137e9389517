"""From the stages' values to what is compared: per method means and spreads over seeds, and sentences."""

import math
from collections.abc import Sequence
from typing import Any

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
# Standard errors beyond which a mean over so many seeds differs from zero: Student's t, 95 %, both sides.
CLEAR = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
NEAR = 0.02  # of two trainings' FLOPs that count as equal


def raw_values(values: dict[str, dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """What a result file keeps of the stages: the base, and by seed every model that was evaluated."""
    base = values["base"]
    return {
        "base": {key: base[key] for key in ("perplexity", "mean_loss", "texts", "samples")},
        "seeds": {
            str(seed): {
                name.partition("-")[2]: found
                for name, found in values.items()
                if name.startswith(f"seed{seed}-") and "mean_loss" in found
            }
            for seed in seeds
        },
    }


def summarise(content: dict[str, Any]) -> dict[str, Any]:
    """Rows of the table and the paired differences, in nats per token, over the seeds of a result file."""
    of_seed, base = content["seeds"], content["base"]
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
    return {"rows": rows, "against_dense": _against_dense(of_seed), "factors": _factors(of_seed)}


def statistic(numbers: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and standard error of the mean of `n` numbers."""
    mean = sum(numbers) / len(numbers)
    spread = math.sqrt(sum((x - mean) ** 2 for x in numbers) / max(1, len(numbers) - 1))
    return {"mean": mean, "std": spread, "error": spread / math.sqrt(len(numbers)), "n": len(numbers)}


def _difference(of_seed: dict[str, dict[str, Any]], name: str, other: str) -> dict[str, float]:
    """Of the mean losses, paired by seed."""
    return statistic([found[name]["mean_loss"] - found[other]["mean_loss"] for found in of_seed.values()])


def _against_dense(of_seed: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Each method's loss minus that of the dense model of as many tokens, and of as many FLOPs where run.

    Of those trained at some method's FLOPs the nearest is taken, if it is within NEAR of them.
    """
    first = next(iter(of_seed.values()))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in METHODS:
        if name == "dense":
            continue
        found[name] = {"tokens": _difference(of_seed, name, "dense")}
        dense = [other for other in first if other.startswith("dense-at-")]
        far = {other: abs(first[other]["flops"] / first[name]["flops"] - 1) for other in dense}
        nearest = min(far, key=lambda other: far[other], default=None)
        if nearest is not None and far[nearest] <= NEAR:
            found[name]["flops"] = _difference(of_seed, name, nearest)
    return found


def _factors(of_seed: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
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


def conclude(summary: dict[str, Any]) -> list[str]:
    """What the numbers say, each with its spread; "not told apart" within CLEAR."""
    sentences = []
    for name, against in summary["against_dense"].items():
        parts = [
            f"{_told(difference)} at equal {'tokens' if kind == 'tokens' else 'FLOPs'}"
            for kind, difference in against.items()
        ]
        sentences.append(f"{METHODS[name]} against continued dense training: {'; '.join(parts)}.")
    factors = summary["factors"]
    sentences.append(f"UpIT's router initialisation, over both kinds of experts: {_told(factors['router'])}.")
    sentences.append(
        "UpIT's expansion of half as many checkpoints, against recording them all: "
        f"{_told(factors['expansion'])}."
    )
    return sentences


def _told(difference: dict[str, float]) -> str:
    mean, error = difference["mean"], difference["error"]
    if difference["n"] == 1:
        return f"{mean:+.4f} nats per token, one seed"
    number = f"{mean:+.4f} ± {error:.4f} nats per token"
    if abs(mean) <= CLEAR[int(difference["n"])] * error:
        return f"not told apart ({number})"
    return f"{'better' if mean < 0 else 'worse'} ({number})"
