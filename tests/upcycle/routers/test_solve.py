"""Router rows in closed form: they route, and sums of parts are the sums of the whole."""

import pytest
import torch
from tiny_models import assert_equal_up_to_rounding, randn

from upcycle.routers.inputs import InputSums
from upcycle.routers.solve import centroid_rows, ridge_rows

E, D, TOKENS = 4, 48, 600


def clusters(separation, seed=0):
    """Inputs [E, TOKENS, D] around one centre per expert; all share an offset larger than what tells them
    apart, as the states of a language model do, and their coordinates have very different scales."""
    scale_D = torch.logspace(-1, 1, D)
    centre_ED = separation * randn(E, D, seed=100)
    return (8.0 + centre_ED[:, None] + randn(E, TOKENS, D, seed=seed)) * scale_D


def summed(x_ETD, parts=1, second_moment=True):
    sums = InputSums(E, D, second_moment=second_moment, device=torch.device("cpu"))
    for expert, x_TD in enumerate(x_ETD):
        for part in x_TD.chunk(parts):
            sums.add(expert, part, len(x_TD))
    return sums


def share_routed_home(rows_ED, x_ETD):
    chosen_ET = (x_ETD.double() @ rows_ED.t()).argmax(-1)
    return (chosen_ET == torch.arange(E)[:, None]).double().mean().item()


def test_ridge_routes_separable_clusters_to_their_experts():
    sums = summed(clusters(1.0))
    rows_ED, _ = ridge_rows(sums.mean_ED, sums.moment_DD, lam=1e-4, row_norm=10.0)
    assert share_routed_home(rows_ED, clusters(1.0, seed=1)) > 0.99  # tokens that were not summed


def test_ridge_without_separation_routes_by_chance():
    sums = summed(clusters(0.0))
    rows_ED, _ = ridge_rows(sums.mean_ED, sums.moment_DD, lam=1e-4, row_norm=10.0)
    assert share_routed_home(rows_ED, clusters(0.0, seed=1)) < 0.35


@pytest.mark.parametrize("parts", [2, 7, 600])
def test_sums_of_parts_solve_to_the_rows_of_the_whole(parts):
    x_ETD = clusters(1.0)
    whole, streamed = summed(x_ETD), summed(x_ETD, parts)
    expected, _ = ridge_rows(whole.mean_ED, whole.moment_DD, lam=0.01, row_norm=1.0)
    actual, _ = ridge_rows(streamed.mean_ED, streamed.moment_DD, lam=0.01, row_norm=1.0)
    assert_equal_up_to_rounding("ridge", actual, expected)
    assert_equal_up_to_rounding(
        "centroid", centroid_rows(streamed.mean_ED, 1.0), centroid_rows(whole.mean_ED, 1.0)
    )


def test_ridge_is_the_weighted_least_squares_solution():
    """Single shot: the normal equations of stacked inputs, one-hot targets and a penalty as extra rows."""
    lengths, lam = (40, 90, 20, 60), 0.3
    x_ETD = clusters(1.0).double()
    x = [x_ETD[e, :length] for e, length in enumerate(lengths)]
    sums = InputSums(E, D, second_moment=True, device=torch.device("cpu"))
    for expert, x_TD in enumerate(x):
        sums.add(expert, x_TD, len(x_TD))
    weight_T = torch.cat([torch.full((length,), length**-0.5, dtype=torch.float64) for length in lengths])
    target_TE = torch.eye(E).double().repeat_interleave(torch.tensor(lengths), 0)
    stacked_TD = torch.cat(x) * weight_T[:, None]
    penalty = (lam * stacked_TD.square().sum() / D).sqrt() * torch.eye(D).double()
    targets = torch.cat([target_TE * weight_T[:, None], torch.zeros(D, E)])
    expected_DE = torch.linalg.lstsq(torch.cat([stacked_TD, penalty]), targets).solution
    actual, condition = ridge_rows(sums.mean_ED, sums.moment_DD, lam=lam, row_norm=2.0)
    expected = 2.0 * torch.nn.functional.normalize(expected_DE.t(), dim=1)
    assert_equal_up_to_rounding("ridge", actual, expected)
    whole = torch.cat([stacked_TD, penalty])
    assert condition == pytest.approx(torch.linalg.cond(whole.t() @ whole, 1).item(), rel=1e-6)


def test_centroids_point_from_the_mean_of_all_to_each_text():
    x_ETD = clusters(1.0).double()
    rows_ED = centroid_rows(summed(x_ETD).mean_ED, 3.0)
    away_ED = x_ETD.mean(1) - x_ETD.mean((0, 1))
    assert_equal_up_to_rounding("centroid", rows_ED, 3.0 * away_ED / away_ED.norm(dim=1, keepdim=True))


def test_equal_texts_give_no_direction():
    x_ETD = clusters(1.0)[:1].expand(E, -1, -1)
    with pytest.raises(ValueError, match="the experts' texts must differ: the mean router input"):
        centroid_rows(summed(x_ETD, parts=3).mean_ED, 1.0)
