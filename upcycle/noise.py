"""Copies with noise: every expert is the dense feed-forward plus normal noise of its own.

    W_e = W + m · N(0, std),  m = 1 with probability `share`, else 0, for each weight

Source: mergekit's `noise_scale` (all weights); OLMoE's upcycling baseline (half of them, std 0.02).
"""

from dataclasses import replace

from upcycle.layout import Layout, copied, expert_label
from upcycle.tasks import Band, NormalNoise


def expert_bands(layout: Layout, number: int, expert: int, tensor: str) -> tuple[Band, ...]:
    recipe = layout.recipe.noise
    assert recipe is not None
    noise = NormalNoise(recipe.std, recipe.share, recipe.seed, expert_label(number, expert, tensor))
    return tuple(
        replace(band, pieces=tuple(replace(piece, changes=(noise,)) for piece in band.pieces))
        for band in copied(layout, number, expert, tensor)
    )
