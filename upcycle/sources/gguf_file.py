"""GGUF files of the Llama and Qwen families: one file with everything, weights mostly quantised.

The package `gguf` reads the file's description and de-quantises rows; a few rows are in memory at a time.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from io import FileIO
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.optional import installed
from upcycle.checkpoint import Checkpoint, StoredTensor, open_regular, read_into
from upcycle.dtypes import STORAGE
from upcycle.errors import UpcycleError

# general.architecture -> model_type. Tensors of others are changed on the way into a GGUF file.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# What a config.json says -> the key behind the architecture's name.
_CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
# Further keys that are read, or that change nothing in a model that _REFUSED lets pass.
_KNOWN_KEYS = (
    *_CONFIG_KEYS.values(),
    "attention.key_length",
    "attention.value_length",
    "expert_used_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
)
# Key -> the values of a plain dense model, and what any other one is.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "rope.scaling.type": (("none",), "scales its rotary positions ({}), which is not read"),
    "rope.scaling.factor": ((0, 1), "scales its rotary positions (by {}), which is not read"),
    "rope.scale_linear": ((0, 1), "scales its rotary positions (by {}), which is not read"),
    "expert_count": ((0,), "is a mixture of {} experts"),
    "attention.sliding_window": ((0,), "has a sliding window, which is not read"),
    "attention.causal": ((True,), "is no causal model"),
}
_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{kind}": f"self_attn.{kind}_proj" for kind in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")},
}
_OTHER = "use the model as safetensors"


@dataclass(frozen=True)
class _Place:
    """`heads`: the rows of so many heads are interleaved; 0: rows are in order."""

    start: int
    row_bytes: int
    kind: Any  # of gguf.GGMLQuantizationType
    heads: int


def open_gguf(path: Path) -> Checkpoint:
    """The model in a GGUF file; tensors stored quantised are shown, and read, as float32.

    Raises:
        UpcycleError: the package `gguf` is missing, the file is damaged, or of another family.
    """
    gguf = _package(path)
    open_regular(path).close()
    try:
        described = gguf.GGUFReader(path)
        values = {name: _value(field) for name, field in described.fields.items() if _is_needed(name)}
    # whatever a forged file makes the package raise
    except Exception:
        raise UpcycleError(f"{path} is truncated or no GGUF file; fetch it again") from None
    config_json = _config_json(path, values, described.tensors)
    tensors, places = {}, {}
    size = path.stat().st_size
    for stored in described.tensors:
        name = _name(path, stored.name)
        if name in tensors:
            raise UpcycleError(f"{path} holds tensor {stored.name} twice; fetch it again")
        shape = tuple(int(length) for length in reversed(stored.shape))
        kind = stored.tensor_type
        if kind.name not in STORAGE and kind not in gguf.quants._type_traits:
            raise UpcycleError(
                f"{path}: tensor {stored.name} is of type {kind.name}, which is not read; {_OTHER}"
            )
        if not prod(shape) or int(stored.data_offset) + int(stored.n_bytes) > size:
            raise UpcycleError(f"{path}: tensor {stored.name} has a damaged entry; fetch the file again")
        dtype = kind.name if kind.name in STORAGE else "F32"
        tensors[name] = StoredTensor(path.name, dtype, shape, int(stored.data_offset))
        row_bytes = int(stored.n_bytes) // prod(shape[:-1])
        places[name] = _Place(int(stored.data_offset), row_bytes, kind, _interleaved_heads(config_json, name))
    reader = partial(QuantisedRows, places)
    return Checkpoint(path.parent, config_json, tensors, (path.name,), reader, file=path.name)


def _package(path: Path) -> ModuleType:
    if installed("gguf") is None:
        raise UpcycleError(
            f"{path} needs the package gguf to be read; install it with: python -m pip install gguf"
        )
    import_module("gguf.quants")
    return import_module("gguf")


# --- the description ---


def _is_needed(name: str) -> bool:
    """All but the tokenizer's lists, which take seconds to read."""
    return not name.startswith("tokenizer.") or name.endswith("_token_id")


def _value(field: Any) -> Any:
    """Fractions are stored in 32 bits: the decimal number that was meant is the shortest that gives them."""
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _config_json(path: Path, values: Mapping[str, Any], tensors: Any) -> dict[str, Any]:
    architecture = values.get("general.architecture")
    if architecture not in _FAMILIES:
        raise UpcycleError(
            f"{path}: general.architecture must be one of {', '.join(_FAMILIES)}, got {architecture!r}; "
            f"{_OTHER}"
        )
    if values.get("split.count", 1) not in (0, 1):
        raise UpcycleError(f"{path} is one part of several; join them with llama-gguf-split --merge first")
    prefix = f"{architecture}."
    family = {name.removeprefix(prefix): values[name] for name in values if name.startswith(prefix)}
    _refuse_more(path, prefix, family)
    missing = [key for key in _CONFIG_KEYS.values() if not isinstance(family.get(key), int | float)]
    if missing:
        raise UpcycleError(f"{path} does not say {architecture}.{missing[0]} as one number; {_OTHER}")
    names = {tensor.name: tensor for tensor in tensors}
    if "token_embd.weight" not in names:
        raise UpcycleError(f"{path} holds no tensor token_embd.weight; it is not complete")
    hidden, heads = family["embedding_length"], family["attention.head_count"]
    if heads < 1 or family["attention.head_count_kv"] < 1:
        raise UpcycleError(f"{path}: {architecture}.attention.head_count must be at least 1, got {heads}")
    head_dim = family.get("attention.key_length", family.get("rope.dimension_count", hidden // heads))
    if family.get("rope.dimension_count", head_dim) != head_dim:
        raise UpcycleError(f"{path} rotates a part of each head, which is not read; {_OTHER}")
    return {
        "model_type": _FAMILIES[architecture],
        **{name: family[key] for name, key in _CONFIG_KEYS.items()},
        "head_dim": head_dim,
        "rope_theta": family.get("rope.freq_base", 10000.0),
        "vocab_size": int(names["token_embd.weight"].shape[-1]),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
        **{
            name: values[f"tokenizer.ggml.{key}_token_id"]
            for name, key in _TOKEN_IDS.items()
            if f"tokenizer.ggml.{key}_token_id" in values
        },
    }


def _refuse_more(path: Path, prefix: str, family: Mapping[str, Any]) -> None:
    """What the description may say beyond the plain dense model of its family."""
    for key, value in family.items():
        if key in _REFUSED:
            allowed, why = _REFUSED[key]
            if value not in allowed:
                raise UpcycleError(f"{path} {why.format(value)}; {_OTHER}")
        elif key not in _KNOWN_KEYS:
            raise UpcycleError(f"{path} says {prefix}{key}, which is not read; {_OTHER}")


def _name(path: Path, name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UpcycleError(f"{path}: tensor {name} has no place in a plain dense model; {_OTHER}")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _interleaved_heads(config_json: Mapping[str, Any], name: str) -> int:
    """In files of the Llama family the two halves of a query or key head are stored row by row in turns."""
    if config_json["model_type"] != "llama":
        return 0
    if ".q_proj." in name:
        return config_json["num_attention_heads"]
    return config_json["num_key_value_heads"] if ".k_proj." in name else 0


# --- rows ---


class QuantisedRows:
    """Reads rows of a GGUF file, de-quantised and in the order of transformers; use it in a `with`."""

    def __init__(self, places: Mapping[str, _Place], checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._places = places
        self._file: FileIO | None = None

    def __enter__(self) -> "QuantisedRows":
        self._file = open_regular(self.checkpoint.location)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def rows(self, name: str, width: int, first: int, count: int) -> NDArray:
        """`count` rows from `first` on of a tensor seen as a matrix of `width` columns."""
        shape, place = self.checkpoint.tensors[name].shape, self._places[name]
        columns, total = shape[-1], prod(shape[:-1])
        start, stop = first * width, (first + count) * width
        # Whole heads where their rows are interleaved, else whole rows.
        block = total // place.heads if place.heads else 1
        top = start // columns // block * block
        bottom = -(-stop // (columns * block)) * block
        values = self._stored(name, top, bottom - top, columns)
        if place.heads:
            halves = values.reshape(-1, block // 2, 2, columns).swapaxes(1, 2)
            values = np.ascontiguousarray(halves)
        return values.reshape(-1)[start - top * columns : stop - top * columns].reshape(count, width)

    def _stored(self, name: str, first: int, count: int, columns: int) -> NDArray:
        import gguf

        assert self._file is not None
        tensor, place = self.checkpoint.tensors[name], self._places[name]
        data = np.empty(count * place.row_bytes, np.uint8)
        if not read_into(self._file, place.start + first * place.row_bytes, data):
            raise UpcycleError(
                f"{self.checkpoint.location} became shorter while tensor {name} was read; fetch it again"
            )
        if place.kind.name in STORAGE:
            return data.view(STORAGE[tensor.dtype]).reshape(count, columns)
        return gguf.quants.dequantize(data.reshape(count, place.row_bytes), place.kind).reshape(
            count, columns
        )
