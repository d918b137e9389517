"""A decoded token goes through its experts without a plan, and comes out the same."""

import pytest
import torch
from inputs import normal
from tiny_models import MOE, VOCAB_SIZE, tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, set_seed

from moe_runtime import experts as layers
from moe_runtime.config import FeedForwardConfig, RouterConfig
from moe_runtime.hf import experts_interface
from moe_runtime.hf.accelerate import accelerate_model

# rows of whole 64 bytes and matrices that are not tiny, whose products give the same bits in any batch
ALIGNED = {"hidden_size": 64, "moe_intermediate_size": 64}
IDS = torch.randint(3, VOCAB_SIZE, (1, 7), generator=torch.Generator().manual_seed(1))


def of_this_project(dtype):
    return tiny_model(MOE, **ALIGNED).to(dtype), layers


def of_transformers(dtype):
    set_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        initializer_range=0.2,
    )
    model = MixtralForCausalLM(config).to(dtype).eval()
    accelerate_model(model)
    return model, experts_interface


@torch.no_grad()
def decoded(model):
    cache = model(IDS[:, :-1], use_cache=True).past_key_values
    return model(IDS[:, -1:], past_key_values=cache).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [of_this_project, of_transformers])
def test_decoding_makes_no_plan_and_changes_no_bit(monkeypatch, make, dtype):
    model, module = make(dtype)
    planned = []
    make_plan, one_token_ffn = module.make_plan, module.one_token_ffn
    monkeypatch.setattr(module, "make_plan", lambda *a: (planned.append(len(a[0])), make_plan(*a))[1])
    actual = decoded(model)
    assert planned == [6, 6]
    monkeypatch.setattr(module, "one_token_ffn", lambda *a, **options: None)
    expected = decoded(model)
    assert planned == [6, 6, 6, 6, 1, 1]
    assert torch.equal(actual, expected)
    assert one_token_ffn is not module.one_token_ffn


class Adapter(nn.Module):
    def forward(self, x_TD, *operands, **options):
        return x_TD + 1


def test_what_changes_the_experts_is_not_left_out():
    """Dropout and an adapter of the experts, for one token too."""
    router = RouterConfig(hidden_size=16, num_experts=4, experts_per_token=2)
    config = FeedForwardConfig(hidden_size=16, intermediate_size=32, router=router, expert_dropout=0.5)
    layer = layers.Experts(config)
    operands = (normal(1, 16).cpu(), torch.tensor([[3, 1]], dtype=torch.int32), torch.ones(1, 2))
    with torch.no_grad():
        dropped = [layer.train()(*operands) for _ in range(2)]
        assert not torch.equal(*dropped)
        assert torch.equal(layer.eval()(*operands), layer(*operands))
        layer.config = FeedForwardConfig(hidden_size=16, intermediate_size=32, router=router)
        layer.expert_lora = Adapter()
        assert torch.equal(layer(*operands), operands[0] + 1)
