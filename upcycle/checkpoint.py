"""Safetensors checkpoints, streamed: a reader that checks every header, a writer that starts with the header.

A file is the header's length (8 bytes, little endian), a JSON header `{name: {dtype, shape, data_offsets}}`,
then the tensors' bytes without gaps. A sharded checkpoint has an index: which file holds which tensor.
"""

import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from operator import index
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from upcycle.dtypes import STORAGE
from upcycle.errors import UpcycleError
from upcycle.tasks import TensorTask

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The largest header that other readers accept.
_MAX_HEADER = 100_000_000
# Of a shape in a header; beyond it a forged one would keep the multiplication of its sizes busy.
_MAX_DIMENSIONS = 16
_MAX_SIZE = 2**63
# Counts in a config.json by which tensors are listed: far beyond any model, and soon listed.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 1000),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_attention_experts"), 4096),
}
_COPY_BYTES = 8 * 2**20  # at once
_FLUSH_BYTES = 32 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` counts from the beginning of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class Reader(Protocol):
    """Rows of the tensors of one checkpoint; use it in a `with`."""

    checkpoint: "Checkpoint"

    def __enter__(self) -> "Reader": ...

    def __exit__(self, *_: object) -> None: ...

    def rows(self, name: str, width: int, first: int, count: int) -> NDArray: ...


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration and where its tensors lie; headers have been checked, weights not read.

    `folder` holds config.json, tokenizer and `files`. What `tensors` says is what `open_rows` gives; without
    a `reader` it also lies there as such. `adapter` is what is put on the folder's model, and `file` the one
    file that takes the place of config.json and tokenizer too.
    """

    folder: Path
    config_json: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[str, ...]
    reader: "Callable[[Checkpoint], Reader] | None" = None
    adapter: "Checkpoint | None" = None
    file: str | None = None
    raw: "Checkpoint | None" = None  # of a view under other names: the source itself

    @property
    def location(self) -> Path:
        """What opens it again."""
        return self.folder / self.file if self.file else self.folder

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{self.adapter.folder} on {self.location}" if self.adapter else str(self.location)

    def open_rows(self) -> Reader:
        return RowReader(self) if self.reader is None else self.reader(self)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read config.json and all headers of a checkpoint folder.

    Raises:
        UpcycleError: a file is missing, truncated or damaged, or the shards and their index disagree.
    """
    folder = expanded(path)
    if not folder.is_dir():
        raise UpcycleError(f"{folder}: there is no such checkpoint folder")
    config_json = read_config(folder)
    tensors = read_tensors(folder, SINGLE_NAME, read_header)
    if tensors is None:
        raise UpcycleError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; save the model as safetensors first"
        )
    return Checkpoint(folder, config_json, tensors, files_of(tensors))


def expanded(path: str | Path) -> Path:
    """The path with the home of `~` or `~user` written out.

    Raises:
        UpcycleError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UpcycleError(f"{path}: there is no home folder of that user") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, whose counts are small enough to list what they count.

    Raises:
        UpcycleError: it is missing or damaged, a count is none, or the family is no text.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UpcycleError(f"{path} is missing; a checkpoint folder must hold it")
    values = read_json(path)
    family = values.get("model_type")
    if family is not None and not isinstance(family, str):
        raise UpcycleError(f"{path}: model_type must be a text, got {family!r}")
    for name, most in _MOST.items():
        value = values.get(name)
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise UpcycleError(f"{path}: {name} must be a whole number from 0 to {most}, got {value!r}")
    return values


def files_of(tensors: dict[str, StoredTensor]) -> tuple[str, ...]:
    return tuple(sorted({tensor.file for tensor in tensors.values()}))


def read_tensors(
    folder: Path, single: str, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor] | None:
    """The tensors of a folder's weight files, one or several with an index; None if it has none of the name.

    Args:
        single: the file's name where there is one; with `.index.json` it is that of the index.
        read: the tensors of one file.
    """
    index_path = folder / f"{single}.index.json"
    if index_path.exists():
        return _sharded(index_path, read_json(index_path), read)
    if (folder / single).exists():
        return read(_inside(folder, single))
    return None


def _inside(folder: Path, file: str) -> Path:
    """The file's path, after its links have been followed: they may lead into a hub cache's store only."""
    path, home = folder / file, folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    target = path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise UpcycleError(f"{path} is a link to {target}, outside its folder; put the file itself there")
    return path


def open_regular(path: Path) -> FileIO:
    """The file, unbuffered; a pipe, which would never end, is refused.

    Raises:
        UpcycleError: it cannot be opened, or is no ordinary file.
    """
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise UpcycleError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UpcycleError(f"{path} cannot be read: it is no ordinary file")
    return FileIO(path, opener=lambda *_: file)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, after checking that its bytes are all there and each belongs to one tensor."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UpcycleError(f"{path} is truncated or no safetensors file; fetch it again")
        text = file.read(length)
    try:
        entries = parse_json(text)
        entries.pop("__metadata__", None)
        spans = sorted(_span(name, entry) for name, entry in entries.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UpcycleError(f"{path} has a damaged safetensors header; fetch it again") from None
    tensors = {}
    position = 0
    for start, stop, name, dtype, shape in spans:
        # Types that no plan reads (quantised ones) may have any size.
        expected = prod(shape) * STORAGE[dtype].itemsize if dtype in STORAGE else stop - start
        if start != position or stop < start or stop - start != expected:
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


def _span(name: str, entry: dict[str, Any]) -> tuple[int, int, str, str, tuple[int, ...]]:
    start, stop = map(index, entry["data_offsets"])
    shape = tuple(map(index, entry["shape"]))
    if len(shape) > _MAX_DIMENSIONS or any(not 0 <= size < _MAX_SIZE for size in (start, stop, *shape)):
        raise ValueError
    return start, stop, name, str(entry["dtype"]), shape


def _sharded(
    index_path: Path, values: dict[str, Any], read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    folder = index_path.parent
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UpcycleError(f"{index_path} has no 'weight_map'; fetch it again")
    for name, file in weight_map.items():
        if not _is_file_name(file):
            raise UpcycleError(
                f"{index_path} places tensor {name} in {file!r}, which must be a file of that folder"
            )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = _inside(folder, file)
        if not path.exists():
            raise UpcycleError(f"{path} is missing, but {index_path.name} lists it; fetch it")
        for name, tensor in read(path).items():
            if weight_map.get(name) != file:
                raise UpcycleError(
                    f"{path} holds tensor {name}, which {index_path.name} places in "
                    f"{weight_map.get(name, 'no file')}; fetch the index and the shards from one place"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise UpcycleError(
                f"{folder / file} lacks tensor {name}, which {index_path.name} places there; "
                "fetch the index and the shards from one place"
            )
    return tensors


def _is_file_name(file: object) -> bool:
    return isinstance(file, str) and "\0" not in file and file not in ("", "..") and Path(file).name == file


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UpcycleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UpcycleError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def parse_json(text: bytes) -> Any:
    """JSON in UTF-8, of which programs cannot disagree what it says: no name twice.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return values


@dataclass(frozen=True)
class FileSpan:
    """`nbytes` bytes of a tensor, from byte `start` of its file on."""

    file: FileIO
    start: int
    nbytes: int
    tensor: str


class RowReader:
    """Reads rows of tensors that lie in files as they are. Keeps its files open; use it in a `with`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, FileIO] = {}
        # Spans all of whose numbers have been seen to be finite.
        self.checked: set[FileSpan] = set()

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def rows(self, name: str, width: int, first: int, count: int) -> NDArray:
        """`count` rows from `first` on of a tensor seen as a matrix of `width` columns, as stored."""
        span = self.span(name, width, first, count)
        values = np.empty((count, width), STORAGE[self.checkpoint.tensors[name].dtype])
        if not read_into(span.file, span.start, values):
            raise _became_shorter(span)
        return values

    def span(self, name: str, width: int, first: int, count: int) -> FileSpan:
        """Where these rows lie."""
        tensor = self.checkpoint.tensors[name]
        if tensor.file not in self._files:
            self._files[tensor.file] = open_regular(self.checkpoint.folder / tensor.file)
        row_bytes = width * STORAGE[tensor.dtype].itemsize
        start = tensor.start + first * row_bytes
        return FileSpan(self._files[tensor.file], start, count * row_bytes, name)


def _became_shorter(span: FileSpan) -> UpcycleError:
    return UpcycleError(
        f"{span.file.name}, tensor {span.tensor}: the file became shorter while it was read; fetch it again"
    )


def read_into(file: FileIO, start: int, values: NDArray) -> bool:
    """Fill an array with a file's bytes from `start` on; False if the file ends before."""
    file.seek(start)
    left = values.reshape(-1).view(np.uint8).data
    while left:
        got = file.readinto(left)
        if not got:
            return False
        left = left[got:]
    return True


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
    path: Path,
    shard: Shard,
    chunks: Iterable[NDArray | FileSpan],
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a file from the bytes of its tensors in order, and hand it to the disk.

    It has its name when it is whole. `advance` is called with the number of bytes after every piece.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("wb", buffering=0) as file:
        _write_all(file, shard.header())
        waiting = 0  # bytes that have not been sent to the disk
        for chunk in chunks:
            if isinstance(chunk, FileSpan):
                _copy_span(file, chunk)
            else:
                _write_all(file, np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
            advance(chunk.nbytes)
            waiting += chunk.nbytes
            if waiting >= _FLUSH_BYTES:
                _start_flush(file, waiting)
                waiting = 0
        os.fsync(file.fileno())
    part.chmod(0o644)
    os.replace(part, path)


def _start_flush(file: FileIO, num_bytes: int) -> None:
    """Send the last bytes to the disk while the next are made: otherwise it idles until the file ends."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), file.tell() - num_bytes, num_bytes, os.POSIX_FADV_DONTNEED)


def _copy_span(file: FileIO, span: FileSpan) -> None:
    """By the kernel where it can copy between files, which saves two ways through this process' memory."""
    position, stop = span.start, span.start + span.nbytes
    while position < stop:
        count = min(stop - position, _COPY_BYTES)
        if sys.platform == "linux":
            copied = os.sendfile(file.fileno(), span.file.fileno(), position, count)
        else:
            span.file.seek(position)
            data = span.file.read(count)
            _write_all(file, data)
            copied = len(data)
        if not copied:
            raise _became_shorter(span)
        position += copied


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
