"""Drop-Upcycling: every expert is the dense feed-forward with a share of its hidden units drawn anew.

Of each expert's F hidden units, in an order of its own, floor(ratio · F) are chosen: their rows of gate and
up and their columns of down become normal numbers of the mean and standard deviation that just these numbers
had in that matrix. With ratio 0 an expert is a reordered copy, which computes the same.

Source: Nakamura et al. 2025. `shared_indices: true` is the paper's reading, one choice for the three
matrices; false is its released code, one choice per matrix, which touches 1 - (1 - ratio)³ of the units.
"""

from decimal import Decimal

from upcycle.layout import Layout, expert_label, hidden_units
from upcycle.tasks import Band, Change, Redraw, Shuffled


def expert_bands(layout: Layout, number: int, expert: int, tensor: str) -> tuple[Band, ...]:
    assert layout.recipe.drop is not None
    F = layout.model.moe_intermediate_size
    order = Shuffled(F, 0, F, layout.recipe.drop.seed, expert_label(number, expert, "order"))
    changes = redrawn(layout, number, expert, tensor)
    return (hidden_units(layout, number, expert, tensor, order, changes),)


def redrawn(layout: Layout, number: int, expert: int, tensor: str) -> tuple[Change, ...]:
    """The hidden units that an expert loses, as they are counted in the expert."""
    recipe, F = layout.recipe.drop, layout.model.moe_intermediate_size
    assert recipe is not None
    # As it was written: in binary 0.29 · 100 is just below 29.
    count = int(Decimal(str(recipe.ratio)) * F)
    if count == 0 or tensor == "down_proj.bias":  # one number per output, none per hidden unit
        return ()
    which = "dropped" if recipe.shared_indices else f"dropped {tensor.partition('.')[0]}"
    entries = Shuffled(F, 0, count, recipe.seed, expert_label(number, expert, which))
    label = expert_label(number, expert, f"{tensor} drawn")
    if tensor == "down_proj.weight":
        return (Redraw("columns", entries, recipe.seed, label),)
    return (Redraw("rows", entries, recipe.seed, label),)
