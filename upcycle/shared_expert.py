"""Shared-expert upcycling: the dense feed-forward stays, for every token, and routed experts are added to it.

    y = FFN(x) + sum over chosen e of gate_e · FFN_e(x)

A routed expert has `expert_width` of the dense feed-forward's hidden units, chosen at random, and a down
projection of zeros, so that the output computes what the dense model computes and the experts learn from the
first step. With `residual_scale` the down projection has these units' columns times that number instead.
"""

from dataclasses import replace

from moe_runtime.config import ModelConfig
from upcycle.errors import RecipeError
from upcycle.layout import Layout, expert_label, hidden_units
from upcycle.recipe import Recipe
from upcycle.tasks import Band, Scale, Shuffled


def describe(recipe: Recipe, model: ModelConfig) -> ModelConfig:
    assert recipe.shared_expert is not None
    width, F = recipe.shared_expert.expert_width, model.intermediate_size
    if width > F:
        raise RecipeError(
            f"shared_expert.expert_width must be at most the width of the dense feed-forward ({F}), whose "
            f"hidden units the experts start from, got {width}"
        )
    return replace(model, moe_intermediate_size=width, shared_expert_intermediate_size=F)


def expert_bands(layout: Layout, number: int, expert: int, tensor: str) -> tuple[Band, ...]:
    recipe = layout.recipe.shared_expert
    assert recipe is not None
    of_down = tensor.startswith("down_proj")
    if of_down and recipe.residual_scale == 0:
        return ()
    changes = (Scale(recipe.residual_scale),) if of_down else ()
    label = expert_label(number, expert, "units")
    units = Shuffled(layout.dense.intermediate_size, 0, recipe.expert_width, recipe.seed, label)
    return (hidden_units(layout, number, expert, tensor, units, changes),)
