"""The plan's words: where every byte of an output tensor comes from. Pure data, printable, compared in tests.

An output tensor is a stack of bands; a band is a row of pieces beside each other; a piece is a rectangle of a
source tensor seen as a matrix, or the mean of that rectangle over several sources, maybe with its rows or
columns in another order, and maybe changed. Band after band, row after row, that is the tensor from its
first byte to its last, with a few rows in memory. What is random is drawn from (seed, label) alone.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

# Names of safetensors headers.
ITEM_SIZE = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Shuffled:
    """`count` numbers from `first` on of a random order of 0 … total - 1."""

    total: int
    first: int
    count: int
    seed: int
    label: str


# --- what may happen to the numbers of a piece, in float32, before they are cast ---


@dataclass(frozen=True)
class Scale:
    """All numbers times `factor`."""

    factor: float


@dataclass(frozen=True)
class NormalNoise:
    """Plus independent normal numbers of mean 0, on each number with probability `share`."""

    std: float
    share: float
    seed: int
    label: str


@dataclass(frozen=True)
class UniformNoise:
    """Plus independent numbers between -bound and bound."""

    bound: float
    seed: int
    label: str


@dataclass(frozen=True)
class Redraw:
    """Some rows or columns of the piece become normal numbers of the mean and deviation they had."""

    axis: Literal["rows", "columns"]
    entries: Shuffled
    seed: int
    label: str


Change = Scale | NormalNoise | UniformNoise | Redraw


@dataclass(frozen=True)
class Piece:
    """`columns` columns from `first_column` on of `tensor` seen with `width` columns, from `first_row` on.

    `sources` are indices into the plan's sources; of several, the piece is the mean, summed in float32.
    `row_order` and `column_order` take the rows from `first_row` on, or the columns from `first_column` on,
    in the order of their numbers. `changes` happen one after the other.
    """

    tensor: str
    sources: tuple[int, ...]
    width: int
    first_row: int = 0
    first_column: int = 0
    columns: int = 0  # 0: to the last column
    row_order: Shuffled | None = None
    column_order: Shuffled | None = None
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        if self.columns == 0:
            object.__setattr__(self, "columns", self.width - self.first_column)


@dataclass(frozen=True)
class Band:
    """`rows` rows of the output: the pieces beside each other."""

    rows: int
    pieces: tuple[Piece, ...]

    @property
    def columns(self) -> int:
        return sum(piece.columns for piece in self.pieces)


# --- tensors that no source gives ---


@dataclass(frozen=True)
class Normal:
    """Independent normal numbers of mean 0; each row stands `repeats` times below itself."""

    std: float
    seed: int
    label: str
    repeats: int = 1


@dataclass(frozen=True)
class Orthogonal:
    """Rows of length `norm`, at right angles to each other; each row stands `repeats` times below itself."""

    norm: float
    seed: int
    label: str
    repeats: int = 1


@dataclass(frozen=True)
class Uniform:
    """Independent numbers between -bound and bound at the positions `where`; zero elsewhere."""

    bound: float
    seed: int
    label: str
    where: tuple[int, ...]


@dataclass(frozen=True)
class Zeros:
    """All elements zero."""


@dataclass(frozen=True)
class TensorTask:
    """One output tensor. `content` is a stack of bands, or a fill."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: tuple[Band, ...] | Normal | Orthogonal | Uniform | Zeros

    def __post_init__(self) -> None:
        if isinstance(self.content, tuple):
            planned = sum(band.rows * band.columns for band in self.content)
            assert planned == prod(self.shape), (
                f"{self.name}: {planned} elements planned for shape {self.shape}"
            )

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_SIZE[self.dtype]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Everything that sources give, in order."""
        bands = self.content if isinstance(self.content, tuple) else ()
        return tuple(piece for band in bands for piece in band.pieces)

    @property
    def is_averaged(self) -> bool:
        return any(len(piece.sources) > 1 for piece in self.pieces)

    @property
    def changes(self) -> tuple[Change, ...]:
        """What happens to the numbers of any piece."""
        return tuple(change for piece in self.pieces for change in piece.changes)


@dataclass(frozen=True)
class Assignment:
    """Which source each part of the output comes from (indices into the plan's sources)."""

    feed_forward: tuple[int, ...]  # one per expert
    attention: tuple[int, ...] | None  # one per attention expert; None: no mixture of attention
    rest: tuple[int, ...]  # everything that is no expert: one source, or the mean of several
