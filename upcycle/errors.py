"""What a user of this package can get wrong, under the name its functions raise."""

from moe_runtime.errors import RecipeError
from moe_runtime.errors import RunError as UpcycleError

__all__ = ["RecipeError", "UpcycleError"]
