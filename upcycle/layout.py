"""Tensor tasks that all methods share: tensors that are no expert, and the experts of a feed-forward."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from moe_runtime.config import ModelConfig
from upcycle import names
from upcycle.recipe import Recipe
from upcycle.tasks import (
    Assignment,
    Band,
    Change,
    Normal,
    Orthogonal,
    Piece,
    Scale,
    Shuffled,
    TensorTask,
    Zeros,
)

# (layout, layer, expert, tensor such as down_proj.weight) -> that tensor of that expert; no bands: zeros
ExpertBands = Callable[["Layout", int, int, str], tuple[Band, ...]]


@dataclass(frozen=True)
class Layout:
    """What a layer's tasks depend on. `dense` describes the sources, `model` the output."""

    recipe: Recipe
    dense: ModelConfig
    model: ModelConfig
    assignment: Assignment
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]  # every tensor of a source
    expert_bands: ExpertBands
    num_sources: int  # of the plan; a file of router weights is read as one more

    @property
    def target(self) -> str:
        return self.recipe.target

    def task(self, name: str, shape: tuple[int, ...], *bands: Band) -> TensorTask:
        """A tensor of the output; without bands it is zeros."""
        return TensorTask(name, self.dtype, shape, bands or Zeros())

    def router(self, name: str, label: str, rows: int) -> TensorTask:
        """`label` does not depend on the target, so that every target gets the same router."""
        recipe, width = self.recipe.router, self.model.hidden_size
        shape = (rows, width)
        repeats = self.recipe.granular.shards if self.recipe.granular else 1
        if recipe.init == "normal":
            return TensorTask(name, self.dtype, shape, Normal(recipe.std, recipe.seed, label, repeats))
        if recipe.init == "orthogonal":
            assert recipe.row_norm is not None
            content = Orthogonal(recipe.row_norm, recipe.seed, label, repeats)
            return TensorTask(name, self.dtype, shape, content)
        return self.task(name, shape, Band(rows, (Piece(label, (self.num_sources,), width),)))


def whole(tensor: str, sources: tuple[int, ...], shape: tuple[int, ...]) -> Band:
    """A source tensor from its first element to its last."""
    return Band(shape[0], (Piece(tensor, sources, width=prod(shape[1:])),))


def unmixed_task(layout: Layout, name: str) -> TensorTask:
    """A tensor that is no expert. Our own model has a norm row per head where Qwen3 has one for all heads."""
    shape = layout.shapes[name]
    if not name.endswith(names.HEAD_NORMS) or layout.target != "moe_runtime":
        joint = name.endswith(names.HEAD_NORMS) and layout.dense.qk_norm == "joint_rms_norm"
        stored = (prod(shape),) if joint else shape
        return layout.task(name, stored, whole(name, layout.assignment.rest, shape))
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


# --- what an expert is made of ---


def copied(layout: Layout, number: int, expert: int, tensor: str) -> tuple[Band, ...]:
    """The whole feed-forward of the expert's source."""
    name = feed_forward_name(number, tensor)
    return (whole(name, (layout.assignment.feed_forward[expert],), layout.shapes[name]),)


def hidden_units(
    layout: Layout,
    number: int,
    expert: int,
    tensor: str,
    units: range | Shuffled,
    changes: tuple[Change, ...] = (),
) -> Band:
    """Some hidden units of the source's feed-forward: rows of gate and up, columns of down."""
    name = feed_forward_name(number, tensor)
    sources = (layout.assignment.feed_forward[expert],)
    first, order = (units.start, None) if isinstance(units, range) else (0, units)
    count = len(units) if isinstance(units, range) else units.count
    rows, width = layout.shapes[name][0], prod(layout.shapes[name][1:])
    if tensor == "down_proj.bias":
        return Band(rows, (Piece(name, sources, width, changes=changes),))
    if tensor == "down_proj.weight":
        columns = Piece(name, sources, width, 0, first, count, column_order=order, changes=changes)
        return Band(rows, (columns,))
    return Band(count, (Piece(name, sources, width, first, row_order=order, changes=changes),))


def feed_forward_name(number: int, tensor: str) -> str:
    return f"{names.layer(number)}.mlp.{tensor}"


def expert_label(number: int, expert: int, what: str) -> str:
    """What the random numbers of one expert are drawn by, the same for every target."""
    return f"{names.layer(number)}.mlp.experts.{expert}.{what}"


# --- the tensors of a layer ---


def feed_forward_tasks(layout: Layout, number: int) -> Iterator[TensorTask]:
    """Router and experts of one layer."""
    prefix = names.layer(number)
    expert = names.EXPERT_NAMES[layout.target]
    num_experts = layout.model.num_experts
    yield layout.router(f"{prefix}.{expert.router}", f"{prefix}.mlp.router", num_experts)
    if layout.model.router_selection_bias:
        yield TensorTask(f"{prefix}.mlp.router.selection_bias", "F32", (num_experts,), Zeros())
    yield from expert_tasks(layout, number)


def expert_tasks(layout: Layout, number: int) -> Iterator[TensorTask]:
    """Experts, and the shared expert where there is one, of one layer."""
    expert = names.EXPERT_NAMES[layout.target]
    yield from (_stacked if expert.fused else _separate)(layout, number, expert)
    if layout.model.shared_expert_intermediate_size:
        yield from _shared_expert(layout, number)


def _up_names(model: ModelConfig) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if model.gated_mlp else ("up_proj",)


def _stacked(layout: Layout, number: int, names_below: names.ExpertNames) -> Iterator[TensorTask]:
    D, F, E = layout.model.hidden_size, layout.model.moe_intermediate_size, layout.model.num_experts
    experts = f"{names.layer(number)}.{names_below.experts}"
    up_names = _up_names(layout.model)
    rows = len(up_names) * F

    def stack(*tensors: str) -> list[Band]:
        return [
            band
            for expert in range(E)
            for tensor in tensors
            for band in layout.expert_bands(layout, number, expert, tensor)
        ]

    gate_up, down = (f"{experts}.{name}" for name in (names_below.up, names_below.down))
    yield layout.task(gate_up, (E, rows, D), *stack(*(f"{n}.weight" for n in up_names)))
    yield layout.task(down, (E, D, F), *stack("down_proj.weight"))
    if layout.model.mlp_bias:
        yield layout.task(f"{experts}.gate_up_bias", (E, rows), *stack(*(f"{n}.bias" for n in up_names)))
        yield layout.task(f"{experts}.down_bias", (E, D), *stack("down_proj.bias"))


def _separate(layout: Layout, number: int, names_below: names.ExpertNames) -> Iterator[TensorTask]:
    D, F = layout.model.hidden_size, layout.model.moe_intermediate_size
    projections = (
        ("gate_proj", names_below.gate, (F, D)),
        ("up_proj", names_below.up, (F, D)),
        ("down_proj", names_below.down, (D, F)),
    )
    for expert in range(layout.model.num_experts):
        for of_source, of_target, shape in projections:
            name = f"{names.layer(number)}.{names_below.experts}.{expert}.{of_target}.weight"
            yield layout.task(
                name, shape, *layout.expert_bands(layout, number, expert, f"{of_source}.weight")
            )


def _shared_expert(layout: Layout, number: int) -> Iterator[TensorTask]:
    """The dense feed-forward for method shared_expert, a mixture's own for replicate, else zeros.

    Qwen2-MoE has one always, and scales it by sigmoid(x . gate). A gate of zeros says 1/2, which the down
    projection makes up for.
    """
    mlp, model = feed_forward_name(number, "shared_expert"), layout.model
    source = mlp.removesuffix(".shared_expert") if layout.recipe.shared_expert else mlp
    D, width = model.hidden_size, model.shared_expert_intermediate_size
    source_gate = f"{mlp}_gate.weight"
    halved = model.shared_expert_gate and source_gate not in layout.shapes
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (width, D) for name in _up_names(model)}
    shapes["down_proj.weight"] = (D, width)
    if model.mlp_bias:
        shapes |= {f"{name}.bias": (width,) for name in _up_names(model)}
        shapes["down_proj.bias"] = (D,)
    for tensor, shape in shapes.items():
        changes = (Scale(2.0),) if halved and tensor.startswith("down") else ()
        piece = Piece(f"{source}.{tensor}", layout.assignment.rest, prod(shape[1:]), changes=changes)
        bands = [Band(shape[0], (piece,))] if piece.tensor in layout.shapes else []
        yield layout.task(f"{mlp}.{tensor}", shape, *bands)
    if model.shared_expert_gate:
        bands = [] if halved else [whole(source_gate, layout.assignment.rest, (1, D))]
        yield layout.task(source_gate, (1, D), *bands)
