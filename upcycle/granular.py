"""Granular upcycling with virtual groups: each copy of the dense feed-forward is cut into G narrow experts.

Expert i·G + s is shard s of copy i: hidden units s·F/G … (s + 1)·F/G - 1. The router has E/G random rows,
each G times, so that the G shards of a copy have one score and are chosen together: with K = m·G a token gets
every shard exactly m times. To add up to the dense output the shards are scaled by

    c = G            for gates that sum to 1
    c = E · G / K    for raw softmax gates, which are then 1/E on average

`exact` scales down by c; `cuberoot` scales gate, up and down by c^(1/3) each (without a gate, up and down by
c^(1/2)), which is only close to the dense function: silu and gelu do not scale with their input. `none`
leaves the shards as they are.

Source: He et al. 2024, whose scaling is `cuberoot`.
"""

from dataclasses import replace

from moe_runtime.config import ModelConfig
from upcycle import drop
from upcycle.errors import RecipeError
from upcycle.layout import Layout, feed_forward_name, hidden_units
from upcycle.recipe import Recipe
from upcycle.tasks import Band, Scale, Shuffled


def describe(recipe: Recipe, model: ModelConfig) -> ModelConfig:
    assert recipe.granular is not None
    shards, F = recipe.granular.shards, model.intermediate_size
    if F % shards:
        raise RecipeError(
            f"granular.shards must divide the width of the dense feed-forward ({F}), got {shards}"
        )
    return replace(model, moe_intermediate_size=F // shards)


def expert_bands(layout: Layout, number: int, expert: int, tensor: str) -> tuple[Band, ...]:
    recipe, width = layout.recipe.granular, layout.model.moe_intermediate_size
    assert recipe is not None
    copy, shard = divmod(expert, recipe.shards)
    units: range | Shuffled = range(shard * width, (shard + 1) * width)
    if recipe.shuffle:
        label = feed_forward_name(number, f"copies.{copy}.order")
        units = Shuffled(layout.dense.intermediate_size, shard * width, width, recipe.seed, label)
    changes = drop.redrawn(layout, number, expert, tensor) if layout.recipe.drop else ()
    factor = scale_factors(layout.recipe, layout.model).get(tensor, 1.0)
    scaled = (Scale(factor),) if factor != 1 else ()
    return (hidden_units(layout, number, expert, tensor, units, changes + scaled),)


def scale_factors(recipe: Recipe, model: ModelConfig) -> dict[str, float]:
    """What each tensor of an expert is multiplied by; those left out stay as they are."""
    assert recipe.granular is not None
    G, mode = recipe.granular.shards, recipe.granular.scale_mode
    if mode == "none":
        return {}
    c = float(G)
    if model.router_gate == "raw":
        c = model.num_experts * G / model.num_experts_per_tok
    # The bias of the output is whole in every shard, not a part of it.
    down_bias = {"down_proj.bias": c / G}
    if mode == "exact":
        return {"down_proj.weight": c} | down_bias
    projections = ("gate_proj", "up_proj", "down_proj") if model.gated_mlp else ("up_proj", "down_proj")
    root = c ** (1 / len(projections))
    kinds = [f"{name}.{kind}" for name in projections for kind in ("weight", "bias")]
    return dict.fromkeys(kinds, root) | down_bias
