"""Bytes of a tensor task, a few rows at a time: read, check, average, cast."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from math import prod

import numpy as np
from numpy.typing import NDArray

from upcycle.checkpoint import Reader
from upcycle.dtypes import STORAGE, all_finite, from_float32, to_float32
from upcycle.errors import UpcycleError
from upcycle.tasks import Band, Normal, Orthogonal, Piece, TensorTask, Zeros

# Bytes of rows held at once, over all sources, as if all were float32; large enough that calls cost nothing.
CHUNK_BYTES = 8 * 2**20


def chunks(task: TensorTask, readers: Sequence[Reader]) -> Iterator[NDArray]:
    """The tensor from its first element to its last, in its stored type.

    Raises:
        UpcycleError: a source element is not finite, or too large for the output's type.
    """
    match task.content:
        case Zeros():
            yield np.zeros(prod(task.shape), STORAGE[task.dtype])
        case Normal() as normal:
            yield from_float32(_draw(normal, task.shape), task.dtype)
        case Orthogonal() as orthogonal:
            yield from_float32(_draw_orthogonal(orthogonal, task.shape), task.dtype)
        case bands:
            for band in bands:
                yield from _band_chunks(task, band, readers)


def are_equal(first: str, second: str, reader: Reader) -> bool:
    """True if two matrices of one checkpoint hold the same numbers."""
    one, other = (reader.checkpoint.tensors[name] for name in (first, second))
    if one.shape != other.shape or not {one.dtype, other.dtype} <= STORAGE.keys():
        return False
    rows, width = one.shape
    step = max(1, CHUNK_BYTES // (8 * width))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part = to_float32(reader.rows(first, width, start, count), one.dtype)
        if not np.array_equal(part, to_float32(reader.rows(second, width, start, count), other.dtype)):
            return False
    return True


def _draw(normal: Normal, shape: tuple[int, ...]) -> NDArray[np.float32]:
    generator = _generator(normal.seed, normal.label)
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(normal.std)


def _draw_orthogonal(orthogonal: Orthogonal, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Gram-Schmidt of normal rows, in float64 by a QR decomposition whose signs are made unique."""
    rows, width = shape
    drawn = _generator(orthogonal.seed, orthogonal.label).standard_normal((width, rows))
    q, r = np.linalg.qr(drawn)
    return (orthogonal.norm * (q * np.sign(np.diagonal(r))).T).astype(np.float32)


def _generator(seed: int, label: str) -> np.random.Generator:
    key = int.from_bytes(sha256(f"{seed} {label}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def _band_chunks(task: TensorTask, band: Band, readers: Sequence[Reader]) -> Iterator[NDArray]:
    widest = max(band.columns, *(piece.width for piece in band.pieces))
    sources = {source for piece in band.pieces for source in piece.sources}
    step = max(1, CHUNK_BYTES // (4 * widest * len(sources)))
    for first in range(0, band.rows, step):
        count = min(step, band.rows - first)
        # Pieces of one band may read the same rows (heads of one projection): each is read once.
        read: dict[tuple[int, str, int], NDArray] = {}
        parts = [_piece_rows(task, piece, readers, first, count, read) for piece in band.pieces]
        yield parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _piece_rows(
    task: TensorTask,
    piece: Piece,
    readers: Sequence[Reader],
    first: int,
    count: int,
    read: dict[tuple[int, str, int], NDArray],
) -> NDArray:
    for source in piece.sources:
        key = (source, piece.tensor, piece.first_row)
        if key not in read:
            read[key] = _checked_rows(piece, readers[source], piece.first_row + first, count)
    stored = [read[source, piece.tensor, piece.first_row] for source in piece.sources]
    dtypes = [readers[source].checkpoint.tensors[piece.tensor].dtype for source in piece.sources]
    columns = slice(piece.first_column, piece.first_column + piece.columns)
    if dtypes == [task.dtype]:
        return stored[0][:, columns]
    total = to_float32(stored[0][:, columns], dtypes[0])
    for rows, dtype in zip(stored[1:], dtypes[1:], strict=True):
        total = total + to_float32(rows[:, columns], dtype)
    cast = from_float32(np.ascontiguousarray(total / np.float32(len(stored))), task.dtype)
    if not all_finite(cast, task.dtype):
        raise UpcycleError(
            f"{task.name}: a value of {piece.tensor} is too large for {task.dtype}; "
            "set 'dtype' to bfloat16 or float32"
        )
    return cast


def _checked_rows(piece: Piece, reader: Reader, first: int, count: int) -> NDArray:
    rows = reader.rows(piece.tensor, piece.width, first, count)
    tensor = reader.checkpoint.tensors[piece.tensor]
    if not all_finite(rows, tensor.dtype):
        raise UpcycleError(
            f"{reader.checkpoint.folder / tensor.file}: tensor {piece.tensor} holds NaN or infinite values; "
            "use a checkpoint whose training did not diverge"
        )
    return rows
