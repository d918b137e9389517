"""Router rows from sums of router inputs: centroids, and ridge regression in closed form."""

import torch
from torch import Tensor


def centroid_rows(mean_ED: Tensor, row_norm: float) -> Tensor:
    """w_e = row_norm · c_e / |c_e| with c_e the mean of expert e's inputs minus the mean over all experts.

    Raises:
        ValueError: the mean of an expert is that of all, so that its row has no direction.
    """
    return _rows_of_length(centred(mean_ED), row_norm, mean_ED)


def centred(mean_ED: Tensor) -> Tensor:
    """c_e, the mean of expert e's inputs minus the mean over all experts."""
    return mean_ED - mean_ED.mean(0)


def ridge_rows(mean_ED: Tensor, moment_DD: Tensor, *, lam: float, row_norm: float) -> tuple[Tensor, float]:
    """w_e = row_norm · v_e / |v_e| with v_e the solution of (M + lam · tr(M)/D · 1) v_e = mean_e.

    That is the regression from a router's input to which expert's text it is from, every text weighing the
    same; M is the second moment of the inputs over all texts. `lam` is in units of the mean square of an
    input, so that neither the number of tokens nor the scale of the inputs changes what it does. With
    row_norm = 1/temperature it is the closed form of DUME, whose `lam` is absolute.

    Returns:
        The rows, and the condition number (1-norm) of what was solved.

    Raises:
        ValueError: a row has no direction, because an expert's mean input is zero.
    """
    D = len(moment_DD)
    shifted_DD = moment_DD + lam * moment_DD.trace() / D * torch.eye(D).to(moment_DD)
    solution_DE = torch.cholesky_solve(mean_ED.t(), torch.linalg.cholesky(shifted_DD))
    condition = float(torch.linalg.cond(shifted_DD, 1))
    return _rows_of_length(solution_DE.t(), row_norm, solution_DE.t()), condition


def _rows_of_length(rows_ED: Tensor, length: float, compared_with_ED: Tensor) -> Tensor:
    norm_E1 = rows_ED.norm(dim=1, keepdim=True)
    # float64 sums of equal inputs differ by rounding
    is_zero = bool((norm_E1 <= 1e-10 * compared_with_ED.norm()).any())
    if is_zero:
        raise ValueError("the experts' texts must differ: the mean router input of one is that of all")
    return length * rows_ED / norm_E1
