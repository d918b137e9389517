"""A source as a folder of safetensors, for programs that read nothing else."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from upcycle.checkpoint import SINGLE_NAME, Checkpoint, Shard, write_shard
from upcycle.dtypes import STORAGE
from upcycle.stream import chunks
from upcycle.tasks import Band, Piece, TensorTask


@contextmanager
def plain_folder(source: Checkpoint) -> Iterator[Path]:
    """The source's own folder if it is one of safetensors, else a copy that is, while the body runs."""
    source = source.raw or source
    if source.reader is None and all(name.endswith(".safetensors") for name in source.files):
        yield source.folder
        return
    with tempfile.TemporaryDirectory(prefix="upcycle-") as name:
        folder = Path(name)
        _write_tensors(source, folder / SINGLE_NAME)
        (folder / "config.json").write_text(json.dumps(source.config_json), encoding="utf-8")
        yield folder


def _write_tensors(source: Checkpoint, path: Path) -> None:
    tasks = tuple(
        TensorTask(name, tensor.dtype, tensor.shape, (_whole(name, tensor.shape),))
        for name, tensor in source.tensors.items()
        if tensor.dtype in STORAGE and tensor.shape
    )
    with source.open_rows() as reader:
        write_shard(
            path, Shard(SINGLE_NAME, tasks), (rows for task in tasks for rows in chunks(task, [reader]))
        )


def _whole(name: str, shape: tuple[int, ...]) -> Band:
    return Band(shape[0], (Piece(name, (0,), width=prod(shape[1:])),))
