"""Dense checkpoints to Mixture-of-Experts checkpoints, by every method of docs/upcycling.md."""

from upcycle.errors import RecipeError, UpcycleError
from upcycle.plan import UpcyclePlan, make_plan_for
from upcycle.recipe import Recipe, load_recipe, recipe_from_dict
from upcycle.run import UpcycleResult, upcycle
from upcycle.verify import Verification, verify

__all__ = [
    "Recipe",
    "RecipeError",
    "UpcycleError",
    "UpcyclePlan",
    "UpcycleResult",
    "Verification",
    "load_recipe",
    "make_plan_for",
    "recipe_from_dict",
    "upcycle",
    "verify",
]
