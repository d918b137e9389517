"""Recipe and sources -> plan: everything a run will do, decided and checked before a weight is read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from moe_runtime.config import ModelConfig
from moe_runtime.families import DENSE_FAMILIES, KNOWN_FAMILIES, check_family, model_config
from upcycle import (
    bam,
    branch_train_mix,
    drop,
    granular,
    names,
    noise,
    replicate,
    shared_expert,
    sparse_copy,
)
from upcycle.checkpoint import Checkpoint
from upcycle.errors import RecipeError, UpcycleError
from upcycle.layout import ExpertBands, Layout, copied, feed_forward_tasks, unmixed_task
from upcycle.method_sections import LayersRecipe
from upcycle.recipe import Recipe
from upcycle.routers.file import check_routers, router_shapes
from upcycle.sources import AdapterSource, open_source
from upcycle.sources.moe import per_expert
from upcycle.sources.vocabulary import check_vocabularies
from upcycle.stored import StoredNames, stored_names, stored_shapes, under_our_names
from upcycle.targets import EMPTY_SHARED_WIDTH, target_config_json
from upcycle.tasks import Assignment, TensorTask


class _Method(NamedTuple):
    """What a method decides; the rest is the same for all."""

    assign: Callable[[Recipe, int], Assignment] = sparse_copy.assign
    expert_bands: ExpertBands = copied
    describe: Callable[[Recipe, ModelConfig], ModelConfig] = lambda _, model: model  # the output's sizes
    feed_forward_tasks: Callable[[Layout, int], Iterator[TensorTask]] = feed_forward_tasks


_METHODS = {
    "copy": _Method(),
    "btx": _Method(branch_train_mix.assign),
    "bam": _Method(bam.assign),
    "upit": _Method(branch_train_mix.assign),
    "noise": _Method(expert_bands=noise.expert_bands),
    "drop": _Method(expert_bands=drop.expert_bands),
    "granular": _Method(expert_bands=granular.expert_bands, describe=granular.describe),
    "shared_expert": _Method(expert_bands=shared_expert.expert_bands, describe=shared_expert.describe),
    "replicate": _Method(
        expert_bands=replicate.expert_bands,
        describe=replicate.describe,
        feed_forward_tasks=replicate.feed_forward_tasks,
    ),
}
# Names of safetensors headers -> torch's.
TORCH_DTYPE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HEADER_DTYPE = {name: header for header, name in TORCH_DTYPE.items()}


@dataclass(frozen=True)
class UpcyclePlan:
    """Pure data: the sources, the output's description and every tensor to write, in order."""

    recipe: Recipe
    sources: tuple[Checkpoint, ...]
    base: Checkpoint
    dense: ModelConfig
    model: ModelConfig
    assignment: Assignment
    config_json: dict[str, Any]
    dtype: str  # of safetensors headers
    tasks: tuple[TensorTask, ...]
    routers: Checkpoint | None  # the file of router weights that the recipe names

    @property
    def num_bytes(self) -> int:
        return sum(task.num_bytes for task in self.tasks)

    @property
    def num_parameters(self) -> int:
        return sum(task.num_elements for task in self.tasks)


def make_plan_for(recipe: Recipe) -> UpcyclePlan:
    """Decide every tensor of the output. Reads configurations and file headers, no weights.

    Raises:
        UpcycleError: a source is missing, damaged, of an unknown family or unlike the others, or the target
            format cannot express the output.
    """
    paths = _source_paths(recipe)
    method = _METHODS[recipe.method]
    is_mixture = recipe.method == "replicate"
    sources = tuple(open_source(path) for path in paths)
    if is_mixture:
        sources = tuple(per_expert(source) for source in sources)
    configs = [_mixture_config(source) if is_mixture else _dense_config(source) for source in sources]
    base, dense = sources[paths.index(recipe.base)], configs[paths.index(recipe.base)]
    shapes = _mixture_shapes(recipe, base, dense) if is_mixture else names.dense_shapes(dense)
    for source, config in zip(sources, configs, strict=True):
        _check_same_model(base, dense, source, config)
        _check_tensors(source, stored_shapes(source, config, shapes), stored_names(source, config))
    sources = tuple(under_our_names(source, dense, shapes) for source in sources)
    base = sources[paths.index(recipe.base)]
    check_vocabularies(base, sources)
    _check_block(recipe, base, dense)
    model = method.describe(recipe, dense if is_mixture else _output_model(recipe, dense))
    dtype = _HEADER_DTYPE[recipe.dtype] if recipe.dtype else base.tensors[names.EMBEDDING].dtype
    config_json = target_config_json(recipe, model, base.config_json, TORCH_DTYPE[dtype])
    if recipe.target == "qwen2_moe":
        width = model.shared_expert_intermediate_size or EMPTY_SHARED_WIDTH
        model = replace(model, shared_expert_intermediate_size=width, shared_expert_gate=True)
    assignment = method.assign(recipe, model.num_experts)
    layout = Layout(recipe, dense, model, assignment, dtype, shapes, method.expert_bands, len(sources))
    tasks = tuple(_tasks(layout, method))
    shards = recipe.granular.shards if recipe.granular else 1
    routers = check_routers(recipe.router, model, router_shapes(tasks, len(sources)), shards)
    return UpcyclePlan(recipe, sources, base, dense, model, assignment, config_json, dtype, tasks, routers)


def _source_paths(recipe: Recipe) -> tuple[str | AdapterSource, ...]:
    """The experts' sources in order, then a base that is no expert."""
    return recipe.sources if recipe.base in recipe.sources else (*recipe.sources, recipe.base)


def _tasks(layout: Layout, method: _Method) -> Iterator[TensorTask]:
    for name in layout.shapes:
        if not name.startswith("model.layers."):
            yield unmixed_task(layout, name)
    for number in range(layout.model.num_hidden_layers):
        prefix = names.layer(number) + "."
        mixed = {
            "self_attn": layout.model.is_attention_mixture_layer(number),
            "mlp": layout.model.is_moe_layer(number),
        }
        for name in layout.shapes:
            if name.startswith(prefix) and not mixed.get(name.removeprefix(prefix).split(".")[0], False):
                yield unmixed_task(layout, name)
        if mixed["self_attn"]:
            yield from bam.attention_tasks(layout, number)
        if mixed["mlp"]:
            yield from method.feed_forward_tasks(layout, number)


# --- the output ---


def _output_model(recipe: Recipe, dense: ModelConfig) -> ModelConfig:
    assert recipe.experts is not None
    assert recipe.experts_per_token is not None
    assert recipe.router.gate is not None
    assert recipe.router.z_loss_coef is not None
    layers = _chosen_layers(recipe, dense.num_hidden_layers)
    model = replace(
        dense,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        moe_layers=layers,
        router_score=recipe.router.score,
        router_gate=recipe.router.gate,
        router_scale=recipe.router.scale,
        router_selection_bias=recipe.router.selection_bias,
        router_aux_loss_coef=recipe.router.aux_loss_coef,
        router_z_loss_coef=recipe.router.z_loss_coef,
    )
    if recipe.attention is None:
        return model
    shared = recipe.attention.kv == "shared"
    return replace(
        model,
        num_attention_experts=recipe.experts,
        num_attention_heads=dense.num_attention_heads * recipe.experts,
        num_key_value_heads=dense.num_key_value_heads * (1 if shared else recipe.experts),
        attention_kv=recipe.attention.kv,
        attention_top_k=recipe.attention.top_k,
        attention_top_k_renorm=recipe.attention.renormalise_top_k,
        attention_mixture_layers=layers,
    )


def _chosen_layers(recipe: Recipe, num_layers: int) -> tuple[int, ...] | None:
    """Layers that get experts; None: all."""
    if recipe.layers == "all":
        return None
    layers = LayersRecipe(moe_every=2) if recipe.layers == "every_other" else recipe.layers
    if isinstance(layers, LayersRecipe):
        first, every = layers.first_dense, layers.moe_every
        layers = tuple(n for n in range(first, num_layers) if (n + 1) % every == 0)
        if not layers:
            every_other = recipe.layers == "every_other"
            said = "'every_other'" if every_other else f"{first} dense, then every {every}"
            raise RecipeError(f"layers {said} leaves no layer with experts; the model has {num_layers}")
    assert isinstance(layers, tuple)
    for number in layers:
        if not 0 <= number < num_layers:
            raise RecipeError(f"layers must lie between 0 and {num_layers - 1}, got {number}")
    chosen = tuple(sorted(set(layers)))
    return None if len(chosen) == num_layers else chosen


# --- checks of the sources ---


def _dense_config(source: Checkpoint) -> ModelConfig:
    return _config_of_family(source, DENSE_FAMILIES)


def _mixture_config(source: Checkpoint) -> ModelConfig:
    config = _config_of_family(source, [name for name in KNOWN_FAMILIES if name not in DENSE_FAMILIES])
    if config.num_experts == 0 or config.num_attention_experts > 1:
        has = "attention experts" if config.num_experts else "no experts"
        raise UpcycleError(
            f"{source.folder}: method 'replicate' copies the experts of feed-forwards, this model has {has}"
        )
    return config


def _mixture_shapes(recipe: Recipe, source: Checkpoint, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    norm_per_head = source.config_json["model_type"] == "moe_runtime" and config.qk_norm in (
        "rms_norm",
        "offset_rms_norm",
    )
    if norm_per_head and recipe.target != "moe_runtime":
        raise RecipeError(
            f"target {recipe.target!r} cannot hold this model: its query and key norms have a row for each "
            "head; use target 'moe_runtime'"
        )
    return replicate.shapes(config, norm_per_head=norm_per_head)


def _config_of_family(source: Checkpoint, families: Sequence[str]) -> ModelConfig:
    family = source.config_json.get("model_type")
    try:
        check_family(family, families)
        return model_config(source.config_json)
    except ValueError as error:
        raise UpcycleError(f"{source.folder}/config.json: {error}") from error


def _check_same_model(base: Checkpoint, dense: ModelConfig, source: Checkpoint, config: ModelConfig) -> None:
    for field in fields(ModelConfig):
        ours, theirs = getattr(dense, field.name), getattr(config, field.name)
        # A longer window than it was trained with changes no weight and no function.
        if ours != theirs and field.name != "max_position_embeddings":
            raise UpcycleError(
                f"the sources must be branches of one dense model, but {field.name} is {ours!r} in "
                f"{base.folder} and {theirs!r} in {source.folder}"
            )


def _check_tensors(source: Checkpoint, shapes: dict[str, tuple[int, ...]], stored: StoredNames) -> None:
    for name, shape in shapes.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            raise UpcycleError(f"{source.folder}: tensor {name} is missing; the checkpoint is not complete")
        if tensor.shape != shape:
            raise UpcycleError(
                f"{source.folder}: tensor {name} must have shape {shape} by config.json, got {tensor.shape}"
            )
        if tensor.dtype not in TORCH_DTYPE:
            raise UpcycleError(
                f"{source.folder}: tensor {name} must be of type {', '.join(TORCH_DTYPE)}, "
                f"got {tensor.dtype}; de-quantise the checkpoint first"
            )
    heads = [f"{head}.weight" for head in stored.heads]
    for name in source.tensors:
        if name not in shapes and name not in heads and not name.endswith(stored.ignored):
            raise UpcycleError(
                f"{source.folder}: tensor {name} has no place in a {source.config_json['model_type']} model; "
                "merge or remove what was added to it"
            )


def _check_block(recipe: Recipe, base: Checkpoint, dense: ModelConfig) -> None:
    if recipe.block is None or recipe.block == dense.block:
        return
    family = base.config_json["model_type"]
    why = {
        "parallel": "their feed-forward reads the attention's result, and a parallel block would compute "
        "something else; leave 'block' out to keep sequential blocks, or start from a family with parallel "
        "blocks, such as cohere",
        "sequential": "their attention and feed-forward read the same norm, and a sequential block would "
        "need a second one; leave 'block' out",
    }[recipe.block]
    raise RecipeError(f"block {recipe.block!r} cannot be made from {family} sources: {why}")
