"""Dense checkpoints to Mixture-of-Experts checkpoints: sparse copy, Branch-Train-MiX, BAM."""

from upcycle.errors import RecipeError, UpcycleError
from upcycle.recipe import Recipe, load_recipe, recipe_from_dict
from upcycle.run import UpcycleResult, upcycle

__all__ = [
    "Recipe",
    "RecipeError",
    "UpcycleError",
    "UpcycleResult",
    "load_recipe",
    "recipe_from_dict",
    "upcycle",
]
