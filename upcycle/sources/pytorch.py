"""PyTorch files (`pytorch_model.bin`) as what they are: a zip with one pickle and the tensors' bytes.

The pickle is read by an unpickler that knows dictionaries and tensors and calls nothing else, so that no file
can run code. A tensor's bytes lie in the zip uncompressed and are read from there, like those of safetensors.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from math import prod
from operator import index
from pathlib import Path
from typing import IO, Any

from upcycle.checkpoint import StoredTensor, open_regular
from upcycle.errors import UpcycleError

SINGLE_BIN = "pytorch_model.bin"

# Names that pickles give storages -> safetensors' name and bytes of a number.
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_MAX_PICKLE = 100_000_000
_MAX_SIZE = 2**63
_LOCAL_HEADER = 30
# How a file of PyTorch before 1.6, which is no zip, begins.
_OLD_MAGIC = bytes.fromhex("80028a0a6cfc9c46f920")


@dataclass(frozen=True)
class _Storage:
    dtype: str
    item_size: int
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _DamagedError(Exception):
    pass


def read_pickled(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; nothing in it is called.

    Raises:
        UpcycleError: it is damaged, of an old format, or holds anything but a dictionary of tensors.
    """
    with open_regular(path) as file:
        if file.read(len(_OLD_MAGIC)) == _OLD_MAGIC:
            raise UpcycleError(
                f"{path} is in the format of PyTorch before 1.6; load it with a PyTorch you trust it to and "
                "save the model as safetensors"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                return _read_archive(path, file, archive)
        except UpcycleError:
            raise
        # whatever a forged zip or pickle makes Python's readers raise
        except Exception:
            raise UpcycleError(
                f"{path} is truncated or no file that torch.save wrote; fetch it again"
            ) from None


def _read_archive(path: Path, file: IO[bytes], archive: zipfile.ZipFile) -> dict[str, StoredTensor]:
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise _DamagedError
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    if members[pickled].file_size > _MAX_PICKLE:
        raise _DamagedError
    order = members.get(f"{folder}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise UpcycleError(f"{path} has its numbers in big-endian order; save the model as safetensors")
    values = _Unpickler(path, archive.read(pickled)).load()
    if not isinstance(values, dict):
        raise UpcycleError(f"{path} must hold a dictionary of tensors, got {type(values).__name__}")
    starts: dict[str, int] = {}
    tensors = {}
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise UpcycleError(
                f"{path} must hold tensors only, got {type(tensor).__name__} under {name!r}; "
                "save the model's state_dict() alone"
            )
        tensors[name] = _placed(
            path, file, members[f"{folder}data/{tensor.storage.key}"], name, tensor, starts
        )
    return tensors


def _placed(
    path: Path,
    file: IO[bytes],
    member: zipfile.ZipInfo,
    name: str,
    tensor: _Tensor,
    starts: dict[str, int],
) -> StoredTensor:
    item_size = tensor.storage.item_size
    if (tensor.offset + prod(tensor.shape)) * item_size > member.file_size:
        raise _DamagedError
    if member.compress_type != zipfile.ZIP_STORED:
        raise UpcycleError(f"{path} is compressed; unpack it and save the model as safetensors")
    if not _contiguous(tensor):
        raise UpcycleError(f"{path}: tensor {name} is stored as a view; save it after .contiguous()")
    if member.filename not in starts:
        starts[member.filename] = _data_start(file, member)
    start = starts[member.filename] + tensor.offset * item_size
    return StoredTensor(path.name, tensor.storage.dtype, tensor.shape, start)


def _data_start(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Behind the member's own header, whose two last fields are the lengths of what follows it."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    start = (
        member.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
    if start + member.file_size > file.seek(0, 2):
        raise _DamagedError
    return start


def _contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


# --- the pickle ---


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Iterable[Any], strides: Iterable[Any], *_: Any
) -> _Tensor:
    sizes, steps = tuple(map(index, shape)), tuple(map(index, strides))
    if not isinstance(storage, _Storage) or any(not 0 <= size < _MAX_SIZE for size in (offset, *sizes)):
        raise _DamagedError
    return _Tensor(storage, index(offset), sizes, steps)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): name for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise UpcycleError(
                f"{self._path} asks to run {module}.{name}, and a file of tensors needs no code; it is not "
                "opened: take the model as safetensors"
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, _ = pid
        if kind != "storage":
            raise _DamagedError
        return _Storage(*_STORAGES[storage], str(key))
