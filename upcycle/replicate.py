"""Expert replication: a mixture gets more experts, copies of those it has.

Expert e becomes counts[e] neighbouring experts. The router's row is copied with it, and every copy but the
first gets uniform noise, on its selection bias or, where the format has none, on its row, so that copies part
in training. Copies of one expert compete with other experts for the same K places, and a score of a softmax
over more experts is smaller: the function changes.

Source: Expert Upcycling, 2026.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from moe_runtime.config import ModelConfig
from moe_runtime.recipe_checks import MAX_EXPERTS
from upcycle import names
from upcycle.errors import RecipeError
from upcycle.layout import Layout, expert_label, expert_tasks, feed_forward_name, whole
from upcycle.recipe import Recipe
from upcycle.tasks import Band, Piece, TensorTask, Uniform, UniformNoise


def copies(recipe: Recipe, mixture: ModelConfig, number: int) -> tuple[int, ...]:
    """The expert of layer `number` that each expert of the output is a copy of."""
    assert recipe.replicate is not None
    counts = recipe.replicate.of_layer(_moe_layers(mixture).index(number))
    if isinstance(counts, int):
        counts = (counts,) * mixture.num_experts
    return tuple(chain.from_iterable([expert] * count for expert, count in enumerate(counts)))


def _moe_layers(mixture: ModelConfig) -> list[int]:
    return [number for number in range(mixture.num_hidden_layers) if mixture.is_moe_layer(number)]


def _num_experts(recipe: Recipe, mixture: ModelConfig) -> int:
    """Of the output; what is wrong with the counts is said here."""
    assert recipe.replicate is not None
    E, layers, given = mixture.num_experts, _moe_layers(mixture), recipe.replicate.counts
    if isinstance(given, tuple) and isinstance(given[0], tuple) and len(given) != len(layers):
        raise RecipeError(
            f"replicate.counts must have one list for each of the {len(layers)} layers with experts, "
            f"got {len(given)}"
        )
    sums = set()
    for place in range(len(layers)):
        counts = recipe.replicate.of_layer(place)
        if not isinstance(counts, int) and len(counts) != E:
            raise RecipeError(
                f"replicate.counts must be a number or one number for each of the {E} experts, "
                f"got {len(counts)}"
            )
        sums.add(counts * E if isinstance(counts, int) else sum(counts))
    if len(sums) > 1:
        raise RecipeError(
            f"replicate.counts must make as many experts in every layer, got from {min(sums)} to {max(sums)}"
        )
    (total,) = sums
    if total > MAX_EXPERTS:
        raise RecipeError(f"replicate.counts must make at most {MAX_EXPERTS} experts, got {total}")
    return total


def describe(recipe: Recipe, mixture: ModelConfig) -> ModelConfig:
    assert recipe.replicate is not None
    num_experts = _num_experts(recipe, mixture)
    counts = recipe.replicate.counts
    if mixture.router_num_groups > 1 and not isinstance(counts, int):
        raise RecipeError(
            f"replicate.counts must be one number for a mixture whose experts are in "
            f"{mixture.router_num_groups} groups of equal size, got {len(counts)}"
        )
    K = recipe.experts_per_token or mixture.num_experts_per_tok
    if num_experts < K:
        raise RecipeError(f"experts_per_token must be at most the number of experts ({num_experts}), got {K}")
    noisy_bias = recipe.replicate.noise > 0 and recipe.replicate.noise_on == "selection_bias"
    return replace(
        mixture,
        num_experts=num_experts,
        num_experts_per_tok=K,
        router_selection_bias=mixture.router_selection_bias or noisy_bias,
    )


def shapes(mixture: ModelConfig, *, norm_per_head: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a mixture, its experts one by one.

    Args:
        norm_per_head: query and key norms have a row for each head, as in our own model.
    """
    D, F = mixture.hidden_size, mixture.moe_intermediate_size
    made: dict[str, tuple[int, ...]] = {}
    for name, shape in names.dense_shapes(mixture).items():
        parts = name.split(".")
        if not (parts[1] == "layers" and parts[3] == "mlp" and mixture.is_moe_layer(int(parts[2]))):
            made[name] = shape
        if norm_per_head and name.endswith(("q_norm.weight", "k_norm.weight")):
            heads = mixture.num_attention_heads if "q_norm" in name else mixture.num_key_value_heads
            made[name] = (heads, mixture.head_dim)
    for number in range(mixture.num_hidden_layers):
        if not mixture.is_moe_layer(number):
            continue
        made[feed_forward_name(number, "router.weight")] = (mixture.num_experts, D)
        if mixture.router_selection_bias:
            made[feed_forward_name(number, "router.selection_bias")] = (mixture.num_experts,)
        for expert in range(mixture.num_experts):
            made |= _projections(mixture, expert_label(number, expert, ""), F)
        if mixture.shared_expert_intermediate_size:
            shared = feed_forward_name(number, "shared_expert")
            made |= _projections(mixture, f"{shared}.", mixture.shared_expert_intermediate_size)
            if mixture.shared_expert_gate:
                made[f"{shared}_gate.weight"] = (1, D)
    return made


def _projections(mixture: ModelConfig, prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    D = mixture.hidden_size
    rows = {"gate_proj": width, "up_proj": width, "down_proj": D}
    if not mixture.gated_mlp:
        del rows["gate_proj"]
    made: dict[str, tuple[int, ...]] = {}
    for name, count in rows.items():
        made[f"{prefix}{name}.weight"] = (count, width if name == "down_proj" else D)
        if mixture.mlp_bias:
            made[f"{prefix}{name}.bias"] = (count,)
    return made


def expert_bands(layout: Layout, number: int, expert: int, tensor: str) -> tuple[Band, ...]:
    made_from = copies(layout.recipe, layout.dense, number)
    name = expert_label(number, made_from[expert], tensor)
    return (whole(name, (0,), layout.shapes[name]),)


def feed_forward_tasks(layout: Layout, number: int) -> Iterator[TensorTask]:
    """Router and experts of one layer."""
    recipe, model = layout.recipe.replicate, layout.model
    assert recipe is not None
    prefix = names.layer(number)
    source = feed_forward_name(number, "router")
    E, D = model.num_experts, model.hidden_size
    on_weights = recipe.noise_on == "weights"
    yield layout.task(
        f"{prefix}.{names.EXPERT_NAMES[layout.target].router}",
        (E, D),
        *_router_rows(layout, number, f"{source}.weight", D, noisy=on_weights),
    )
    if model.router_selection_bias:
        name = f"{source}.selection_bias"
        if name in layout.shapes:
            bands = tuple(_router_rows(layout, number, name, 1, noisy=not on_weights))
            yield TensorTask(name, "F32", (E,), bands)
        else:
            yield TensorTask(
                name, "F32", (E,), Uniform(recipe.noise, recipe.seed, name, _added(layout, number))
            )
    yield from expert_tasks(layout, number)


def _added(layout: Layout, number: int) -> tuple[int, ...]:
    """Experts of a layer of the output that are not the first copy."""
    made_from = copies(layout.recipe, layout.dense, number)
    return tuple(n for n in range(1, len(made_from)) if made_from[n] == made_from[n - 1])


def _router_rows(layout: Layout, number: int, tensor: str, width: int, *, noisy: bool) -> Iterator[Band]:
    recipe = layout.recipe.replicate
    assert recipe is not None
    added = _added(layout, number)
    for expert, original in enumerate(copies(layout.recipe, layout.dense, number)):
        noise = UniformNoise(recipe.noise, recipe.seed, f"{tensor} of expert {expert}")
        changes = (noise,) if noisy and recipe.noise > 0 and expert in added else ()
        yield Band(1, (Piece(tensor, (0,), width, first_row=original, changes=changes),))
