"""Recipe and sources -> plan: everything a run will do, decided and checked before a weight is read."""

import filecmp
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moe_runtime.config import ModelConfig
from moe_runtime.families import DENSE_FAMILIES, model_config
from upcycle import bam, branch_train_mix, names, sparse_copy
from upcycle.checkpoint import Checkpoint, read_json
from upcycle.errors import RecipeError, UpcycleError
from upcycle.layout import Layout, feed_forward_tasks, unmixed_task
from upcycle.recipe import Recipe
from upcycle.sources import AdapterSource, open_source
from upcycle.routers.file import check_routers, router_shapes
from upcycle.targets import EMPTY_SHARED_WIDTH, target_config_json
from upcycle.tasks import Assignment, TensorTask

_ASSIGN = {"copy": sparse_copy.assign, "btx": branch_train_mix.assign, "bam": bam.assign}
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
    sources = tuple(open_source(path) for path in paths)
    dense_configs = [_dense_config(source) for source in sources]
    base, dense = sources[paths.index(recipe.base)], dense_configs[paths.index(recipe.base)]
    for source, config in zip(sources, dense_configs, strict=True):
        _check_same_model(base, dense, source, config)
        _check_tensors(source, names.dense_shapes(config))
    _check_vocabularies(base, sources)
    _check_block(recipe, base, dense)
    model = _output_model(recipe, dense)
    dtype = _HEADER_DTYPE[recipe.dtype] if recipe.dtype else base.tensors[names.EMBEDDING].dtype
    config_json = target_config_json(recipe, model, base.config_json, TORCH_DTYPE[dtype])
    if recipe.target == "qwen2_moe":
        model = replace(model, shared_expert_intermediate_size=EMPTY_SHARED_WIDTH, shared_expert_gate=True)
    assignment = _ASSIGN[recipe.method](recipe)
    layout = Layout(dense, model, assignment, recipe.target, dtype, recipe.router, len(sources))
    tasks = tuple(_tasks(layout))
    routers = check_routers(recipe.router, model, router_shapes(tasks, len(sources)))
    return UpcyclePlan(recipe, sources, base, dense, model, assignment, config_json, dtype, tasks, routers)


def _source_paths(recipe: Recipe) -> tuple[str | AdapterSource, ...]:
    """The experts' sources in order, then a base that is no expert."""
    return recipe.sources if recipe.base in recipe.sources else (*recipe.sources, recipe.base)


def _tasks(layout: Layout) -> Iterator[TensorTask]:
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
            yield from feed_forward_tasks(layout, number)


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
    if recipe.layers == "every_other":
        if num_layers == 1:
            raise RecipeError("layers 'every_other' leaves no layer with experts in a model of 1 layer")
        return tuple(range(1, num_layers, 2))
    assert isinstance(recipe.layers, tuple)
    for number in recipe.layers:
        if not 0 <= number < num_layers:
            raise RecipeError(f"layers must lie between 0 and {num_layers - 1}, got {number}")
    chosen = tuple(sorted(set(recipe.layers)))
    return None if len(chosen) == num_layers else chosen


# --- checks of the sources ---


def _dense_config(source: Checkpoint) -> ModelConfig:
    family = source.config_json.get("model_type")
    if family not in DENSE_FAMILIES:
        raise UpcycleError(
            f"{source.folder}/config.json: model_type must be one of {', '.join(DENSE_FAMILIES)}, "
            f"got {family!r}"
        )
    try:
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


def _check_tensors(source: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
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
    for name in source.tensors:
        if name not in shapes and name != names.HEAD and not name.endswith(names.IGNORED_SUFFIX):
            raise UpcycleError(
                f"{source.folder}: tensor {name} has no place in a {source.config_json['model_type']} model; "
                "merge or remove what was added to it"
            )


def _check_vocabularies(base: Checkpoint, sources: tuple[Checkpoint, ...]) -> None:
    """Tokens must mean the same in all sources, as far as their tokenizer.json files can tell."""
    for source in sources:
        ours, theirs = base.folder / "tokenizer.json", source.folder / "tokenizer.json"
        if not ours.exists() or not theirs.exists() or filecmp.cmp(ours, theirs, shallow=False):
            continue
        if _vocabulary(ours) != _vocabulary(theirs):
            raise UpcycleError(
                f"the sources must share one vocabulary, but that of {ours} differs from that of {theirs}"
            )


def _vocabulary(tokenizer: Path) -> Any:
    model = read_json(tokenizer).get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _check_block(recipe: Recipe, base: Checkpoint, dense: ModelConfig) -> None:
    if recipe.block is None or recipe.block == dense.block:
        return
    family = base.config_json["model_type"]
    why = {
        "parallel": "their feed-forward reads the attention's result, and a parallel block would compute "
        "something else; leave 'block' out to keep sequential blocks, or start from a cohere model",
        "sequential": "their attention and feed-forward read the same norm, and a sequential block would "
        "need a second one; leave 'block' out",
    }[recipe.block]
    raise RecipeError(f"block {recipe.block!r} cannot be made from {family} sources: {why}")
