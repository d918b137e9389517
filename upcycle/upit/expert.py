"""An expert on the disk: the feed-forwards of one fine-tuned model, seen as a whole dense checkpoint.

A folder holds `expert.json`, which names the base, and `expert.safetensors` with what differs from it:

    delta   the tensors minus the base's
    value   the tensors
    lora    NAME.lora_A [R, I] and NAME.lora_B [O, R]

Rows are put together in float32 while they stream: base + delta, or base + lora_B @ lora_A (the scaling is in
lora_B). All other tensors are the base's. So every command that takes a dense checkpoint takes an expert.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from upcycle.checkpoint import Checkpoint, Reader, RowReader, StoredTensor, read_header, read_json
from upcycle.dtypes import all_finite, from_float32, to_float32
from upcycle.errors import UpcycleError
from upcycle.upit.files import write_json, write_tensors

RECORD_NAME = "expert.json"
WEIGHTS_NAME = "expert.safetensors"
LORA_A, LORA_B = ".lora_A", ".lora_B"

Kind = Literal["delta", "value", "lora"]


@dataclass(frozen=True, kw_only=True)
class Expert(Checkpoint):
    """A dense checkpoint of which some tensors are the base's plus what `own` holds."""

    kind: Kind
    base: Checkpoint
    own: Checkpoint  # the tensors of expert.safetensors
    changed: tuple[str, ...]  # names of the tensors that are not the base's

    @property
    def rank(self) -> int:
        """Of kind lora: the largest rank of its factors."""
        return max(tensor.shape[0] for name, tensor in self.own.tensors.items() if name.endswith(LORA_A))


def write_expert(
    folder: Path,
    base: Checkpoint,
    kind: Kind,
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
    chunks: Iterable[NDArray],
) -> None:
    """Write an expert's folder; its record comes last, so that a folder with one is whole.

    Args:
        dtype: of `chunks`, as safetensors names it.
        shapes: of the tensors of expert.safetensors.
        chunks: their stored bytes, in that order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, shapes, dtype, chunks)
    write_json(folder / "config.json", base.config_json)
    write_json(folder / RECORD_NAME, {"base": str(base.folder.absolute()), "kind": kind})


def save_expert(folder: Path, base: Checkpoint, kind: Kind, dtype: str, tensors: Mapping[str, Any]) -> None:
    """Write an expert from torch tensors of a model: of kind delta their difference to the base's.

    Raises:
        UpcycleError: a number is not finite.
    """

    def stored() -> Iterator[NDArray]:
        with base.open_rows() as reader:
            for name, tensor in tensors.items():
                values = numbers(tensor)
                if kind == "delta":
                    values = values - whole_tensor(reader, name)
                rounded = from_float32(np.ascontiguousarray(values), dtype)
                if not all_finite(rounded, dtype):
                    raise UpcycleError(f"{name} holds NaN or infinite values; the training has diverged")
                yield rounded

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_expert(folder, base, kind, dtype, shapes, stored())


def numbers(tensor: Any) -> NDArray[np.float32]:
    """A torch tensor, wherever it is."""
    return tensor.detach().cpu().float().numpy()


def open_expert(path: str | Path) -> Expert:
    """Read the record and all headers of an expert's folder.

    Raises:
        UpcycleError: it or its base is missing or damaged, or a tensor does not fit the base.
    """
    # the base may be of any kind, an expert too
    from upcycle.sources import open_source

    folder = Path(path).expanduser()
    record = read_json(folder / RECORD_NAME)
    kind, base_path = record.get("kind"), record.get("base")
    if not isinstance(kind, str) or kind not in get_args(Kind) or not isinstance(base_path, str):
        raise UpcycleError(
            f"{folder / RECORD_NAME} must name a base and a kind, one of {', '.join(get_args(Kind))}; "
            "record the expert again"
        )
    base = open_source(base_path)
    own = read_header(folder / WEIGHTS_NAME)
    changed = tuple(
        dict.fromkeys(
            name.removesuffix(LORA_A).removesuffix(LORA_B) if kind == "lora" else name for name in own
        )
    )
    for name in changed:
        _check_fits(folder, kind, name, own, base)
    tensors = {
        name: StoredTensor(tensor.file, "F32", tensor.shape, tensor.start) if name in changed else tensor
        for name, tensor in base.tensors.items()
    }
    own_files = Checkpoint(folder, {}, own, (WEIGHTS_NAME,))
    files = (RECORD_NAME, WEIGHTS_NAME, *(str(base.folder.absolute() / name) for name in base.files))
    return Expert(
        folder,
        base.config_json,
        tensors,
        files,
        ExpertReader,
        kind=cast(Kind, kind),
        base=base,
        own=own_files,
        changed=changed,
    )


def _check_fits(folder: Path, kind: str, name: str, own: dict[str, StoredTensor], base: Checkpoint) -> None:
    expected = base.tensors[name].shape if name in base.tensors else None
    if kind != "lora":
        got: Any = own[name].shape
    elif name + LORA_A in own and name + LORA_B in own:
        (R, I), (O, of_B) = own[name + LORA_A].shape, own[name + LORA_B].shape
        got = (O, I) if of_B == R else None
    else:
        got = None
    if expected is None or got != expected:
        raise UpcycleError(
            f"{folder / WEIGHTS_NAME}: tensor {name} does not fit {base.folder}, where its shape is "
            f"{expected}; the expert was made from another base"
        )


class ExpertReader:
    """Rows of an expert, in float32 where they are not the base's; use it in a `with`."""

    def __init__(self, expert: Checkpoint) -> None:
        assert isinstance(expert, Expert)
        self.checkpoint: Checkpoint = expert
        self.expert = expert
        self.base: Reader = expert.base.open_rows()
        self.own = RowReader(expert.own)

    def __enter__(self) -> "ExpertReader":
        self.base.__enter__()
        self.own.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.own.__exit__(*error)
        self.base.__exit__(*error)

    def rows(self, name: str, width: int, first: int, count: int) -> NDArray:
        """`count` rows from `first` on of a tensor seen as a matrix of `width` columns."""
        if name not in self.expert.changed:
            return self.base.rows(name, width, first, count)
        if self.expert.kind == "value":
            return self._own(name, width, first, count)
        return self._of_base(name, width, first, count) + self.delta_rows(name, width, first, count)

    def delta_rows(self, name: str, width: int, first: int, count: int) -> NDArray[np.float32]:
        """The same rows minus the base's."""
        if self.expert.kind == "delta":
            return self._own(name, width, first, count)
        if self.expert.kind == "value":
            return self._own(name, width, first, count) - self._of_base(name, width, first, count)
        return self._product(name, width, first, count)

    def factor(self, name: str) -> NDArray[np.float32]:
        """A whole low-rank factor."""
        rows, width = self.expert.own.tensors[name].shape
        return self._own(name, width, 0, rows)

    def _own(self, name: str, width: int, first: int, count: int) -> NDArray[np.float32]:
        return to_float32(self.own.rows(name, width, first, count), self.expert.own.tensors[name].dtype)

    def _of_base(self, name: str, width: int, first: int, count: int) -> NDArray[np.float32]:
        return to_float32(self.base.rows(name, width, first, count), self.expert.base.tensors[name].dtype)

    def _product(self, name: str, width: int, first: int, count: int) -> NDArray[np.float32]:
        """Rows of lora_B @ lora_A, seen with any width: the whole rows around the asked elements are made."""
        R, I = self.expert.own.tensors[name + LORA_A].shape
        start, stop = first * width, (first + count) * width
        first_row, last_row = start // I, -(-stop // I)
        A_RI = self.factor(name + LORA_A)
        B_OR = self._own(name + LORA_B, R, first_row, last_row - first_row)
        elements = (B_OR @ A_RI).reshape(-1)[start - first_row * I : stop - first_row * I]
        return elements.reshape(count, width)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns in which a tensor is read: a vector as a column."""
    return shape[0], prod(shape[1:])


def whole_tensor(reader: Reader, name: str) -> NDArray[np.float32]:
    tensor = reader.checkpoint.tensors[name]
    rows, width = matrix_shape(tensor.shape)
    return to_float32(reader.rows(name, width, 0, rows), tensor.dtype).reshape(tensor.shape)
