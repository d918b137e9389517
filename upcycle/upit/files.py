"""Small files replaced in one step, and tensors streamed into a file."""

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.checkpoint import Checkpoint, Shard, write_shard
from upcycle.dtypes import to_float32
from upcycle.errors import UpcycleError
from upcycle.tasks import TensorTask, Zeros
from upcycle.upit.feed_forward import router_inputs

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


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells a base from its fine-tuned branches: sha256 of the first layer's up-projection."""
    name = f"{router_inputs(checkpoint)[0]}.weight"
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise UpcycleError(f"{checkpoint.folder}: tensor {name} is missing; the checkpoint is not complete")
    rows, width = tensor.shape
    digest = sha256()
    with checkpoint.open_rows() as reader:
        for row in range(0, rows, 256):
            digest.update(
                to_float32(reader.rows(name, width, row, min(256, rows - row)), tensor.dtype).tobytes()
            )
    return digest.hexdigest()
