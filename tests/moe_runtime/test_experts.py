"""Experts: the stacked layer equals its experts one by one; dropout falls where it should."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import assert_same_function, perturb, randn

from moe_runtime.config import FeedForwardConfig, RouterConfig
from moe_runtime.experts import ACTIVATIONS, Experts, activate

T, E, K, D, F_ = 23, 5, 2, 12, 9


def experts(**options) -> Experts:
    torch.manual_seed(0)
    made = Experts(
        FeedForwardConfig(
            hidden_size=D,
            intermediate_size=F_,
            router=RouterConfig(hidden_size=D, num_experts=E, experts_per_token=K),
            **options,
        )
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def routing(dtype=torch.float32):
    """Expert 3 gets no token."""
    pairs = [pair for pair in itertools.combinations(range(E), K) if 3 not in pair]
    expert_TK = torch.tensor([pairs[t % len(pairs)] for t in range(T)], dtype=torch.int32)
    return expert_TK, randn(T, K, seed=1, dtype=dtype).sigmoid()


def one_by_one(layer: Experts, x_TD):
    expert_TK, weight_TK = routing(torch.promote_types(x_TD.dtype, torch.float32))
    config, y_TD = layer.config, torch.zeros_like(x_TD)
    biases = (layer.gate_up_bias, layer.down_bias) if config.bias else (torch.zeros(E, 1), torch.zeros(E, 1))
    stacks = (layer.gate_up_proj, layer.down_proj, *(bias.to(x_TD.dtype) for bias in biases))
    for e, (gate_up, down, gate_up_bias, down_bias) in enumerate(
        zip(*map(torch.unbind, stacks), strict=True)
    ):
        hidden = activate(x_TD @ gate_up.T + gate_up_bias, config.activation, config.gated)
        gate_T1 = ((expert_TK == e) * weight_TK).sum(1, keepdim=True)
        y_TD = y_TD + gate_T1.to(x_TD.dtype) * (hidden @ down.T + down_bias)
    return y_TD


def fused(layer: Experts, x_TD):
    expert_TK, weight_TK = routing(torch.promote_types(x_TD.dtype, torch.float32))
    return layer(x_TD, expert_TK, weight_TK)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (False, "gelu"), (False, "relu2")])
def test_equals_its_experts_one_by_one(gated, activation, bias):
    layer = experts(gated=gated, activation=activation, bias=bias)
    assert_same_function(fused, one_by_one, layer, randn(T, D))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_layer_without_fusion_has_the_same_activations(activation, monkeypatch):
    layer = experts(activation=activation, expert_dropout=0.3)
    monkeypatch.setattr(F, "dropout", lambda x, p: x)

    def unfused(layer, x_TD):
        return fused(layer.train(), x_TD)

    def evaluated(layer, x_TD):
        return fused(layer.eval(), x_TD)

    assert_same_function(unfused, evaluated, layer, randn(T, D))


def test_residual_is_added_once():
    expert_TK, weight_TK = routing()
    layer, x_TD, residual_TD = experts(), randn(T, D), randn(T, D, seed=5)
    with_residual = layer(x_TD, expert_TK, weight_TK, residual_TD)
    torch.testing.assert_close(with_residual, layer(x_TD, expert_TK, weight_TK) + residual_TD)


def test_int64_choices_are_accepted():
    """transformers' and serving engines' routers return int64."""
    expert_TK, weight_TK = routing()
    layer, x_TD = experts(), randn(T, D)
    assert torch.equal(layer(x_TD, expert_TK.long(), weight_TK), layer(x_TD, expert_TK, weight_TK))


def test_dropout_zeroes_and_rescales_hidden_activations_only_in_training():
    layer = experts(gated=False, activation="relu", expert_dropout=0.25)
    eye = torch.eye(D)
    layer.gate_up_proj = torch.nn.Parameter(eye.expand(E, D, D).clone())
    layer.down_proj = torch.nn.Parameter(eye.expand(E, D, D).clone())
    x_TD = randn(400, D).abs() + 0.1  # with identity weights, the hidden activations are x and the output
    expert_TK = torch.arange(400)[:, None] % E
    weight_TK = torch.ones(400, 1)
    assert torch.equal(layer.eval()(x_TD, expert_TK, weight_TK), x_TD)
    torch.manual_seed(0)
    ratio_TD = layer.train()(x_TD, expert_TK, weight_TK) / x_TD
    dropped_TD = ratio_TD == 0
    assert dropped_TD.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(ratio_TD[~dropped_TD], torch.full_like(ratio_TD[~dropped_TD], 1 / 0.75))


def test_layer_without_a_router_is_refused():
    with pytest.raises(ValueError, match="router must be a RouterConfig"):
        Experts(FeedForwardConfig(hidden_size=D, intermediate_size=F_))


def test_perturb_reaches_biases():
    """Guards the tests of whole models, which rely on biases that are not zero."""
    layer = experts(bias=True)
    torch.nn.init.zeros_(layer.down_bias)
    perturb(layer)
    assert layer.down_bias.abs().min() > 0


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_recomputing_keeps_less_and_changes_no_bit(bias):
    kept, results = {}, {}
    for recompute in (False, True):
        layer, x_TD = experts(bias=bias, recompute_experts=recompute), randn(T, D).requires_grad_()
        parameters = {parameter.data_ptr() for parameter in layer.parameters()}
        saved = {}

        def pack(x, saved=saved):
            saved[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y_TD = fused(layer, x_TD)
        y_TD.backward(randn(T, D, seed=2))
        kept[recompute] = sum(size for place, size in saved.items() if place not in parameters)
        results[recompute] = [y_TD, x_TD.grad, *(parameter.grad for parameter in layer.parameters())]
    assert kept[False] - kept[True] == 4 * T * K * 2 * F_
    for with_h, without in zip(results[False], results[True], strict=True):
        assert torch.equal(with_h, without)
