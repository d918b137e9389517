"""Which expert gets which sample of the seed set: the one that is least surprised by it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upcycle.errors import UpcycleError


@dataclass(frozen=True)
class Buckets:
    """Every sample in one bucket.

    `bucket_S` is the expert of each sample; `chosen_E` how many samples were each expert's own choice, before
    `moved` of them went to experts with fewer than the quota.
    """

    bucket_S: tuple[int, ...]
    chosen_E: tuple[int, ...]
    moved: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.bucket_S.count(expert) for expert in range(len(self.chosen_E)))


def assign_buckets(log_perplexity_ES: NDArray[np.float64], *, center: bool, quota: int) -> Buckets:
    """Give each sample to the expert with the lowest perplexity, then fill up buckets below the quota.

    With `center` each expert's mean over the samples is subtracted first: without it an expert that is better
    at everything, such as the last checkpoint, takes almost all samples. A bucket below the quota takes, one
    after the other, the samples that it is least surprised by among those of buckets above the quota. Ties go
    to the lowest expert and the first sample.

    Args:
        log_perplexity_ES: mean negative log-likelihood of each sample's tokens under each expert.
        center: subtract each expert's mean.
        quota: samples that every bucket gets at least; 1 or more.

    Raises:
        UpcycleError: there are fewer samples than the quotas need, or a number is not finite.
    """
    E, S = log_perplexity_ES.shape
    if E * quota > S:
        raise UpcycleError(
            f"route.min_per_expert {quota} for {E} experts needs {E * quota} samples, but the seed set has "
            f"{S}; raise route.seed_fraction"
        )
    if not np.isfinite(log_perplexity_ES).all():
        expert = int(np.argwhere(~np.isfinite(log_perplexity_ES))[0, 0])
        raise UpcycleError(f"the perplexity of expert {expert} is not finite; its training has diverged")
    score_ES = (
        log_perplexity_ES - log_perplexity_ES.mean(axis=1, keepdims=True) if center else log_perplexity_ES
    )
    bucket_S = score_ES.argmin(axis=0)
    chosen_E = np.bincount(bucket_S, minlength=E)
    size_E = chosen_E.copy()
    moved = 0
    for expert in range(E):
        while size_E[expert] < quota:
            free_S = size_E[bucket_S] > quota
            sample = int(np.where(free_S, score_ES[expert], np.inf).argmin())
            size_E[bucket_S[sample]] -= 1
            bucket_S[sample] = expert
            size_E[expert] += 1
            moved += 1
    return Buckets(tuple(map(int, bucket_S)), tuple(map(int, chosen_E)), moved)
