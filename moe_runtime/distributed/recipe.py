"""How a run is spread over processes."""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_runtime.errors import RecipeError
from moe_runtime.recipe_checks import check_choice, check_whole

Data = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe:
    """The section `parallel:`. Every process has rows of its own, also those that share a set of experts.

    With `experts` = X each process holds 1/X of every layer's experts, and X neighbouring processes hold all
    of them: rows travel to the process of their expert and back. `data` is about everything else, and about
    experts that several processes hold: "ddp" keeps whole copies, "fsdp" a part in each process.
    """

    data: Data = "none"  # "none": one process
    experts: int = 1

    def __post_init__(self) -> None:
        check_choice("parallel.data", self.data, get_args(Data))
        check_whole("parallel.experts", self.experts, 1)
        if self.data == "none" and self.experts > 1:
            raise RecipeError(
                "parallel.data must be 'ddp' or 'fsdp' with parallel.experts above 1, because processes that "
                f"share experts have rows of their own, got 'none' with experts = {self.experts}"
            )
