"""Small files replaced in one step, and tensors streamed into a file."""

import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.checkpoint import Checkpoint, Shard, write_shard
from upcycle.provenance import hash_file
from upcycle.tasks import TensorTask, Zeros

HEADER_DTYPE = {"float32": "F32", "bfloat16": "BF16"}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace the file by a whole one, or leave it as it was."""
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, chunks: Iterable[NDArray]
) -> None:
    """Write a safetensors file of one type (as headers name it), replaced when whole.

    Args:
        chunks: the stored bytes of every tensor, in the order of `shapes`.
    """
    unfinished = path.with_name(f".{path.name}.part")
    # the header needs names, types and shapes; what is in the tensors is what `chunks` brings
    tasks = tuple(TensorTask(name, dtype, shape, Zeros()) for name, shape in shapes.items())
    write_shard(unfinished, Shard(path.name, tasks), chunks)
    unfinished.replace(path)


def generator(seed: int, label: str) -> np.random.Generator:
    """Draws that depend on seed and label alone, whatever was drawn before and in which process."""
    digest = sha256(f"{seed} {label}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def fingerprint(*checkpoints: Checkpoint) -> str:
    """Tells models from all others: sha256 over those of all their weight files, adapters included."""
    digest = sha256()
    for checkpoint in checkpoints:
        parts = [checkpoint] if checkpoint.adapter is None else [checkpoint, checkpoint.adapter]
        for path in (part.folder / name for part in parts for name in part.files):
            state = path.stat()
            digest.update(_hash_once(path, state.st_size, state.st_mtime_ns).encode())
    return digest.hexdigest()


@cache
def _hash_once(path: Path, size: int, changed_ns: int) -> str:
    """One pass over a file per process, as long as it keeps its size and time."""
    return hash_file(path)
