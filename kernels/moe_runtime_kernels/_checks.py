"""Checks of arguments; every message names the operation, the argument, what it must be and what it was."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_dims(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """`tensor` has one axis per letter of e.g. "(T, D)"."""
    dims = letters.count(",") + (not letters.endswith(",)"))
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} axes {letters}, got shape {tuple(tensor.shape)}")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], letters: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} must have shape {letters} = {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def check_dtype(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} must be {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the first argument, got {tensor.device}")


def check_same(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` has the dtype and the device of `like`."""
    if tensor.dtype != like.dtype:
        raise ValueError(
            f"{op}: {name} must have the dtype of {like_name}, {str(like.dtype).removeprefix('torch.')}, got "
            f"{str(tensor.dtype).removeprefix('torch.')}"
        )
    check_device(op, name, tensor, like.device)


def check_apart(op: str, name: str, tensor: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """`tensor`, which is written to, shares no memory with the others."""
    storage, used = tensor.untyped_storage()._cdata, _bytes_used(tensor)
    for other_name, other in others.items():
        if other is None or other.untyped_storage()._cdata != storage:
            continue
        other_used = _bytes_used(other)
        if max(used.start, other_used.start) < min(used.stop, other_used.stop):
            raise ValueError(
                f"{op}: {name} must not share memory with {other_name}, because it is added to in place, got "
                "one that does"
            )


def _bytes_used(tensor: Tensor) -> range:
    """Of its storage, from the first element to the last."""
    if tensor.numel() == 0:
        return range(0)
    first = tensor.storage_offset()
    last = first + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return range(first * tensor.itemsize, (last + 1) * tensor.itemsize)


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
