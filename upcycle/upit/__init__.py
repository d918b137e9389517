"""UpIT: one dense model and its instructions to a trained mixture of experts, in resumable stages."""

from upcycle.upit.expert import Expert, open_expert
from upcycle.upit.pipeline import Run, run_upit
from upcycle.upit.recipe import UpitRecipe, load_upit_recipe, upit_recipe_from_dict
from upcycle.upit.record import Recorder, Recording, open_recording, select

__all__ = [
    "Expert",
    "Recorder",
    "Recording",
    "Run",
    "UpitRecipe",
    "load_upit_recipe",
    "open_expert",
    "open_recording",
    "run_upit",
    "select",
    "upit_recipe_from_dict",
]
