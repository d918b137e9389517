"""Branch-Train-MiX: expert j is the feed-forward of source j; everything else is the mean of the sources.

Source: Sukhbaatar et al. 2024. `non_expert: base` takes everything else from the base, as mergekit does.
"""

from upcycle.recipe import Recipe
from upcycle.tasks import Assignment


def assign(recipe: Recipe, num_experts: int) -> Assignment:
    experts = tuple(range(num_experts))
    # A base that is no expert is the plan's last source.
    base = recipe.sources.index(recipe.base) if recipe.base in recipe.sources else len(recipe.sources)
    return Assignment(
        feed_forward=experts, attention=None, rest=experts if recipe.non_expert == "mean" else (base,)
    )
