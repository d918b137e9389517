"""Every sample to one expert, and no expert without samples."""

import numpy as np
import pytest

from upcycle.errors import UpcycleError
from upcycle.upit.buckets import assign_buckets


def draws(experts, samples, seed=0):
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal((experts, samples))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("quota", [1, 3, 5])
def test_buckets_partition_the_seed_set(quota, center):
    """U5: each sample in one bucket, each bucket with its quota."""
    for seed in range(20):
        buckets = assign_buckets(draws(4, 20, seed), center=center, quota=quota)
        assert len(buckets.bucket_S) == 20
        assert set(buckets.bucket_S) <= set(range(4))
        assert sum(buckets.sizes) == sum(buckets.chosen_E) == 20
        assert min(buckets.sizes) >= quota
        assert buckets.moved == sum(max(0, quota - chosen) for chosen in buckets.chosen_E)


def test_samples_go_to_the_least_surprised_expert_and_ties_to_the_first():
    scores = np.array([[1.0, 3.0, 2.0, 1.0], [2.0, 1.0, 2.0, 3.0]])
    buckets = assign_buckets(scores, center=False, quota=1)
    assert buckets.bucket_S == (0, 1, 0, 0)
    assert buckets.moved == 0


def test_centering_keeps_the_best_expert_from_taking_all():
    scores = draws(4, 40)
    scores[3] -= 5
    assert assign_buckets(scores, center=False, quota=1).chosen_E == (0, 0, 0, 40)
    centered = assign_buckets(scores, center=True, quota=1)
    assert min(centered.chosen_E) >= 4


def test_an_empty_bucket_takes_what_it_is_least_surprised_by():
    scores = np.array([[0.0, 0.0, 0.0, 9.0], [9.0, 9.0, 9.0, 0.0], [5.0, 3.0, 4.0, 1.0]])
    # sample 3 would suit expert 2 best, but is all that expert 1 has
    assert assign_buckets(scores, center=False, quota=1).bucket_S == (0, 2, 0, 1)


def test_quotas_beyond_the_seed_set_are_refused():
    sentence = "min_per_expert 6 for 4 experts needs 24 samples, but the seed set has 20; raise"
    with pytest.raises(UpcycleError, match=sentence):
        assign_buckets(draws(4, 20), center=True, quota=6)


def test_a_diverged_expert_is_named():
    scores = draws(3, 6)
    scores[2, 4] = np.nan
    with pytest.raises(UpcycleError, match="the perplexity of expert 2 is not finite"):
        assign_buckets(scores, center=True, quota=1)
