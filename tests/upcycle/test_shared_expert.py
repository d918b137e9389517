"""A dense feed-forward that stays as the shared expert, and routed experts that add nothing at first."""

import pytest
import torch
from dense_models import tensors_of

from moe_runtime.hf.loading import load_causal_lm
from upcycle import UpcycleError, verify

MLP = "model.layers.1.mlp"


def shared(**values):
    return {"method": "shared_expert", "experts": 4, "shared_expert": {"expert_width": 16, **values}}


@pytest.mark.parametrize(
    ("target", "gate"), [("moe_runtime", "renorm"), ("moe_runtime", "raw"), ("qwen2_moe", "raw")]
)
def test_logits_equal_the_dense_models_whatever_the_gates(target, gate, dense, run):
    folder = run(base=dense("llama"), target=target, router={"gate": gate}, **shared())
    result = verify(folder)
    assert result.must_be_equal
    assert result.passed


def test_biases_stay_in_the_shared_expert(dense, run):
    folder = run(base=dense("phi"), **shared())
    assert verify(folder).passed
    assert not tensors_of(folder)[f"{MLP}.experts.down_bias"].any()
    assert tensors_of(folder)[f"{MLP}.shared_expert.down_proj.bias"].any()


def test_qwen2_moe_has_a_gate_of_one_half_that_a_doubled_down_projection_makes_up_for(dense, run):
    written = tensors_of(run(base=dense("qwen2"), target="qwen2_moe", **shared()))
    before = tensors_of(dense("qwen2"))
    assert not written[f"{MLP}.shared_expert_gate.weight"].any()
    for name, factor in (("gate", 1), ("up", 1), ("down", 2)):
        expected = factor * before[f"{MLP}.{name}_proj.weight"]
        assert torch.equal(written[f"{MLP}.shared_expert.{name}_proj.weight"], expected)


def test_routed_experts_start_from_hidden_units_of_their_own(dense, run):
    before = tensors_of(dense("llama"))
    quiet = tensors_of(run("quiet", base=dense("llama"), **shared()))
    loud_folder = run("loud", base=dense("llama"), **shared(residual_scale=0.5))
    loud = tensors_of(loud_folder)
    assert not quiet[f"{MLP}.experts.down_proj"].any()
    chosen = []
    for expert in range(4):
        gate, up = loud[f"{MLP}.experts.gate_up_proj"][expert].split(16)
        units = [(before[f"{MLP}.gate_proj.weight"] == row).all(1).nonzero().item() for row in gate]
        assert torch.equal(up, before[f"{MLP}.up_proj.weight"][units])
        assert torch.equal(
            loud[f"{MLP}.experts.down_proj"][expert], 0.5 * before[f"{MLP}.down_proj.weight"][:, units]
        )
        chosen.append(frozenset(units))
    assert len(set(chosen)) == 4
    assert all(len(units) == 16 for units in chosen)
    (reason,) = verify(loud_folder).not_equal_because
    assert reason.startswith("shared_expert.residual_scale lets the routed experts add")


def test_quiet_experts_learn_from_the_first_step(dense, run):
    model = load_causal_lm(run(base=dense("llama"), **shared())).train()
    tokens = torch.arange(12).view(1, -1)
    model(tokens, labels=tokens).loss.backward()
    assert all(layer.mlp.experts.down_proj.grad.any() for layer in model.model.layers)


@pytest.mark.parametrize(("family", "target"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_formats_without_a_shared_expert_are_refused(family, target, dense, run):
    nearest = {"mixtral": "qwen2_moe", "qwen3_moe": "moe_runtime"}[target]
    with pytest.raises(
        UpcycleError,
        match=f"shared_expert_intermediate_size would be 0 instead of 48; use target '{nearest}'",
    ):
        run(base=dense(family), target=target, **shared())


def test_experts_wider_than_the_dense_feed_forward_are_refused(dense, run):
    with pytest.raises(
        UpcycleError, match=r"shared_expert.expert_width must be at most the width .*48.*, got 49"
    ):
        run(base=dense("llama"), **shared(expert_width=49))
