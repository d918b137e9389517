"""Feed-forward layers: the sum of experts, equal experts, shared experts, residuals, padding, autocast."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import assert_equal_up_to_rounding, assert_same_function, randn
from torch import Tensor

from moe_runtime.config import FeedForwardConfig, RouterConfig
from moe_runtime.feed_forward import DenseFeedForward, MoEFeedForward

B, L, D, F, E = 2, 11, 12, 18, 5


def config(experts_per_token=2, gate="renorm", **options) -> FeedForwardConfig:
    router = RouterConfig(hidden_size=D, num_experts=E, experts_per_token=experts_per_token, gate=gate)
    return FeedForwardConfig(**({"hidden_size": D, "intermediate_size": F, "router": router} | options))


def moe(**options) -> MoEFeedForward:
    torch.manual_seed(0)
    made = MoEFeedForward(config(**options))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def expert_as_dense(layer: MoEFeedForward, e: int) -> Callable[[Tensor], Tensor]:
    """One expert as a dense layer that shares its weights with the stack; a callable."""
    c = layer.config
    dense = DenseFeedForward(
        FeedForwardConfig(
            hidden_size=D, intermediate_size=F, activation=c.activation, gated=c.gated, bias=c.bias
        )
    )
    experts = layer.experts
    parts = {"down_proj.weight": experts.down_proj[e], "up_proj.weight": experts.gate_up_proj[e, -F:]}
    if c.gated:
        parts["gate_proj.weight"] = experts.gate_up_proj[e, :F]
    if c.bias:
        parts |= {"down_proj.bias": experts.down_bias[e], "up_proj.bias": experts.gate_up_bias[e, -F:]}
        if c.gated:
            parts["gate_proj.bias"] = experts.gate_up_bias[e, :F]
    return lambda x: torch.func.functional_call(dense, parts, (x,))


def sum_of_experts(layer: MoEFeedForward, x_BLD):
    """The definition: Σ over the chosen experts of gate · FFN."""
    routing = layer.router(x_BLD.flatten(0, -2))
    y_TD = 0
    for e in range(E):
        gate_T1 = ((routing.expert_TK == e) * routing.weight_TK).sum(1, keepdim=True)
        y_TD = y_TD + gate_T1.to(x_BLD.dtype) * expert_as_dense(layer, e)(x_BLD.flatten(0, -2))
    return y_TD.view(x_BLD.shape)


def make_experts_equal(layer: MoEFeedForward) -> None:
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (False, "gelu_tanh")])
def test_equals_the_gated_sum_of_its_experts(gated, activation, bias):
    layer = moe(gated=gated, activation=activation, bias=bias)
    assert_same_function(lambda m, x: m(x)[0], sum_of_experts, layer, randn(B, L, D))


@pytest.mark.parametrize(
    ("experts_per_token", "gate"), [(2, "renorm"), (3, "renorm"), (E, "renorm"), (1, "straight_through")]
)
def test_equal_experts_are_the_dense_layer(experts_per_token, gate):
    layer, x_BLD = moe(experts_per_token=experts_per_token, gate=gate).eval(), randn(B, L, D)
    make_experts_equal(layer)
    with torch.no_grad():
        assert_equal_up_to_rounding("y", layer(x_BLD)[0], expert_as_dense(layer, 0)(x_BLD))


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_equal_experts_with_raw_gates_scale_the_dense_layer(experts_per_token):
    layer, x_BLD = moe(experts_per_token=experts_per_token, gate="raw").eval(), randn(B, L, D)
    make_experts_equal(layer)

    def scaled(layer, x_BLD):
        score_BLE = layer.router(x_BLD.flatten(0, 1)).logits_TE.softmax(-1).view(B, L, E)
        kept_BL1 = score_BLE.topk(experts_per_token).values.sum(-1, keepdim=True)
        return kept_BL1 * expert_as_dense(layer, 0)(x_BLD)

    with torch.no_grad():
        assert_equal_up_to_rounding("y", layer(x_BLD)[0], scaled(layer, x_BLD))


@pytest.mark.parametrize("shared_gate", [False, True], ids=["plain", "sigmoid-gate"])
def test_shared_expert_is_added(shared_gate):
    layer = moe(shared_intermediate_size=7, shared_gate=shared_gate)

    def reference(layer, x_BLD):
        shared = layer.shared_expert(x_BLD)
        if shared_gate:
            shared = shared * (x_BLD @ layer.shared_expert_gate.weight.T).sigmoid()
        return sum_of_experts(layer, x_BLD) + shared

    assert_same_function(lambda m, x: m(x)[0], reference, layer, randn(B, L, D))


@pytest.mark.parametrize("shared", [0, 7], ids=["routed-only", "shared-expert"])
def test_residual_is_added_once(shared):
    layer, x_BLD, residual_BLD = (
        moe(shared_intermediate_size=shared),
        randn(B, L, D),
        randn(B, L, D, seed=3),
    )
    torch.testing.assert_close(layer(x_BLD, residual_BLD)[0], layer(x_BLD)[0] + residual_BLD)
    dense = DenseFeedForward(FeedForwardConfig(hidden_size=D, intermediate_size=F))
    torch.testing.assert_close(dense(x_BLD, residual_BLD), dense(x_BLD) + residual_BLD)


def test_leading_axes_do_not_matter():
    layer, x_BLD = moe(), randn(B, L, D)
    torch.testing.assert_close(layer(x_BLD.flatten(0, 1))[0].view(B, L, D), layer(x_BLD)[0])


def test_padding_counts_in_no_statistic():
    layer, x_BLD = moe(), randn(B, L, D)
    token_mask_BL = torch.ones(B, L, dtype=torch.bool)
    token_mask_BL[0, :4] = False
    routing = layer(x_BLD, token_mask=token_mask_BL)[1]
    alone = layer(x_BLD[token_mask_BL])[1]
    assert torch.equal(routing.count_E, alone.count_E)
    assert routing.balance_loss.item() == pytest.approx(alone.balance_loss.item(), rel=1e-5)


def test_expert_dropout_spares_the_shared_expert_and_evaluation():
    layer, x_BLD = moe(expert_dropout=0.5, shared_intermediate_size=7), randn(B, L, D)
    assert torch.equal(layer.eval()(x_BLD)[0], layer.eval()(x_BLD)[0])
    with torch.no_grad():
        layer.experts.down_proj.zero_()  # what is left is the shared expert
    torch.testing.assert_close(layer.train()(x_BLD)[0], layer.shared_expert(x_BLD))
    layer = moe(expert_dropout=0.5)
    assert (layer.train()(x_BLD)[0] - layer.eval()(x_BLD)[0]).abs().max() > 0.1


def test_bfloat16_autocast_keeps_the_residual_stream_in_float32():
    layer, x_BLD, residual_BLD = moe(), randn(B, L, D), randn(B, L, D, seed=3)
    plain = layer(x_BLD, residual_BLD)[0]
    with torch.autocast("cpu"):
        y_BLD, routing = layer(x_BLD, residual_BLD)
    assert y_BLD.dtype == routing.weight_TK.dtype == torch.float32
    error = (y_BLD - plain).abs().max() / plain.abs().max()
    assert 0 < error < 2e-2  # bfloat16 was used, and only its rounding separates the two
    (y_BLD * randn(B, L, D, seed=9)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_layer_without_a_router_is_refused():
    with pytest.raises(ValueError, match="router must be a RouterConfig for a Mixture of Experts, got None"):
        MoEFeedForward(FeedForwardConfig(hidden_size=D, intermediate_size=F))
