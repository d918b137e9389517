"""Router weights that a recipe does not draw: which tensors a plan needs, and the file that holds them.

The file is a safetensors file with `model.layers.{l}.mlp.router [E, D]` and, for mixtures of attention,
`model.layers.{l}.self_attn.router [A, D]`. The plan reads it as one more source.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moe_runtime.config import ModelConfig
from upcycle.checkpoint import Checkpoint, read_header
from upcycle.dtypes import STORAGE, to_float32
from upcycle.errors import UpcycleError
from upcycle.recipe import RouterRecipe
from upcycle.tasks import TensorTask

Shapes = dict[str, tuple[int, int]]


def router_shapes(tasks: Iterable[TensorTask], source: int) -> Shapes:
    """The router tensors that the tasks read from source number `source`, which is no model."""
    shapes: Shapes = {}
    for task in tasks:
        for band in task.content if isinstance(task.content, tuple) else ():
            for piece in band.pieces:
                if source in piece.sources:
                    rows, _ = shapes.get(piece.tensor, (0, 0))
                    shapes[piece.tensor] = (max(rows, piece.first_row + band.rows), piece.width)
    return shapes


def check_routers(
    recipe: RouterRecipe, model: ModelConfig, shapes: Shapes, shards: int = 1
) -> Checkpoint | None:
    """What can be checked before a weight is read; returns the file of weights if the recipe names one.

    Args:
        shards: neighbouring experts that have one row.

    Raises:
        UpcycleError: a file is missing or has other tensors than `shapes`, or more rows than columns are
            asked to be orthogonal.
    """
    for text in recipe.data:
        if isinstance(text, str) and not Path(text).expanduser().is_file():
            raise UpcycleError(f"router.data: there is no file {text}")
    rows = max(model.num_experts // shards, model.num_attention_experts)
    if recipe.init == "orthogonal" and rows > model.hidden_size:
        raise UpcycleError(
            f"router.init 'orthogonal' needs at most as many different rows as the model is wide "
            f"({model.hidden_size}), got {rows}"
        )
    return open_routers_file(Path(recipe.path).expanduser(), shapes) if recipe.init == "file" else None


def open_routers_file(path: Path, shapes: Shapes) -> Checkpoint:
    """The file, after checking that it holds these tensors and no others.

    Raises:
        UpcycleError: it is missing or damaged, or a tensor is missing, has another shape or is not expected.
    """
    if not path.is_file():
        raise UpcycleError(f"router.path: there is no file {path}")
    tensors = read_header(path)
    for name, shape in shapes.items():
        if name not in tensors:
            raise UpcycleError(f"{path}: tensor {name} is missing; every layer with experts needs its router")
        if tensors[name].shape != shape:
            raise UpcycleError(f"{path}: tensor {name} must have shape {shape}, got {tensors[name].shape}")
        if tensors[name].dtype not in STORAGE:
            raise UpcycleError(
                f"{path}: tensor {name} must be of type {', '.join(STORAGE)}, got {tensors[name].dtype}"
            )
    for name in tensors:
        if name not in shapes:
            raise UpcycleError(f"{path}: tensor {name} is no router of this model")
    return Checkpoint(path.parent, {}, tensors, (path.name,))


def check_values(routers: Checkpoint) -> None:
    """Read the whole file, which is small.

    Raises:
        UpcycleError: a router has a value that is not finite, or only zeros.
    """
    path = routers.folder / routers.files[0]
    with routers.open_rows() as reader:
        for name, tensor in routers.tensors.items():
            rows, width = tensor.shape
            weight_ED = to_float32(reader.rows(name, width, 0, rows), tensor.dtype)
            if not np.isfinite(weight_ED).all():
                raise UpcycleError(f"{path}: tensor {name} must be finite, and holds NaN or infinite values")
            if not weight_ED.any():
                raise UpcycleError(
                    f"{path}: tensor {name} must not be all zeros, with which every token would go to the "
                    "same experts"
                )
