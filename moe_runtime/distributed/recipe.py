"""How a run is spread over processes."""

from dataclasses import dataclass
from typing import Literal

from moe_runtime.config_checks import check_choice, check_positive

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
        check_choice("data", self.data, Data)
        check_positive(self, "experts")
        if self.data == "none" and self.experts > 1:
            raise ValueError(
                f"data must be 'ddp' or 'fsdp' with experts above 1, because processes that share experts "
                f"have rows of their own, got 'none' with experts = {self.experts}"
            )
