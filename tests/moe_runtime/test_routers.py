"""Routers: gates, gradients, float32 arithmetic, the selection bias, padding."""

import pytest
import torch
from tiny_models import randn

from moe_runtime.config import FeedForwardConfig, ModelConfig, RouterConfig
from moe_runtime.feed_forward import MoEFeedForward
from moe_runtime.losses import load_balancing_loss, z_loss
from moe_runtime.routers import INITIAL_STD, ExpertChoiceRouter, SoftRouter, TopKRouter, TopKSoftRouter

D, E, T = 16, 6, 29


def router(**options) -> TopKRouter:
    torch.manual_seed(0)
    made = TopKRouter(
        RouterConfig(**({"hidden_size": D, "num_experts": E, "experts_per_token": 2} | options))
    )
    torch.nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("gate", ["raw", "renorm"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gates_are_the_chosen_scores(score, gate):
    layer, x_TD = router(score=score, gate=gate, scale=1.5), randn(T, D)
    routing = layer(x_TD)
    score_TE = routing.logits_TE.softmax(-1) if score == "softmax" else routing.logits_TE.sigmoid()
    weight_TK, expert_TK = score_TE.topk(2)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True) if gate == "renorm" else weight_TK
    torch.testing.assert_close(routing.logits_TE, x_TD @ layer.weight.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.weight_TK, 1.5 * weight_TK, rtol=1e-6, atol=1e-7)
    assert (routing.expert_TK == expert_TK).all()
    assert (routing.count_E == torch.bincount(expert_TK.flatten(), minlength=E)).all()


def test_renorm_equals_a_softmax_over_the_chosen_logits():
    routing = router()(randn(T, D))
    chosen_TK = routing.logits_TE.gather(1, routing.expert_TK.long())
    torch.testing.assert_close(routing.weight_TK, chosen_TK.softmax(-1))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_arithmetic_is_float32_in_a_bfloat16_model(autocast):
    layer, x_TD = router().bfloat16(), randn(T, D, dtype=torch.bfloat16)
    with torch.autocast("cpu", enabled=autocast):
        routing = layer(x_TD)
    exact_TE = x_TD.double() @ layer.weight.double().T
    assert routing.logits_TE.dtype == routing.weight_TK.dtype == torch.float32
    assert (routing.logits_TE - exact_TE).abs().max() < 1e-5  # bfloat16 would be off by 1e-2


def test_float32_model_keeps_float32_under_autocast():
    layer, x_TD = router(), randn(T, D)
    with torch.autocast("cpu"):
        under = layer(x_TD)
    assert torch.equal(under.logits_TE, layer(x_TD).logits_TE)


class TestConstantGate:
    """renorm with one expert per token is always 1, so the loss would never train the router."""

    def test_training_raises(self):
        with pytest.raises(
            ValueError, match=r"gate must not be 'renorm' with experts_per_token = 1 in training"
        ):
            router(experts_per_token=1).train()(randn(T, D))

    def test_everything_but_training_is_allowed(self):
        layer, x_TD = router(experts_per_token=1), randn(T, D)
        assert (layer.eval()(x_TD).weight_TK == 1).all()
        with torch.no_grad():
            layer.train()(x_TD)
        layer.weight.requires_grad_(False)
        layer.train()(x_TD)

    def test_auxiliary_losses_alone_may_be_asked_for(self):
        layer = router(experts_per_token=1, aux_only=True).train()
        layer(randn(T, D)).balance_loss.backward()
        assert layer.weight.grad.abs().max() > 0

    @pytest.mark.parametrize("gate", ["raw", "straight_through"])
    def test_other_gates_train_the_router(self, gate):
        layer = router(experts_per_token=1, gate=gate).train()
        routing = layer(randn(T, D))
        (routing.weight_TK * randn(T, 1, seed=1)).sum().backward()
        assert layer.weight.grad.abs().max() > 0
        assert (routing.weight_TK == 1).all() == (gate == "straight_through")

    def test_straight_through_has_the_gradient_of_the_raw_gate(self):
        grads = []
        for gate in ("raw", "straight_through"):
            layer = router(experts_per_token=1, gate=gate).train()
            (layer(randn(T, D)).weight_TK * randn(T, 1, seed=1)).sum().backward()
            grads.append(layer.weight.grad)
        torch.testing.assert_close(*grads)


class TestSelectionBias:
    def test_moves_the_choice_and_not_the_gate(self):
        layer, x_TD = router(selection_bias=True, gate="raw"), randn(T, D)
        layer.selection_bias[4] = 10.0
        routing = layer(x_TD)
        assert routing.count_E[4] == T
        score_TE = routing.logits_TE.softmax(-1)
        torch.testing.assert_close(routing.weight_TK, score_TE.gather(1, routing.expert_TK.long()))

    def test_update_moves_towards_the_mean_load(self):
        layer = router(selection_bias=True)
        layer.update_selection_bias(torch.tensor([9, 3, 6, 6, 0, 12], dtype=torch.int32), gamma=0.5)
        assert layer.selection_bias.tolist() == [-0.5, 0.5, 0.0, 0.0, 0.5, -0.5]

    def test_repeated_updates_balance_the_load(self):
        layer, x_TD = router(selection_bias=True, score="sigmoid"), randn(600, D)
        before = layer(x_TD).count_E
        for _ in range(300):
            layer.update_selection_bias(layer(x_TD).count_E, gamma=5e-3)
        after = layer(x_TD).count_E
        assert (after.max() - after.min()) * 5 < before.max() - before.min()

    def test_is_saved_and_has_no_gradient(self):
        layer = router(selection_bias=True)
        assert set(layer.state_dict()) == {"weight", "selection_bias"}
        assert [name for name, _ in layer.named_parameters()] == ["weight"]
        assert set(router().state_dict()) == {"weight"}

    def test_update_without_a_bias_raises(self):
        with pytest.raises(ValueError, match="selection_bias must be True in the RouterConfig to be updated"):
            router().update_selection_bias(torch.ones(E))


def test_padding_is_routed_but_counts_nowhere():
    layer, x_TD, mask_T = router(), randn(T, D), torch.arange(T) % 3 > 0
    routing = layer(x_TD, mask_T)
    assert routing.weight_TK.shape == (T, 2)
    assert routing.count_E.sum() == 2 * mask_T.sum()
    kept_TE = routing.logits_TE[mask_T]
    balance = load_balancing_loss(kept_TE.softmax(-1), routing.count_E, 2)
    assert routing.balance_loss.item() == pytest.approx(balance.item(), rel=1e-5)
    assert routing.z_loss.item() == pytest.approx(z_loss(kept_TE).item(), rel=1e-5)


def test_groups_limit_the_choice():
    routing = router(num_groups=3, groups_kept=1)(randn(T, D))
    assert (routing.expert_TK[:, 0] // 2 == routing.expert_TK[:, 1] // 2).all()


class TestBalanceOverSequences:
    def test_is_the_mean_over_the_sequences_of_a_layer(self):
        x_BLD = randn(3, 9, D)
        layers = [
            MoEFeedForward(
                FeedForwardConfig(hidden_size=D, intermediate_size=4, router=router(balance_over=over).config)
            )
            for over in ("batch", "sequence")
        ]
        layers[1].load_state_dict(layers[0].state_dict())
        batch, sequence = (layer(x_BLD)[1] for layer in layers)
        alone = [layers[0](x_D[None])[1].balance_loss.item() for x_D in x_BLD]
        assert sequence.balance_loss.item() == pytest.approx(sum(alone) / 3, rel=1e-5)
        assert abs(batch.balance_loss - sequence.balance_loss) > 1e-3
        assert torch.equal(batch.count_E, sequence.count_E)
        flat = layers[1](x_BLD[0])[1].balance_loss  # no axis of sequences: one
        assert flat.item() == pytest.approx(alone[0], rel=1e-5)

    def test_is_a_field_of_the_model(self):
        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
        experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
        config = ModelConfig(**sizes, **heads, **experts, router_balance_over="sequence")
        assert config.router_config().balance_over == "sequence"

    def test_of_something_else_raises(self):
        with pytest.raises(ValueError, match="balance_over must be one of 'batch', 'sequence', got 'token'"):
            router(balance_over="token")


class TestExpertChoice:
    def test_all_loads_are_the_capacity(self):
        layer = ExpertChoiceRouter(D, E, capacity_factor=1.5, causal=False)
        routing = layer(randn(T, D))
        assert routing.count_E.tolist() == [8] * E  # 1.5 * 29 / 6, rounded up
        assert routing.weight_TK.shape == routing.expert_TK.shape == (T, E)
        assert routing.z_loss.item() == pytest.approx(z_loss(routing.logits_TE).item())
        assert routing.balance_loss == 1

    def test_serves_a_layer(self):
        config = FeedForwardConfig(hidden_size=D, intermediate_size=4, router=router().config)
        layer, x_BLD = MoEFeedForward(config), randn(2, 9, D)
        layer.router = ExpertChoiceRouter(D, E, causal=False)
        mask_BL = torch.ones(2, 9, dtype=torch.bool)
        mask_BL[0, :3] = False
        y_BLD, routing = layer(x_BLD, token_mask=mask_BL)
        assert not y_BLD[0, :3].any()  # padding is taken by no expert
        assert routing.count_E.tolist() == [6] * E
        y_BLD.square().sum().backward()
        assert layer.router.weight.grad.abs().max() > 0

    def test_is_refused_in_a_causal_model(self):
        with pytest.raises(ValueError, match="allow_future_leak must be True in a causal model, got False"):
            ExpertChoiceRouter(D, E)
        ExpertChoiceRouter(D, E, allow_future_leak=True)

    @pytest.mark.parametrize("factor", [0.0, 6.5])
    def test_impossible_capacity_raises(self, factor):
        with pytest.raises(
            ValueError, match=rf"capacity_factor must be above 0 and at most num_experts \(6\), got {factor}"
        ):
            ExpertChoiceRouter(D, E, capacity_factor=factor, causal=False)


def test_weights_are_never_zero_at_first():
    for layer in (
        ExpertChoiceRouter(256, 64, causal=False),
        TopKRouter(RouterConfig(hidden_size=256, num_experts=64, experts_per_token=2)),
        SoftRouter(256, 64),
        TopKSoftRouter(256, 64, top_k=2),
    ):
        assert layer.weight.std().item() == pytest.approx(INITIAL_STD, rel=0.05)


class TestSoftRouter:
    def test_all_experts_share_a_softmax(self):
        layer, x_TD = SoftRouter(D, E).bfloat16(), randn(T, D, dtype=torch.bfloat16)
        gate_TA = layer(x_TD)
        assert gate_TA.dtype == torch.float32
        exact_TA = (x_TD.double() @ layer.weight.double().T).softmax(-1)
        assert (gate_TA - exact_TA).abs().max() < 1e-6


class TestTopKSoftRouter:
    @pytest.mark.parametrize("renormalise", [False, True])
    def test_gates_are_the_largest_of_a_softmax(self, renormalise):
        layer, x_TD = TopKSoftRouter(D, E, top_k=2, renormalise=renormalise), randn(T, D)
        weight_TK, expert_TK = layer(x_TD)
        value_TK, index_TK = (x_TD @ layer.weight.T).softmax(-1).topk(2)
        value_TK = value_TK / value_TK.sum(-1, keepdim=True) if renormalise else value_TK
        torch.testing.assert_close(weight_TK, value_TK)
        assert torch.equal(expert_TK, index_TK.int())

    def test_gates_are_float32_in_every_model(self):
        layer, x_TD = TopKSoftRouter(D, E, top_k=2).bfloat16(), randn(T, D, dtype=torch.bfloat16)
        weight_TK, expert_TK = layer(x_TD)
        assert (weight_TK.dtype, expert_TK.dtype) == (torch.float32, torch.int32)
        exact_TE = (x_TD.double() @ layer.weight.double().T).softmax(-1)
        assert (weight_TK - exact_TE.gather(1, expert_TK.long())).abs().max() < 1e-6

    def test_ties_go_to_the_lowest_expert(self):
        layer = TopKSoftRouter(D, 40, top_k=2)  # so many that an unstable sort would mix them up
        torch.nn.init.zeros_(layer.weight)
        assert layer(randn(T, D))[1].tolist() == [[0, 1]] * T

    def test_constant_gate_raises_in_training(self):
        layer = TopKSoftRouter(D, E, top_k=1, renormalise=True)
        with pytest.raises(ValueError, match="renormalise must be False with top_k = 1 in training"):
            layer.train()(randn(T, D))
        assert (layer.eval()(randn(T, D))[0] == 1).all()

    @pytest.mark.parametrize("top_k", [0, E + 1])
    def test_impossible_top_k_raises(self, top_k):
        with pytest.raises(
            ValueError, match=rf"top_k must be between 1 and num_experts \({E}\), got {top_k}"
        ):
            TopKSoftRouter(D, E, top_k=top_k)
