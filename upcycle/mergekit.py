"""Configurations of mergekit-moe as recipes: the same experts, and a note for whatever is done otherwise."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from upcycle.checkpoint import expanded
from upcycle.errors import RecipeError
from upcycle.recipe import Recipe, recipe_from_dict
from upcycle.sources import AdapterSource, open_source

_DTYPES = ("float32", "bfloat16", "float16")
# Its names of output formats, or where there is none the base's model_type -> ours.
_TARGETS = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
_TARGET_OF_FAMILY = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_KNOWN = {
    "configuration": (
        "base_model",
        "experts",
        "gate_mode",
        "dtype",
        "experts_per_token",
        "shared_experts",
        "architecture",
    ),
    "expert": ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"),
}
_NOTES = {
    "random": "router weights have standard deviation 0.02, not 1, with which one expert would take nearly "
    "all of a token's weight before any training",
    "uniform_random": "router weights are normal with the standard deviation of mergekit's uniform ones",
    "hidden": "a router starts from the mean of what it will read on an expert's prompts, behind the norm "
    "and over all tokens, not from hidden states before the norm",
    "cheap_embed": "a router starts from the mean of what it will read on an expert's prompts, layer by "
    "layer, not from token embeddings that are the same for all layers",
}
_STARTED_BY_PROMPTS = ("hidden", "cheap_embed")


class Translation(NamedTuple):
    """A recipe, and what it does otherwise than the configuration it comes from, a sentence each."""

    recipe: Recipe
    notes: tuple[str, ...]


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """Whether the lines of a YAML file are a configuration of mergekit-moe rather than a recipe."""
    return "base_model" in values and isinstance(values.get("experts"), list)


def translate(values: Mapping[str, Any], output: str, *, where: str = "configuration") -> Translation:
    """The recipe for what a configuration of mergekit-moe describes. Reads the base's configuration.

    Args:
        output: the folder to write; such a configuration names none.

    Raises:
        UpcycleError: a value is not allowed, has no counterpart in a recipe, or the base cannot be read.
    """
    try:
        recipe, notes = _translate(values, output)
        return Translation(recipe_from_dict(recipe), tuple(notes))
    except RecipeError as error:
        raise RecipeError(f"{where}: {str(error).removeprefix('recipe: ')}") from None


def _translate(values: Mapping[str, Any], output: str) -> tuple[dict[str, Any], list[str]]:
    experts = [expert if isinstance(expert, Mapping) else {} for expert in values["experts"]]
    if not experts or not all("source_model" in expert for expert in experts):
        raise RecipeError("each of the experts must be a section with 'source_model'")
    notes = [f"key {name!r} is not read" for name in values if name not in _KNOWN["configuration"]]
    unread = {name for expert in experts for name in expert if name not in _KNOWN["expert"]}
    notes += [f"key {name!r} of an expert is not read" for name in sorted(map(str, unread))]
    if values.get("shared_experts"):
        raise RecipeError("shared_experts have no counterpart; method 'shared_expert' of a recipe makes one")
    base = _source(values["base_model"], "base_model")
    sources = [_source(expert["source_model"], "source_model") for expert in experts]
    recipe = {
        "output": output,
        "base": base,
        "target": _target(values, base),
        "dtype": _dtype(values.get("dtype")),
        "experts_per_token": 2 if values.get("experts_per_token") is None else values["experts_per_token"],
        "router": _router(values, experts, base, notes),
    }
    return {**recipe, **_method(experts, sources, base)}, notes


def _method(experts: list[Mapping[str, Any]], sources: list[Any], base: Any) -> dict[str, Any]:
    """Experts that are all the base's own feed-forward are copies of it; else each comes from its source."""
    scales = [expert.get("noise_scale") or 0 for expert in experts]
    for scale in scales:
        if not isinstance(scale, int | float):
            raise RecipeError(f"noise_scale must be a number, got {scale!r}")
    if any(expert.get("residual_scale") not in (None, 1, 1.0) for expert in experts):
        raise RecipeError("residual_scale has no counterpart; leave it out")
    same = all(source == base for source in sources)
    if any(scales):
        if not same or len(set(scales)) > 1:
            raise RecipeError("noise_scale must be the same for all experts, and these copies of base_model")
        return {"method": "noise", "experts": len(sources), "noise": {"std": scales[0]}}
    if same:
        return {"method": "copy", "experts": len(sources)}
    return {"method": "btx", "sources": sources, "non_expert": "base"}


def _router(
    values: Mapping[str, Any], experts: list[Mapping[str, Any]], base: Any, notes: list[str]
) -> dict[str, Any]:
    mode = values.get("gate_mode", "hidden")
    if not isinstance(mode, str) or mode not in _NOTES:
        raise RecipeError(f"gate_mode must be one of {', '.join(map(repr, _NOTES))}, got {mode!r}")
    notes.append(_NOTES[mode])
    if mode == "random":
        return {}
    if mode == "uniform_random":
        width = open_source(_spec(base)).config_json.get("hidden_size")
        if not isinstance(width, int) or width < 1:
            raise RecipeError(f"base_model must have a config.json with hidden_size, got {width!r}")
        return {"std": (3 * width) ** -0.5}
    prompts = [expert.get("positive_prompts") for expert in experts]
    if not all(isinstance(texts, list) and texts for texts in prompts):
        raise RecipeError(f"gate_mode {mode!r} needs 'positive_prompts', a list of texts, for each expert")
    if any(expert.get("negative_prompts") for expert in experts):
        raise RecipeError(
            "negative_prompts have no counterpart; leave them out: a router's rows compete, so that a prompt "
            "of one expert counts against the others anyway"
        )
    return {"init": "centroid", "data": prompts}


def _target(values: Mapping[str, Any], base: Any) -> str:
    wanted = values.get("architecture")
    if wanted is None:
        family = open_source(_spec(base)).config_json.get("model_type")
        return _TARGET_OF_FAMILY.get(str(family), "moe_runtime")
    if str(wanted).lower() not in _TARGETS:
        raise RecipeError(f"architecture must be one of {', '.join(_TARGETS)}, got {wanted!r}")
    return _TARGETS[str(wanted).lower()]


def _dtype(wanted: object) -> str | None:
    if wanted is not None and wanted not in _DTYPES:
        raise RecipeError(f"dtype must be one of {', '.join(_DTYPES)}, got {wanted!r}")
    return None if wanted is None else str(wanted)


def _source(reference: object, name: str) -> str | dict[str, str]:
    """A path, or 'BASE+ADAPTER', or the sections that mergekit writes for the two."""
    if isinstance(reference, Mapping):
        model, lora = _path(reference.get("model")), _path(reference.get("lora"))
    else:
        model, lora = _path(reference), None
    if model is None:
        raise RecipeError(f"{name} must be the path of a model, got {reference!r}")
    if lora is None and "+" in model and not expanded(model).exists():
        model, _, lora = model.partition("+")
    return model if lora is None else {"base": model, "adapter": lora}


def _path(reference: object) -> str | None:
    if isinstance(reference, Mapping):
        reference = reference.get("path")
    return reference if isinstance(reference, str) and reference else None


def _spec(source: str | dict[str, str]) -> str | AdapterSource:
    return source if isinstance(source, str) else AdapterSource(**source)
