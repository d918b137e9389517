"""What was measured, as plain numbers."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """One router over all tokens that were read, padding not counted.

    `load` is the share of choices that each expert got, for a soft mixture its mean gate; it sums to 1.
    With p the router's scores, normalised to sum 1 over the experts, means over tokens are taken of
    `entropy` = -Σ p ln p and of `margin` = (least p of a chosen expert) - (largest p of one that is not).
    """

    name: str  # of the module that holds router and experts
    kind: Literal["feed_forward", "attention"]
    num_experts: int
    experts_per_token: int  # all of them in a soft mixture
    load: tuple[float, ...]
    load_by_domain: dict[str, tuple[float, ...]]
    entropy: float  # in nats
    margin: float | None  # None: every expert is chosen
    weight_cosine: Matrix | None  # between the experts' weights; None: they are not stacked as known
    output_cosine: Matrix | None  # between the experts' outputs for the same tokens, mean over tokens

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load: 1 when balanced, E / K at most."""
        return max(self.load) * self.num_experts

    @property
    def variation(self) -> float:
        """Coefficient of variation of the load: standard deviation over mean, 0 when balanced."""
        E = self.num_experts
        return (E * sum((load - 1 / E) ** 2 for load in self.load)) ** 0.5

    @property
    def normalised_entropy(self) -> float:
        """`entropy` over ln E: 1 when the router has no preference, 0 when it is certain."""
        return self.entropy / math.log(self.num_experts) if self.num_experts > 1 else 0.0

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that no token chose."""
        return tuple(expert for expert, load in enumerate(self.load) if load == 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with what follows from them."""
        return {
            **asdict(self),
            "max_over_mean": self.max_over_mean,
            "variation": self.variation,
            "normalised_entropy": self.normalised_entropy,
            "dead": self.dead,
            "mean_weight_cosine": mean_off_diagonal(self.weight_cosine),
            "mean_output_cosine": mean_off_diagonal(self.output_cosine),
        }


@dataclass(frozen=True, kw_only=True)
class ExpertStats:
    """All routers of a model, from its first layer to its last."""

    tokens: dict[str, int]  # that were counted, by domain
    routers: tuple[RouterStats, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"tokens": self.tokens, "routers": [router.to_dict() for router in self.routers]}


def mean_off_diagonal(matrix: Matrix | None) -> float | None:
    """Mean over pairs of different experts; None where there is none."""
    if matrix is None or len(matrix) < 2:
        return None
    E = len(matrix)
    return (sum(map(sum, matrix)) - sum(matrix[e][e] for e in range(E))) / (E * (E - 1))
