"""What tokens are routed by in the tests of route_topk and of its kernels."""

import pytest
import torch
from inputs import DEVICE, normal

# T, E, K and the options; every score, gate, group score, scale, bias and mask occurs
CASES = [
    pytest.param(64, 8, 2, {}, id="mixtral"),
    pytest.param(37, 5, 3, {"gate": "raw"}, id="raw"),
    pytest.param(33, 7, 1, {"gate": "raw", "scale": 2.5, "masked": True}, id="switch-with-padding"),
    pytest.param(33, 4, 1, {"gate": "straight_through", "scale": 0.5}, id="straight-through"),
    pytest.param(33, 4, 1, {"gate": "straight_through", "score": "sigmoid"}, id="sigmoid-straight-through"),
    pytest.param(37, 6, 2, {"score": "sigmoid", "gate": "raw"}, id="sigmoid-raw"),
    pytest.param(
        41,
        12,
        3,
        {"score": "sigmoid", "scale": 2.5, "biased": True, "num_groups": 4, "groups_kept": 2, "masked": True},
        id="deepseek-v3",
    ),
    pytest.param(
        40,
        12,
        4,
        {"gate": "raw", "scale": 16.0, "num_groups": 3, "groups_kept": 1, "group_score": "max"},
        id="deepseek-v2",
    ),
    pytest.param(40, 8, 3, {"biased": True, "num_groups": 8, "groups_kept": 5}, id="groups-of-one-expert"),
    pytest.param(17, 4, 4, {}, id="every-expert-chosen"),
    pytest.param(9, 1, 1, {"gate": "raw", "score": "sigmoid"}, id="a-single-expert"),
    pytest.param(1, 6, 2, {}, id="one-token"),
    pytest.param(36, 7, 2, {"num_sequences": 4, "masked": True}, id="sequences-with-padding"),
    pytest.param(40, 6, 3, {"num_sequences": 5, "score": "sigmoid"}, id="sigmoid-sequences"),
]


def make_case(T, E, K, options, dtype=torch.float32, draw=0):
    options = dict(options)
    if options.pop("biased", False):
        options["bias_E"] = normal(E, seed=100, scale=0.2)
    if options.pop("masked", False):
        options["token_mask_T"] = (torch.arange(T) % 3 != 1).to(DEVICE)
    return normal(T, E, dtype=dtype, seed=draw), options


def joined(weight, expert, count, balance, z):
    """One tensor of all that has a gradient."""
    return torch.cat([weight.flatten(), balance[None], z[None]])
