"""Hooks see what routers will read, in every dense family, and are gone afterwards."""

import pytest
import torch
from dense_models import TRAITS, dense_model
from tiny_models import MOE, assert_equal_up_to_rounding, tiny_model, tokens

from moe_runtime.hf.loading import load_causal_lm
from upcycle.routers.inputs import input_modules, watch

BLOCKS = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("mlp", "self_attn")]
ROUTERS = [f"{block}.router" for block in BLOCKS]


def inputs_of(model, modules, input_ids):
    seen = {}
    with watch(modules, seen.__setitem__), torch.no_grad():
        model.base_model(input_ids=input_ids, use_cache=False)
    return seen


@pytest.mark.parametrize("family", TRAITS)
def test_what_a_dense_block_reads_is_what_the_mixture_in_its_place_reads(family, dense, run):
    """A copy computes what its source computes, so that its routers must read what was read in the source."""
    mixture = load_causal_lm(run(method="copy", base=dense(family), experts=2))
    model, input_ids = dense_model(family), torch.arange(3, 15)[None]
    expected = inputs_of(
        mixture, {f"{name}.router": mixture.get_submodule(name) for name in BLOCKS}, input_ids
    )
    seen = inputs_of(model, input_modules(model, ROUTERS), input_ids)
    assert seen.keys() == expected.keys() == set(ROUTERS)
    for name, x_TD in seen.items():
        # rounding of the layers before; the input of another block is off by 1e-1 and more
        assert_equal_up_to_rounding(name, x_TD, expected[name], 1e-3)


def test_the_input_of_a_dense_block_is_that_of_the_router_that_takes_its_place():
    """In a model of this project, whose routers can be hooked themselves."""
    model = tiny_model(MOE)
    router = model.model.layers[1].mlp.router
    direct = {}
    with watch({"router": router}, direct.__setitem__):
        seen = inputs_of(model, input_modules(model, ["model.layers.1.mlp.router"]), tokens(1, 9))
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
