"""Whether an output's tensors are what its recipe makes of its sources: the run again, without writing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.checkpoint import Checkpoint, FileSpan, Reader, RowReader, read_into
from upcycle.plan import make_plan_for
from upcycle.recipe import recipe_from_dict
from upcycle.stream import CHUNK_BYTES, chunks
from upcycle.tasks import TensorTask


def other_tensors(record: Mapping[str, Any], output: Checkpoint) -> tuple[str, ...]:
    """Names of the output's tensors that differ in any bit from those that the run would write.

    Routers that were computed from text are left out: their last bits depend on the number of threads.

    Args:
        record: upcycle.json of an output that was not trained since.
        output: with the tensors that the plan names.

    Raises:
        UpcycleError: the recipe, or a source as it is now, does not allow the run.
        KeyError, TypeError, AttributeError: this is no content of such a file.
    """
    plan = make_plan_for(recipe_from_dict(_recipe(record, output.folder), where=str(output.folder)))
    found = []
    with ExitStack() as stack:
        readers: list[Reader] = [stack.enter_context(source.open_rows()) for source in plan.sources]
        if plan.routers is not None:
            readers.append(stack.enter_context(plan.routers.open_rows()))
        stored = stack.enter_context(RowReader(output))
        for task in plan.tasks:
            known = all(source < len(readers) for piece in task.pieces for source in piece.sources)
            if known and not _is_stored(task, readers, stored):
                found.append(task.name)
    planned = {task.name for task in plan.tasks}
    return (*found, *(name for name in output.tensors if name not in planned))


def _recipe(record: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The recipe with the sources where they were, whatever folder it was run from."""
    values = {**record["recipe"], "output": str(output)}
    paths = [_spec(entry) for entry in record["sources"]]
    values["base"] = paths[record["base"]]
    if values.get("sources"):
        values["sources"] = paths[: len(values["sources"])]
    if record.get("routers", {}).get("path"):
        values["router"] = {**values["router"], "path": record["routers"]["path"]}
    return values


def _spec(entry: Mapping[str, Any]) -> Any:
    adapter = entry.get("adapter")
    return entry["path"] if adapter is None else {"base": entry["path"], "adapter": adapter["path"]}


def _is_stored(task: TensorTask, readers: Sequence[Reader], stored: RowReader) -> bool:
    tensor = stored.checkpoint.tensors.get(task.name)
    if tensor is None or (tensor.dtype, tensor.shape) != (task.dtype, task.shape):
        return False
    span = stored.span(task.name, 1, 0, task.num_elements)
    position = span.start
    for expected in _blocks(task, readers):
        actual = np.empty(expected.shape, np.uint8)
        if not read_into(span.file, position, actual) or not np.array_equal(actual, expected):
            return False
        position += expected.nbytes
    return position == span.start + span.nbytes


def _blocks(task: TensorTask, readers: Sequence[Reader]) -> Iterator[np.ndarray]:
    """The bytes of a tensor as the run would write them."""
    for chunk in chunks(task, readers):
        if not isinstance(chunk, FileSpan):
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
            continue
        for start in range(0, chunk.nbytes, CHUNK_BYTES):
            values = np.empty(min(CHUNK_BYTES, chunk.nbytes - start), np.uint8)
            read_into(chunk.file, chunk.start + start, values)
            yield values
