"""Hooks see what routers will read, in every dense family, and are gone afterwards."""

import pytest
import torch
import transformers
from dense_models import SIZES, TRAITS
from tiny_models import MOE, tiny_model, tokens

from upcycle.routers.inputs import input_modules, watch

ROUTERS = [f"model.layers.{layer}.{kind}.router" for layer in range(3) for kind in ("mlp", "self_attn")]


def inputs_of(model, routers, input_ids):
    seen = {}
    with watch(input_modules(model, routers), seen.__setitem__), torch.no_grad():
        model.base_model(input_ids=input_ids, use_cache=False)
    return seen


@pytest.mark.parametrize("family", TRAITS)
def test_routers_read_what_the_norm_before_their_block_gives(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.capitalize()}Config")(**{**SIZES, **TRAITS[family]})
    model = getattr(transformers, f"{family.capitalize()}ForCausalLM")(config).eval()
    normed = {}

    def keep(name):
        return lambda module, args, output: normed.__setitem__(name, output.flatten(0, 1))

    for number, layer in enumerate(model.model.layers):
        second = layer.input_layernorm if family == "cohere" else layer.post_attention_layernorm
        layer.input_layernorm.register_forward_hook(keep(f"model.layers.{number}.self_attn.router"))
        second.register_forward_hook(keep(f"model.layers.{number}.mlp.router"))
        if family == "cohere":  # one norm, read by both blocks
            layer.input_layernorm.register_forward_hook(keep(f"model.layers.{number}.self_attn.router"))
    seen = inputs_of(model, ROUTERS, torch.arange(12)[None])
    assert seen.keys() == set(ROUTERS)
    for name, x_TD in seen.items():
        assert torch.equal(x_TD, normed[name]), name


def test_the_input_of_a_dense_block_is_that_of_the_router_that_takes_its_place():
    """In a model of this project, whose routers can be hooked themselves."""
    model = tiny_model(MOE)
    router = model.model.layers[1].mlp.router
    direct = {}
    with watch({"router": router}, direct.__setitem__):
        seen = inputs_of(model, ["model.layers.1.mlp.router"], tokens(1, 9))
    assert torch.equal(seen["model.layers.1.mlp.router"], direct["router"])


def test_no_hook_stays():
    model = tiny_model()
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), watch(dict(model.named_modules()), lambda *_: None):
        raise RuntimeError("stop")
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before


def test_a_model_without_such_a_block_is_refused():
    with pytest.raises(ValueError, match=r"block that model\.layers\.7\.mlp\.router stands before, and"):
        input_modules(tiny_model(), ["model.layers.7.mlp.router"])
