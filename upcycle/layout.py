"""Tensor tasks that all methods share: tensors that are no expert, and the experts of a feed-forward."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from moe_runtime.config import ModelConfig
from upcycle import names
from upcycle.recipe import RouterRecipe
from upcycle.tasks import Assignment, Band, Normal, Orthogonal, Piece, TensorTask, Zeros


@dataclass(frozen=True)
class Layout:
    """What a layer's tasks depend on. `dense` describes the sources, `model` the output."""

    dense: ModelConfig
    model: ModelConfig
    assignment: Assignment
    target: str
    dtype: str
    router_recipe: RouterRecipe
    num_sources: int  # of the plan; a file of router weights is read as one more

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a source."""
        return names.dense_shapes(self.dense)

    def task(self, name: str, shape: tuple[int, ...], *bands: Band) -> TensorTask:
        return TensorTask(name, self.dtype, shape, bands)

    def router(self, name: str, label: str, rows: int) -> TensorTask:
        """`label` does not depend on the target, so that every target gets the same router."""
        recipe, width = self.router_recipe, self.model.hidden_size
        shape = (rows, width)
        if recipe.init == "normal":
            return TensorTask(name, self.dtype, shape, Normal(recipe.std, recipe.seed, label))
        if recipe.init == "orthogonal":
            assert recipe.row_norm is not None
            return TensorTask(name, self.dtype, shape, Orthogonal(recipe.row_norm, recipe.seed, label))
        return self.task(name, shape, Band(rows, (Piece(label, (self.num_sources,), width),)))


def whole(tensor: str, sources: tuple[int, ...], shape: tuple[int, ...]) -> Band:
    """A source tensor from its first element to its last."""
    return Band(shape[0], (Piece(tensor, sources, width=prod(shape[1:])),))


def unmixed_task(layout: Layout, name: str) -> TensorTask:
    """A tensor that is no expert. Our own model has a norm row per head where Qwen3 has one for all heads."""
    shape = layout.shapes[name]
    norm_of_heads = name.endswith(("q_norm.weight", "k_norm.weight"))
    if not norm_of_heads or layout.target != "moe_runtime":
        return layout.task(name, shape, whole(name, layout.assignment.rest, shape))
    heads = layout.dense.num_attention_heads if "q_norm" in name else layout.dense.num_key_value_heads
    bands = head_norm_rows(name, layout.assignment.rest, shape, 0, heads)
    return layout.task(name, (heads, layout.dense.head_dim), *bands)


def head_norm_rows(
    tensor: str, sources: tuple[int, ...], shape: tuple[int, ...], first_head: int, heads: int
) -> list[Band]:
    """Rows of a query or key norm, one per head; a source with one row for all heads repeats it."""
    if len(shape) == 1:
        return [Band(1, (Piece(tensor, sources, width=shape[0]),))] * heads
    return [Band(heads, (Piece(tensor, sources, width=shape[1], first_row=first_head),))]


# --- experts ---


def feed_forward_tasks(layout: Layout, number: int) -> Iterator[TensorTask]:
    """Router and experts of one layer."""
    prefix = names.layer(number)
    expert = names.EXPERT_NAMES[layout.target]
    num_experts = layout.model.num_experts
    yield layout.router(f"{prefix}.{expert.router}", f"{prefix}.mlp.router", num_experts)
    if layout.model.router_selection_bias:
        yield TensorTask(f"{prefix}.mlp.router.selection_bias", "F32", (num_experts,), Zeros())
    yield from _stacked(layout, prefix) if expert.fused else _separate(layout, prefix, expert)
    if layout.target == "qwen2_moe":
        yield from _empty_shared_expert(layout, prefix)


def _stacked(layout: Layout, prefix: str) -> Iterator[TensorTask]:
    D, F, E = layout.model.hidden_size, layout.model.moe_intermediate_size, layout.model.num_experts
    mlp = f"{prefix}.mlp"
    sources = [(source,) for source in layout.assignment.feed_forward]

    def stack(kinds: tuple[str, ...], suffix: str, shape: tuple[int, ...]) -> list[Band]:
        return [whole(f"{mlp}.{kind}_proj.{suffix}", source, shape) for source in sources for kind in kinds]

    yield layout.task(f"{mlp}.experts.gate_up_proj", (E, 2 * F, D), *stack(("gate", "up"), "weight", (F, D)))
    yield layout.task(f"{mlp}.experts.down_proj", (E, D, F), *stack(("down",), "weight", (D, F)))
    if layout.model.mlp_bias:
        yield layout.task(f"{mlp}.experts.gate_up_bias", (E, 2 * F), *stack(("gate", "up"), "bias", (F,)))
        yield layout.task(f"{mlp}.experts.down_bias", (E, D), *stack(("down",), "bias", (D,)))


def _separate(layout: Layout, prefix: str, expert: names.ExpertNames) -> Iterator[TensorTask]:
    D, F = layout.model.hidden_size, layout.model.moe_intermediate_size
    projections = (
        ("gate_proj", expert.gate, (F, D)),
        ("up_proj", expert.up, (F, D)),
        ("down_proj", expert.down, (D, F)),
    )
    for number, source in enumerate(layout.assignment.feed_forward):
        for of_source, of_target, shape in projections:
            name = f"{prefix}.{expert.experts}.{number}.{of_target}.weight"
            yield layout.task(name, shape, whole(f"{prefix}.mlp.{of_source}.weight", (source,), shape))


def _empty_shared_expert(layout: Layout, prefix: str) -> Iterator[TensorTask]:
    """Qwen2-MoE always adds a shared expert: one of zeros adds nothing."""
    D, width = layout.model.hidden_size, layout.model.shared_expert_intermediate_size
    for name, shape in (("gate", (width, D)), ("up", (width, D)), ("down", (D, width))):
        yield TensorTask(f"{prefix}.mlp.shared_expert.{name}_proj.weight", layout.dtype, shape, Zeros())
    yield TensorTask(f"{prefix}.mlp.shared_expert_gate.weight", layout.dtype, (1, D), Zeros())
