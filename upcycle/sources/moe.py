"""Mixtures of any layout, seen as one tensor per expert and projection.

Only names and places change: the expert of a stack begins so many bytes behind the stack's first, so that
whatever reads a tensor's rows reads an expert's.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from upcycle.checkpoint import Checkpoint, StoredTensor
from upcycle.dtypes import STORAGE
from upcycle.errors import UpcycleError

_LAYER = r"(?P<layer>model\.layers\.\d+)\."
_PROJECTIONS = {
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    **{f"{kind}_proj": f"{kind}_proj" for kind in ("gate", "up", "down")},
}

_SEPARATE = re.compile(
    _LAYER
    + r"(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.(?P<projection>\w+)\.(?P<kind>weight|bias)$"
)
# Stacks of gate rows above up rows, and of down projections; Granite's layers have names of their own.
_GATE_UP = re.compile(
    _LAYER + r"(?:(?:mlp|block_sparse_moe)\.experts\.gate_up_(?P<kind>proj|bias)"
    r"|block_sparse_moe\.input_linear\.weight)$"
)
_DOWN = re.compile(
    _LAYER + r"(?:(?:mlp|block_sparse_moe)\.experts\.down_(?P<kind>proj|bias)"
    r"|block_sparse_moe\.output_linear\.weight)$"
)
_ROUTER = re.compile(_LAYER + r"(?:mlp|block_sparse_moe)\.(?:gate|router|router\.layer)\.weight$")


def per_expert(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with these names, whether its file holds an expert's tensors apart or stacked:

        model.layers.I.mlp.router.weight                          [E, D]
        model.layers.I.mlp.experts.J.{gate,up}_proj.weight        [F, D]
        model.layers.I.mlp.experts.J.down_proj.weight             [D, F]

    and .bias beside .weight, where there are biases. All other tensors, such as shared experts, keep their
    names.

    Raises:
        UpcycleError: two tensors of the file would get one name, a stack has no such shape, or the
            checkpoint is not read as it is stored.
    """
    if checkpoint.reader is not None:
        raise UpcycleError(f"{checkpoint.location}: a mixture must be a folder of its own weights")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        for new_name, view in _views(checkpoint, name, tensor):
            if new_name in tensors:
                raise UpcycleError(
                    f"{checkpoint.folder}: tensor {name} is there in a second layout; keep one of the two"
                )
            tensors[new_name] = view
    return replace(checkpoint, tensors=tensors)


def _views(checkpoint: Checkpoint, name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    if match := _ROUTER.match(name):
        yield f"{match['layer']}.mlp.router.weight", tensor
    elif (match := _SEPARATE.match(name)) and match["projection"] in _PROJECTIONS:
        prefix = f"{match['layer']}.mlp.experts.{match['expert']}"
        yield f"{prefix}.{_PROJECTIONS[match['projection']]}.{match['kind']}", tensor
    elif match := _GATE_UP.match(name):
        yield from _unstacked(checkpoint, name, tensor, match, ("gate_proj", "up_proj"))
    elif match := _DOWN.match(name):
        yield from _unstacked(checkpoint, name, tensor, match, ("down_proj",))
    else:
        yield name, tensor


def _unstacked(
    checkpoint: Checkpoint, name: str, stack: StoredTensor, match: re.Match, kinds: tuple[str, ...]
) -> Iterator[tuple[str, StoredTensor]]:
    """Each expert's matrix, or the halves of it: rows of the stack, which follow each other in the file."""
    is_bias = match["kind"] == "bias"
    where = f"{checkpoint.folder}: tensor {name}"
    if len(stack.shape) != (2 if is_bias else 3) or stack.shape[1] % len(kinds):
        raise UpcycleError(f"{where} must be a stack of the experts' matrices, got shape {stack.shape}")
    if stack.dtype not in STORAGE:
        raise UpcycleError(f"{where} must be of type {', '.join(STORAGE)}, got {stack.dtype}")
    experts, rows, *columns = stack.shape
    shape = (rows // len(kinds), *columns)
    num_bytes = shape[0] * (columns[0] if columns else 1) * STORAGE[stack.dtype].itemsize
    for expert in range(experts):
        for number, kind in enumerate(kinds):
            start = stack.start + (expert * len(kinds) + number) * num_bytes
            new_name = f"{match['layer']}.mlp.experts.{expert}.{kind}.{'bias' if is_bias else 'weight'}"
            yield new_name, StoredTensor(stack.file, stack.dtype, shape, start)
