"""LoRA adapters on a base, read as the model they make: row by row, base + scale * B @ A in float32."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.checkpoint import (
    Checkpoint,
    StoredTensor,
    expanded,
    files_of,
    read_header,
    read_json,
    read_tensors,
)
from upcycle.dtypes import STORAGE, all_finite, to_float32
from upcycle.errors import UpcycleError
from upcycle.sources.pytorch import read_pickled

ADAPTER_CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
# What an adapter may be beside its two matrices, or start from instead of its base, and what is allowed here.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"), (False,)),
    **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config"), (None, False)),
}
_MERGE = "merge it into its base and use the merged model"


@dataclass(frozen=True)
class AdapterSource:
    """An adapter and the model it is put on, where the adapter's own folder does not say which."""

    base: str
    adapter: str

    def __str__(self) -> str:
        return f"{self.adapter} on {self.base}"


def open_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """The base with the adapter's matrices added; the adapted tensors are float32.

    Raises:
        UpcycleError: the adapter is damaged, belongs to another base, or is more than plain LoRA matrices.
    """
    if base.adapter is not None or base.reader is not None:
        raise UpcycleError(f"{folder}: the base of an adapter must be a folder of weights, got {base.folder}")
    config = read_adapter_config(folder)
    _check_base(config, base, folder)
    tensors = read_tensors(folder, "adapter_model.safetensors", read_header) or read_tensors(
        folder, "adapter_model.bin", read_pickled
    )
    if not tensors:
        raise UpcycleError(f"{folder} holds no adapter_model.safetensors with tensors in it; fetch it again")
    adapter = Checkpoint(folder, config, tensors, files_of(tensors))
    pairs = _pairs(adapter)
    shown = dict(base.tensors)
    for name, (a, b) in pairs.items():
        shown[name] = _adapted(name, base, adapter, a, b)
    scales = {name: _scale(adapter, name, tensors[a].shape[0]) for name, (a, _) in pairs.items()}
    reader = partial(AdaptedRows, base, pairs, scales)
    return replace(base, tensors=shown, adapter=adapter, reader=reader)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / ADAPTER_CONFIG)
    for name, allowed in _MUST_BE.items():
        if name in config and config[name] not in allowed:
            raise UpcycleError(
                f"{folder / ADAPTER_CONFIG}: {name} must be {allowed[0]!r}, got {config[name]!r}; {_MERGE}"
            )
    return config


def _check_base(config: Mapping[str, Any], base: Checkpoint, folder: Path) -> None:
    """The name that the adapter gives its base must be one that the base goes by."""
    declared = config.get("base_model_name_or_path")
    if not declared:
        return
    home = base.folder.resolve()
    names = {base.folder.name, home.name, Path(str(base.config_json.get("_name_or_path", ""))).name}
    # a hub cache: models--OWNER--NAME/snapshots/COMMIT
    names.add(home.parent.parent.name.rpartition("--")[2])
    if expanded(str(declared)).resolve() == home or Path(str(declared)).name in names - {""}:
        return
    raise UpcycleError(
        f"{folder}: the adapter was trained on {declared}, not on {base.folder}; where the two are one "
        f"model, say so under base_model_name_or_path in its {ADAPTER_CONFIG}"
    )


def _pairs(adapter: Checkpoint) -> dict[str, tuple[str, str]]:
    """Name of an adapted tensor of the base -> names of its A and B."""
    found: dict[str, dict[str, str]] = {}
    for name in adapter.tensors:
        module, dot, factor = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not dot or factor not in ("A.weight", "B.weight") or not name.startswith(_PREFIX):
            raise UpcycleError(
                f"{adapter.folder}: tensor {name} is no matrix of a plain LoRA adapter; {_MERGE}"
            )
        found.setdefault(f"{module}.weight", {})[factor[0]] = name
    for name, factors in found.items():
        if len(factors) < 2:
            raise UpcycleError(f"{adapter.folder}: {name} has one of its two matrices only; fetch it again")
    return {name: (factors["A"], factors["B"]) for name, factors in found.items()}


def _adapted(name: str, base: Checkpoint, adapter: Checkpoint, a: str, b: str) -> StoredTensor:
    stored = base.tensors.get(name)
    if stored is None:
        raise UpcycleError(
            f"{adapter.folder}: the adapter changes {name}, which {base.folder} has not; it was trained on "
            "another model"
        )
    (*rank_a, columns), (rows, *rank_b) = adapter.tensors[a].shape, adapter.tensors[b].shape
    if len(rank_a) != 1 or rank_a != rank_b or stored.shape != (rows, columns):
        raise UpcycleError(
            f"{adapter.folder}: the adapter of {name} has shapes {adapter.tensors[b].shape} and "
            f"{adapter.tensors[a].shape}, which do not fit {stored.shape} in {base.folder}; it was trained "
            "on another model"
        )
    for tensor in (stored, adapter.tensors[a], adapter.tensors[b]):
        if tensor.dtype not in STORAGE:
            raise UpcycleError(
                f"{adapter.folder}: {name} and its adapter must be of type {', '.join(STORAGE)}, "
                f"got {tensor.dtype}; de-quantise the checkpoint first"
            )
    return replace(stored, dtype="F32")


def _scale(adapter: Checkpoint, name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rslora; the rank is that of the matrices."""
    config = adapter.config_json
    module = name.removesuffix(".weight")
    alpha = config.get("lora_alpha")
    for key, value in (config.get("alpha_pattern") or {}).items():
        if _is_named(module, key):
            alpha = value
            break
    expected = config.get("r")
    for key, value in (config.get("rank_pattern") or {}).items():
        if _is_named(module, key):
            expected = value
            break
    if expected != rank or not isinstance(alpha, int | float):
        raise UpcycleError(
            f"{adapter.folder / ADAPTER_CONFIG} says rank {expected!r} and alpha {alpha!r} of {module}, "
            f"whose matrices have rank {rank}; fetch the folder again"
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _is_named(module: str, pattern: str) -> bool:
    """Whether a pattern of alphas or ranks means this module: its name or the end of it.

    Raises:
        UpcycleError: it is a regular expression, whose meaning depends on who reads it.
    """
    if not all(character.isalnum() or character in "._" for character in pattern):
        raise UpcycleError(
            f"the adapter's pattern {pattern!r} in {ADAPTER_CONFIG} must be a module's name; {_MERGE}"
        )
    return module == pattern or module.endswith(f".{pattern}")


class AdaptedRows:
    """Reads rows of a base with an adapter's product added to those it changes; use it in a `with`."""

    def __init__(
        self,
        base: Checkpoint,
        pairs: Mapping[str, tuple[str, str]],
        scales: Mapping[str, float],
        checkpoint: Checkpoint,
    ) -> None:
        assert checkpoint.adapter is not None
        self.checkpoint = checkpoint
        self._base = base.open_rows()
        self._adapter = checkpoint.adapter.open_rows()
        self._pairs = pairs
        self._scales = scales
        self._stack = ExitStack()
        self._read: tuple[str, NDArray, NDArray] | None = None

    def __enter__(self) -> "AdaptedRows":
        self._stack.enter_context(self._base)
        self._stack.enter_context(self._adapter)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self, name: str, width: int, first: int, count: int) -> NDArray:
        """`count` rows from `first` on of a tensor seen as a matrix of `width` columns."""
        if name not in self._pairs:
            return self._base.rows(name, width, first, count)
        columns = self.checkpoint.tensors[name].shape[1]
        start, stop = first * width, (first + count) * width
        top, bottom = start // columns, -(-stop // columns)
        stored = self._base.rows(name, columns, top, bottom - top)
        a, b = self._factors(name)
        merged = to_float32(stored, self._base.checkpoint.tensors[name].dtype) + b[top:bottom] @ a
        return merged.reshape(-1)[start - top * columns : stop - top * columns].reshape(count, width)

    def _factors(self, name: str) -> tuple[NDArray, NDArray]:
        """A, and B times the scale; those of the last tensor are kept."""
        if self._read is None or self._read[0] != name:
            a, b = (self._whole(factor) for factor in self._pairs[name])
            self._read = name, a, b * np.float32(self._scales[name])
        return self._read[1:]

    def _whole(self, name: str) -> NDArray:
        tensor = self._adapter.checkpoint.tensors[name]
        rows, columns = tensor.shape
        values = self._adapter.rows(name, columns, 0, rows)
        if not all_finite(values, tensor.dtype):
            raise UpcycleError(
                f"{self._adapter.checkpoint.folder / tensor.file}: tensor {name} holds NaN or infinite "
                "values; use an adapter whose training did not diverge"
            )
        return to_float32(values, tensor.dtype)
