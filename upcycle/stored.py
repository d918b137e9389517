"""Families that store their tensors under other names, or several in one: a view of a source under our names.

Each row of ours is a row of a stored tensor; what a family fuses (queries, keys and values; gate and up) is
told apart by where the rows lie. So a view reads what a method asks for, and no method knows the family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.config import ModelConfig
from upcycle import names
from upcycle.checkpoint import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredRows:
    """Rows of a stored tensor that are one of ours: `run` rows of every `step`, from row `first` on.

    `run` 0: all rows, in one piece.
    """

    tensor: str
    first: int = 0
    run: int = 0
    step: int = 0


@dataclass(frozen=True)
class StoredNames:
    """How a family names its tensors. `parts` of a layer: ours -> the family's; the others are named alike.

    `joined`: of parts that lie in one stored tensor, which rows. `ignored`: ends of the names of tables that
    old checkpoints store and every model computes for itself.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    heads: tuple[str, ...] = ("lm_head",)
    parts: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, StoredRows] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


# --- the families ---


def _fused_by_head(config: ModelConfig, tensor: str) -> dict[str, StoredRows]:
    """Per key-value head: its queries, its key, its value."""
    P, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    step = (group + 2) * P
    return {
        "self_attn.q_proj": StoredRows(tensor, 0, group * P, step),
        "self_attn.k_proj": StoredRows(tensor, group * P, P, step),
        "self_attn.v_proj": StoredRows(tensor, (group + 1) * P, P, step),
    }


def _phi3(config: ModelConfig) -> StoredNames:
    queries, keys = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    qkv, gate_up, width = "self_attn.qkv_proj", "mlp.gate_up_proj", config.intermediate_size
    joined = {
        "self_attn.q_proj": StoredRows(qkv, 0, queries, queries),
        "self_attn.k_proj": StoredRows(qkv, queries, keys, keys),
        "self_attn.v_proj": StoredRows(qkv, queries + keys, keys, keys),
        "mlp.gate_proj": StoredRows(gate_up, 0, width, width),
        "mlp.up_proj": StoredRows(gate_up, width, width, width),
    }
    return StoredNames(joined=joined)


def _starcoder2(config: ModelConfig) -> StoredNames:
    return StoredNames(parts={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})


def _gpt_neox(config: ModelConfig) -> StoredNames:
    return StoredNames(
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        heads=("embed_out", "lm_head"),
        parts={
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        joined=_fused_by_head(config, "attention.query_key_value"),
        ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    )


def _phi(config: ModelConfig) -> StoredNames:
    return StoredNames(
        final_norm="model.final_layernorm",
        parts={"self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
    )


def _gptj(config: ModelConfig) -> StoredNames:
    attention = {f"self_attn.{name}_proj": f"attn.{name}_proj" for name in "qkv"}
    return StoredNames(
        embedding="transformer.wte",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        parts={
            "input_layernorm": "ln_1",
            **attention,
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "mlp.fc_in",
            "mlp.down_proj": "mlp.fc_out",
        },
        ignored=("attn.bias", "attn.masked_bias"),
    )


def _falcon(config: ModelConfig) -> StoredNames:
    parts = {
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    if config.block == "parallel" and config.num_norms == 2:
        parts |= {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
    return StoredNames(
        embedding="transformer.word_embeddings",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        parts=parts,
        joined=_fused_by_head(config, "self_attention.query_key_value"),
    )


# Families that are not here name their tensors as Llama does.
_FAMILIES = {
    "phi3": _phi3,
    "starcoder2": _starcoder2,
    "gpt_neox": _gpt_neox,
    "phi": _phi,
    "gptj": _gptj,
    "falcon": _falcon,
}


# --- what a source holds, and its view ---


def stored_names(source: Checkpoint, config: ModelConfig) -> StoredNames:
    family = _FAMILIES.get(source.config_json["model_type"])
    return StoredNames() if family is None else family(config)


def stored_rows(
    source: Checkpoint, config: ModelConfig, shapes: Shapes | None = None
) -> dict[str, StoredRows]:
    """Where each tensor lies in the source, and the head also where it is tied.

    Args:
        shapes: of the tensors by our names; None: those of a dense model, `names.dense_shapes(config)`.
    """
    shapes = names.dense_shapes(config) if shapes is None else shapes
    stored = stored_names(source, config)
    head = next((head for head in stored.heads if f"{head}.weight" in source.tensors), stored.heads[0])
    outside = {"embed_tokens": stored.embedding, "norm": stored.final_norm, "lm_head": head}
    rows = {}
    for name in (*shapes, names.HEAD):
        module, _, kind = name.removeprefix("model.").rpartition(".")
        if module in outside:
            rows[name] = StoredRows(f"{outside[module]}.{kind}")
            continue
        _, number, part = module.split(".", 2)
        place = stored.joined.get(part) or StoredRows(stored.parts.get(part, part))
        rows[name] = replace(place, tensor=f"{stored.layers}.{number}.{place.tensor}.{kind}")
    return rows


def stored_shapes(
    source: Checkpoint, config: ModelConfig, shapes: Shapes | None = None
) -> dict[str, tuple[int, ...]]:
    """Every tensor that the source must hold, under its own name. Arguments as of `stored_rows`."""
    shapes = names.dense_shapes(config) if shapes is None else shapes
    in_one_row = config.qk_norm == "joint_rms_norm" and source.config_json["model_type"] != "moe_runtime"
    stored: dict[str, tuple[int, ...]] = {}
    rows = stored_rows(source, config, shapes)
    for name, shape in shapes.items():
        if in_one_row and name.endswith(names.HEAD_NORMS):
            shape = (prod(shape),)
        tensor = rows[name].tensor
        before = stored[tensor][0] if tensor in stored else 0
        stored[tensor] = (before + shape[0], *shape[1:])
    return stored


def under_our_names(source: Checkpoint, config: ModelConfig, shapes: Shapes | None = None) -> Checkpoint:
    """The source with our names and shapes; a head that is stored though tied stays.

    Args:
        source: holds every tensor of `stored_shapes`.
        config, shapes: as of `stored_rows`.
    """
    shapes = names.dense_shapes(config) if shapes is None else shapes
    rows = stored_rows(source, config, shapes)
    places = {name: place for name, place in rows.items() if place.tensor in source.tensors}
    tensors = {}
    for name, place in places.items():
        tensor = source.tensors[place.tensor]
        tensors[name] = replace(tensor, shape=shapes.get(name, tensor.shape))
    if all(place == StoredRows(name) for name, place in places.items()):
        return replace(source, tensors=tensors)
    return replace(source, tensors=tensors, reader=partial(_ViewReader, source, places), raw=source)


class _ViewReader:
    """Reads rows of our tensors from where a family stores them; use it in a `with`."""

    def __init__(self, source: Checkpoint, places: Mapping[str, StoredRows], view: Checkpoint) -> None:
        self.checkpoint = view
        self._places = places
        self._reader = source.open_rows()

    def __enter__(self) -> "_ViewReader":
        self._reader.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reader.__exit__(*error)

    def rows(self, name: str, width: int, first: int, count: int) -> NDArray:
        """`count` rows from `first` on of a tensor seen as a matrix of `width` columns, as stored."""
        place, shape = self._places[name], self.checkpoint.tensors[name].shape
        if place.run == 0:
            return self._reader.rows(place.tensor, width, first, count)
        of_row = prod(shape[1:])
        run, step = place.run * of_row, place.step * of_row
        start, stop = first * width, (first + count) * width
        parts = []
        while start < stop:
            number, inside = divmod(start, run)
            length = min(run - inside, stop - start)
            position = place.first * of_row + number * step + inside
            parts.append(self._reader.rows(place.tensor, 1, position, length))
            start += length
        if not parts:
            return self._reader.rows(place.tensor, width, 0, 0)
        return np.concatenate(parts).reshape(count, width)
