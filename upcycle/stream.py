"""Bytes of a tensor task, a few rows at a time: read, check, average, change, cast."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from math import prod

import numpy as np
from numpy.typing import NDArray

from upcycle.checkpoint import FileSpan, Reader, RowReader
from upcycle.dtypes import STORAGE, all_finite, from_float32, to_float32
from upcycle.errors import UpcycleError
from upcycle.tasks import (
    Band,
    Change,
    Normal,
    NormalNoise,
    Orthogonal,
    Piece,
    Redraw,
    Scale,
    Shuffled,
    TensorTask,
    Uniform,
    UniformNoise,
    Zeros,
)

# Bytes of rows held at once, over all sources, as if all were float32; large enough that calls cost nothing.
CHUNK_BYTES = 8 * 2**20

Rows = NDArray[np.float32]
# (rows of a piece from its first to its last, in turn; the number of the first) -> changed rows
Changer = Callable[[Rows, int], Rows]


def chunks(task: TensorTask, readers: Sequence[Reader]) -> Iterator[NDArray | FileSpan]:
    """The tensor from its first element to its last, in its stored type: values, or where they lie.

    Raises:
        UpcycleError: a source element is not finite, or too large for the output's type.
    """
    match task.content:
        case Zeros():
            step = CHUNK_BYTES // 4
            for first in range(0, prod(task.shape), step):
                yield np.zeros(min(step, prod(task.shape) - first), STORAGE[task.dtype])
        case Normal() as normal:
            yield _cast_drawn(_draw(normal, task.shape), task)
        case Orthogonal() as orthogonal:
            yield _cast_drawn(_draw_orthogonal(orthogonal, task.shape), task)
        case Uniform() as uniform:
            values = np.zeros(task.shape, np.float32)
            values[list(uniform.where)] = _uniform(
                _generator(uniform.seed, uniform.label), uniform.bound, (len(uniform.where), *task.shape[1:])
            )
            yield _cast_drawn(values, task)
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


# --- what is random ---


def _generator(seed: int, label: str) -> np.random.Generator:
    key = int.from_bytes(sha256(f"{seed} {label}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def _draw(normal: Normal, shape: tuple[int, ...]) -> Rows:
    drawn = _generator(normal.seed, normal.label).standard_normal(
        (shape[0] // normal.repeats, *shape[1:]), dtype=np.float32
    )
    return np.repeat(drawn * np.float32(normal.std), normal.repeats, axis=0)


def _draw_orthogonal(orthogonal: Orthogonal, shape: tuple[int, ...]) -> Rows:
    """Gram-Schmidt of normal rows, in float64 by a QR decomposition whose signs are made unique."""
    rows, width = shape[0] // orthogonal.repeats, shape[1]
    drawn = _generator(orthogonal.seed, orthogonal.label).standard_normal((width, rows))
    q, r = np.linalg.qr(drawn)
    basis = (orthogonal.norm * (q * np.sign(np.diagonal(r))).T).astype(np.float32)
    return np.repeat(basis, orthogonal.repeats, axis=0)


def _uniform(generator: np.random.Generator, bound: float, shape: tuple[int, ...]) -> Rows:
    return (generator.random(shape, dtype=np.float32) * 2 - 1) * np.float32(bound)


def _cast_drawn(values: Rows, task: TensorTask) -> NDArray:
    cast = from_float32(values, task.dtype)
    if not all_finite(cast, task.dtype):
        raise UpcycleError(
            f"{task.name}: a drawn value is too large for {task.dtype}; draw smaller ones (router.std, "
            "router.row_norm, replicate.noise), or set 'dtype' to bfloat16 or float32"
        )
    return cast


@lru_cache(maxsize=16)
def numbers(shuffled: Shuffled) -> NDArray[np.int64]:
    """The numbers that a `Shuffled` stands for, in its order."""
    order = _generator(shuffled.seed, shuffled.label).permutation(shuffled.total)
    return order[shuffled.first : shuffled.first + shuffled.count]


# --- pieces ---


def _band_chunks(task: TensorTask, band: Band, readers: Sequence[Reader]) -> Iterator[NDArray | FileSpan]:
    reader = _reader_as_stored(task, band, readers)
    if reader is None:
        yield from _band_values(task, band, readers)
        return
    (piece,) = band.pieces
    span = reader.span(piece.tensor, piece.width, piece.first_row, band.rows)
    if span in reader.checked:  # as for every expert but the first of copies
        yield span
        return
    yield from _band_values(task, band, readers)
    reader.checked.add(span)


def _reader_as_stored(task: TensorTask, band: Band, readers: Sequence[Reader]) -> RowReader | None:
    """The reader of the file that holds the band's bytes one after the other as they are written, if any."""
    piece = band.pieces[0]
    reader = readers[piece.sources[0]]
    whole_rows = len(band.pieces) == 1 and piece.columns == piece.width and len(piece.sources) == 1
    if not whole_rows or piece.row_order or piece.column_order or piece.changes:
        return None
    if not isinstance(reader, RowReader) or reader.checkpoint.tensors[piece.tensor].dtype != task.dtype:
        return None
    return reader


def _band_values(task: TensorTask, band: Band, readers: Sequence[Reader]) -> Iterator[NDArray]:
    step = _rows_at_once(band.pieces)
    changers = [
        [_changer(change, piece, band.rows, readers) for change in piece.changes] for piece in band.pieces
    ]
    for first in range(0, band.rows, step):
        count = min(step, band.rows - first)
        # Pieces of one band may read the same rows (heads of one projection): each is read once.
        read: dict[tuple[int, str, int, Shuffled | None], NDArray] = {}
        parts = []
        for piece, of_piece in zip(band.pieces, changers, strict=True):
            stored = _stored_rows(piece, readers, first, count, read)
            parts.append(_output_rows(task, piece, of_piece, readers, stored, first))
        yield parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _rows_at_once(pieces: tuple[Piece, ...]) -> int:
    widest = max(sum(piece.columns for piece in pieces), *(piece.width for piece in pieces))
    sources = {source for piece in pieces for source in piece.sources}
    # A change holds copies of the rows.
    copies = 4 if any(piece.changes for piece in pieces) else 1
    return max(1, CHUNK_BYTES // (4 * widest * len(sources) * copies))


def _stored_rows(
    piece: Piece,
    readers: Sequence[Reader],
    first: int,
    count: int,
    read: dict[tuple[int, str, int, Shuffled | None], NDArray],
) -> list[NDArray]:
    """Whole rows of each source, as they are stored, unchecked."""
    keys = [(source, piece.tensor, piece.first_row, piece.row_order) for source in piece.sources]
    for key in keys:
        if key not in read:
            read[key] = _rows(piece, readers[key[0]], first, count)
    return [read[key] for key in keys]


def _rows(piece: Piece, reader: Reader, first: int, count: int) -> NDArray:
    if piece.row_order is None:
        return reader.rows(piece.tensor, piece.width, piece.first_row + first, count)
    wanted = piece.first_row + numbers(piece.row_order)[first : first + count]
    return np.concatenate([reader.rows(piece.tensor, piece.width, int(row), 1) for row in wanted])


def _check_finite(piece: Piece, readers: Sequence[Reader], stored: list[NDArray]) -> None:
    for source, rows in zip(piece.sources, stored, strict=True):
        checkpoint = readers[source].checkpoint
        tensor = checkpoint.tensors[piece.tensor]
        if not all_finite(rows, tensor.dtype):
            raise UpcycleError(
                f"{checkpoint.folder / tensor.file}: tensor {piece.tensor} holds NaN or infinite values; "
                "use a checkpoint whose training did not diverge"
            )


def _output_rows(
    task: TensorTask,
    piece: Piece,
    changers: list[Changer],
    readers: Sequence[Reader],
    stored: list[NDArray],
    first: int,
) -> NDArray:
    """The piece's columns of stored rows, averaged, changed and cast."""
    if not changers and _dtypes(piece, readers) == [task.dtype]:
        _check_finite(piece, readers, stored)
        return stored[0][:, _columns(piece)]
    values = _mean(piece, readers, stored)
    for change in changers:
        values = change(values, first)
    cast = from_float32(np.ascontiguousarray(values), task.dtype)
    if not all_finite(cast, task.dtype):
        raise UpcycleError(
            f"{task.name}: a value of {piece.tensor} is too large for {task.dtype}; "
            "set 'dtype' to bfloat16 or float32"
        )
    return cast


def _dtypes(piece: Piece, readers: Sequence[Reader]) -> list[str]:
    return [readers[source].checkpoint.tensors[piece.tensor].dtype for source in piece.sources]


def _columns(piece: Piece) -> slice | NDArray[np.int64]:
    if piece.column_order is None:
        return slice(piece.first_column, piece.first_column + piece.columns)
    return piece.first_column + numbers(piece.column_order)


def _mean(piece: Piece, readers: Sequence[Reader], stored: list[NDArray]) -> Rows:
    """The piece's columns of the mean over its sources, all of whose numbers are finite."""
    columns, dtypes = _columns(piece), _dtypes(piece, readers)
    first = stored[0][:, columns]
    # memory of its own, because changes write to it
    total, part = np.empty(first.shape, np.float32), np.empty(first.shape, np.float32)
    to_float32(first, dtypes[0], out=total)
    with np.errstate(over="ignore"):  # is told below
        for rows, dtype in zip(stored[1:], dtypes[1:], strict=True):
            total += to_float32(rows[:, columns], dtype, out=part)
    if len(stored) > 1:
        total /= np.float32(len(stored))
    # a sum is finite only if all its numbers are
    if not all_finite(total, "F32"):
        _check_finite(piece, readers, stored)
    return total


# --- changes ---


def _changer(change: Change, piece: Piece, rows: int, readers: Sequence[Reader]) -> Changer:
    """`change` for the rows of a piece in turn: random numbers go on where the last rows stopped."""
    match change:
        case Scale(factor):
            return lambda values, _: values * np.float32(factor)
        case UniformNoise(bound, seed, label):
            generator = _generator(seed, label)
            return lambda values, _: values + _uniform(generator, bound, values.shape)
        case NormalNoise():
            return _normal_noise(change)
        case Redraw():
            return _redraw(change, piece, rows, readers)


def _normal_noise(noise: NormalNoise) -> Changer:
    generator = _generator(noise.seed, noise.label)
    # Apart, so that the numbers do not depend on how many rows come at once.
    choice = _generator(noise.seed, f"{noise.label} where")

    def add(values: Rows, _: int) -> Rows:
        drawn = generator.standard_normal(values.shape, dtype=np.float32) * np.float32(noise.std)
        if noise.share < 1:
            drawn *= choice.random(values.shape, dtype=np.float32) < noise.share
        return values + drawn

    return add


def _redraw(redraw: Redraw, piece: Piece, rows: int, readers: Sequence[Reader]) -> Changer:
    chosen = np.zeros(redraw.entries.total, bool)
    chosen[numbers(redraw.entries)] = True

    def where(values: Rows, first: int) -> tuple[slice | NDArray[np.bool_], ...]:
        if redraw.axis == "rows":
            return (chosen[first : first + len(values)],)
        return (slice(None), chosen)

    mean, std = _statistics(piece, rows, readers, where)
    generator = _generator(redraw.seed, redraw.label)

    def replace(values: Rows, first: int) -> Rows:
        index = where(values, first)
        drawn = generator.standard_normal(values[index].shape, dtype=np.float32)
        values[index] = mean + std * drawn
        return values

    return replace


def _statistics(
    piece: Piece,
    rows: int,
    readers: Sequence[Reader],
    where: Callable[[Rows, int], tuple[slice | NDArray[np.bool_], ...]],
) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation of some entries of a piece, in a pass of its own over its rows."""
    step = _rows_at_once((piece,))
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, rows, step):
        stored = _stored_rows(piece, readers, first, min(step, rows - first), {})
        values = _mean(piece, readers, stored)
        entries = values[where(values, first)].astype(np.float64)
        count += entries.size
        total += float(entries.sum())
        squares += float(np.square(entries).sum())
    mean = total / count
    return np.float32(mean), np.float32(np.sqrt(max(0.0, squares / count - mean**2)))
