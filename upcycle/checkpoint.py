"""Safetensors checkpoints, streamed: a reader that checks every header, a writer that starts with the header.

A file is the header's length (8 bytes, little endian), a JSON header `{name: {dtype, shape, data_offsets}}`,
then the tensors' bytes without gaps. A sharded checkpoint has an index: which file holds which tensor.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.dtypes import STORAGE
from upcycle.errors import UpcycleError
from upcycle.tasks import TensorTask

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The largest header that other readers accept.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` counts from the beginning of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors files whose headers have been checked."""

    folder: Path
    config_json: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[str, ...]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read config.json and all headers of a checkpoint folder.

    Raises:
        UpcycleError: a file is missing, truncated or damaged, or the shards and their index disagree.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UpcycleError(f"{folder}: there is no such checkpoint folder")
    config_path = folder / "config.json"
    if not config_path.exists():
        raise UpcycleError(f"{config_path} is missing; a checkpoint folder must hold it")
    config_json = read_json(config_path)
    if (folder / INDEX_NAME).exists():
        tensors = _sharded(folder, read_json(folder / INDEX_NAME))
    elif (folder / SINGLE_NAME).exists():
        tensors = read_header(folder / SINGLE_NAME)
    else:
        raise UpcycleError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; save the model as safetensors first"
        )
    files = tuple(sorted({tensor.file for tensor in tensors.values()}))
    return Checkpoint(folder, config_json, tensors, files)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, after checking that its bytes are all there and each belongs to one tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UpcycleError(f"{path} is truncated or no safetensors file; fetch it again")
            text = file.read(length)
    except OSError as error:
        raise UpcycleError(f"{path} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        spans = sorted(
            (*map(index, entry["data_offsets"]), name, str(entry["dtype"]), tuple(map(index, entry["shape"])))
            for name, entry in entries.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UpcycleError(f"{path} has a damaged safetensors header; fetch it again") from None
    tensors = {}
    position = 0
    for start, stop, name, dtype, shape in spans:
        # Types that no plan reads (quantised ones) may have any size.
        expected = prod(shape) * STORAGE[dtype].itemsize if dtype in STORAGE else stop - start
        if start != position or stop - start != expected:
            raise UpcycleError(
                f"{path}: tensor {name} has a damaged entry in the header; fetch the file again"
            )
        position = stop
        tensors[name] = StoredTensor(path.name, dtype, shape, 8 + length + start)
    if 8 + length + position != size:
        raise UpcycleError(
            f"{path} is truncated or damaged: by its header it must have {8 + length + position} bytes, "
            f"got {size}; fetch it again"
        )
    return tensors


def _sharded(folder: Path, values: dict[str, Any]) -> dict[str, StoredTensor]:
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UpcycleError(f"{folder / INDEX_NAME} has no 'weight_map'; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file == ".." or Path(file).name != file:
            raise UpcycleError(
                f"{folder / INDEX_NAME} places tensor {name} in {file!r}, which must be a file of that folder"
            )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if not path.exists():
            raise UpcycleError(f"{path} is missing, but {INDEX_NAME} lists it; fetch it")
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != file:
                raise UpcycleError(
                    f"{path} holds tensor {name}, which {INDEX_NAME} places in "
                    f"{weight_map.get(name, 'no file')}; fetch the index and the shards from one place"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise UpcycleError(
                f"{folder / file} lacks tensor {name}, which {INDEX_NAME} places there; "
                "fetch the index and the shards from one place"
            )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UpcycleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UpcycleError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


class RowReader:
    """Reads rows of tensors of one checkpoint. Keeps its files open; use it in a `with`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, FileIO] = {}

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def rows(self, name: str, width: int, first: int, count: int) -> NDArray:
        """`count` rows from `first` on of a tensor seen as a matrix of `width` columns, as stored."""
        tensor = self.checkpoint.tensors[name]
        storage = STORAGE[tensor.dtype]
        path = self.checkpoint.folder / tensor.file
        if tensor.file not in self._files:
            self._files[tensor.file] = path.open("rb", buffering=0)
        values = np.empty((count, width), storage)
        file = self._files[tensor.file]
        file.seek(tensor.start + first * width * storage.itemsize)
        left = values.reshape(-1).view(np.uint8).data
        while left:
            got = file.readinto(left)
            if not got:
                raise UpcycleError(f"{path} became shorter while tensor {name} was read; fetch it again")
            left = left[got:]
        return values


# --- writing ---


@dataclass(frozen=True)
class Shard:
    """One file of the output."""

    name: str
    tasks: tuple[TensorTask, ...]

    @property
    def num_bytes(self) -> int:
        return sum(task.num_bytes for task in self.tasks)

    def header(self) -> bytes:
        """Length and JSON, padded so that the first tensor starts at a multiple of 8."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for task in self.tasks:
            stop = position + task.num_bytes
            entries[task.name] = {
                "dtype": task.dtype,
                "shape": list(task.shape),
                "data_offsets": [position, stop],
            }
            position = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def make_shards(tasks: Sequence[TensorTask], max_bytes: int) -> tuple[Shard, ...]:
    """Tensors in the given order, files of at most `max_bytes` where no single tensor is larger."""
    groups: list[list[TensorTask]] = [[]]
    filled = 0
    for task in tasks:
        if groups[-1] and filled + task.num_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(task)
        filled += task.num_bytes
    if len(groups) == 1:
        return (Shard(SINGLE_NAME, _aligned(groups[0])),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", _aligned(group))
        for number, group in enumerate(groups, start=1)
    )


def _aligned(tasks: list[TensorTask]) -> tuple[TensorTask, ...]:
    """Widest numbers first, so that every tensor starts at a multiple of its number's size."""
    return tuple(sorted(tasks, key=lambda task: -STORAGE[task.dtype].itemsize))


def index_json(shards: Sequence[Shard]) -> dict[str, Any]:
    total = sum(shard.num_bytes for shard in shards)
    weight_map = {task.name: shard.name for shard in shards for task in shard.tasks}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_shard(
    path: Path, shard: Shard, chunks: Iterable[NDArray], advance: Callable[[int], object] = lambda _: None
) -> None:
    """Write a file from the bytes of its tensors in order, and hand it to the disk.

    `advance` is called with the number of bytes after every piece.
    """
    with path.open("wb", buffering=0) as file:
        _write_all(file, shard.header())
        for chunk in chunks:
            _write_all(file, np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
            advance(chunk.nbytes)
        os.fsync(file.fileno())
    path.chmod(0o644)


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
