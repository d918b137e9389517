"""BAM: attention expert j and feed-forward expert j both come from source j; everything else is averaged.

Source: Zhang et al. 2024. With shared keys and values their projections are averaged too, and query heads are
stored `[key-value head][expert][head in group]`, so that the queries of one key-value head are neighbours.
"""

from collections.abc import Iterator
from dataclasses import replace

from upcycle import branch_train_mix, names
from upcycle.layout import Layout, head_norm_rows, unmixed_task, whole
from upcycle.recipe import Recipe
from upcycle.tasks import Assignment, Band, Piece, TensorTask


def assign(recipe: Recipe, num_experts: int) -> Assignment:
    mixed = branch_train_mix.assign(recipe, num_experts)
    return replace(mixed, attention=mixed.feed_forward)


def query_runs(layout: Layout) -> list[tuple[int, int, int]]:
    """(attention expert, first head, number of heads) of neighbouring query heads, in stored order."""
    A, H = layout.model.num_attention_experts, layout.dense.num_attention_heads
    kv_heads = layout.dense.num_key_value_heads
    if layout.model.attention_kv == "expert":
        return [(a, 0, H) for a in range(A)]
    group = H // kv_heads
    return [(a, kv * group, group) for kv in range(kv_heads) for a in range(A)]


def attention_tasks(layout: Layout, number: int) -> Iterator[TensorTask]:
    """Router, projections and head norms of one layer's mixture of attention."""
    prefix = f"{names.layer(number)}.self_attn"
    A = layout.model.num_attention_experts
    yield layout.router(f"{prefix}.router.weight", f"{prefix}.router", A)
    queries = query_runs(layout)
    yield from _projected(layout, f"{prefix}.q", queries)
    if layout.model.attention_kv == "expert":
        keys = [(a, 0, layout.dense.num_key_value_heads) for a in range(A)]
        yield from _projected(layout, f"{prefix}.k", keys)
        yield from _projected(layout, f"{prefix}.v", keys)
    else:
        yield from _shared(layout, prefix)
    yield from _output(layout, prefix, queries)


def _source(layout: Layout, expert: int) -> tuple[int, ...]:
    assert layout.assignment.attention is not None
    return (layout.assignment.attention[expert],)


def _projected(layout: Layout, prefix: str, runs: list[tuple[int, int, int]]) -> Iterator[TensorTask]:
    """A query, key or value projection with its bias and head norm: each expert's heads from its source."""
    dense, P = layout.dense, layout.dense.head_dim
    heads = sum(count for _, _, count in runs)

    def rows(tensor: str, width: int) -> list[Band]:
        return [
            Band(count * P, (Piece(tensor, _source(layout, expert), width, first_row=first * P),))
            for expert, first, count in runs
        ]

    weight, bias, norm = f"{prefix}_proj.weight", f"{prefix}_proj.bias", f"{prefix}_norm.weight"
    yield layout.task(weight, (heads * P, dense.hidden_size), *rows(weight, dense.hidden_size))
    if dense.attention_bias:
        yield layout.task(bias, (heads * P,), *rows(bias, 1))
    norm_shape = layout.shapes.get(norm)
    if norm_shape is not None:
        bands = [
            band
            for expert, first, count in runs
            for band in head_norm_rows(norm, _source(layout, expert), norm_shape, first, count)
        ]
        yield layout.task(norm, (heads, P), *bands)


def _shared(layout: Layout, prefix: str) -> Iterator[TensorTask]:
    """One set of keys and values for all experts: the mean of the sources'."""
    for name in layout.shapes:
        if name.startswith((f"{prefix}.k_", f"{prefix}.v_")):
            yield unmixed_task(layout, name)


def _output(layout: Layout, prefix: str, runs: list[tuple[int, int, int]]) -> Iterator[TensorTask]:
    """The output projection, columns in the order of the query heads; its bias is one per expert."""
    dense, D, P = layout.dense, layout.dense.hidden_size, layout.dense.head_dim
    A, H = layout.model.num_attention_experts, layout.dense.num_attention_heads
    weight, bias = f"{prefix}.o_proj.weight", f"{prefix}.o_proj.bias"
    pieces = tuple(
        Piece(weight, _source(layout, expert), H * P, first_column=first * P, columns=count * P)
        for expert, first, count in runs
    )
    yield layout.task(weight, (D, A * H * P), Band(D, pieces))
    if dense.attention_output_bias:
        yield layout.task(bias, (A, D), *(whole(bias, _source(layout, a), (D,)) for a in range(A)))
