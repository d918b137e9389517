"""Checkpoints by torch.distributed.checkpoint: every process writes its parts, any number of them reads.

model.{name}             parameters and persistent buffers, in the names and shapes of the whole model
optimizer.{name}.{key}   what the optimizer keeps of each parameter
options                  the optimizer's options of each parameter
scheduler, step, random.{process}                      of `save_checkpoint` only
"""

import os
import pickle
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moe_runtime.errors import RunError

Metadata = dict[str, Any]


# --- model and optimizer; every process calls these --------------------------------------


def save_state(folder: str | Path, model: nn.Module, optimizer: Optimizer, **others: Any) -> None:
    """Write a model that `parallelize` spread, its optimizer, and `others`, which are pickled."""
    tensors = _model_tensors(model) | _optimizer_tensors(model, optimizer)
    others = {"options": _options(model, optimizer)} | others
    # pickled here: of a dictionary every entry would get a key of its own
    dcp.save(tensors | {name: pickle.dumps(value) for name, value in others.items()}, checkpoint_id=folder)


def load_state(folder: str | Path, model: nn.Module, optimizer: Optimizer, **others: Any) -> dict[str, Any]:
    """Read in place what any number of processes wrote; returns the saved values of the names of `others`.

    Raises:
        RunError: the folder holds no checkpoint, or one of another model.
    """
    load_model(folder, model)
    load_optimizer(folder, model, optimizer)
    metadata = _read_metadata(folder)
    return others | _load_pickled(folder, {name for name in others if name in metadata})


def save_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, step: int
) -> None:
    """Write everything a run goes on with, under a temporary name that is changed when all of it is there.

    Raises:
        RunError: the folder exists.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}.incomplete")
    is_first = distributed.get_rank() == 0
    if folder.exists():
        raise RunError(f"{folder} must not exist yet, and it does")
    if is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
    distributed.barrier()
    here = {f"random.{distributed.get_rank()}": _random_state()}
    save_state(unfinished, model, optimizer, scheduler=scheduler.state_dict(), step=step, **here)
    distributed.barrier()
    if is_first:
        os.rename(unfinished, folder)
    distributed.barrier()


def load_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> int:
    """Go on with what `save_checkpoint` wrote; returns the step.

    A process that the run which wrote it did not have keeps its own random state.

    Raises:
        RunError: as `load_state`.
    """
    name = f"random.{distributed.get_rank()}"
    wanted = {"scheduler": scheduler.state_dict(), "step": 0, name: _random_state()}
    saved = load_state(folder, model, optimizer, **wanted)
    # by group, and the optimizer's groups may be others now
    rates = {"base_lrs": "initial_lr", "_last_lr": "lr"}
    by_group = {key: [group[of] for group in optimizer.param_groups] for key, of in rates.items()}
    unchanged = {key: value for key, value in saved["scheduler"].items() if key != "lr_lambdas"}
    scheduler.load_state_dict(scheduler.state_dict() | unchanged | by_group)
    _set_random_state(saved[name])
    return int(saved["step"])


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a spread model, whole, in the memory of the first process's CPU; {} in the others."""
    whole, meshes = {}, _expert_meshes(model)
    for name, tensor in _named_tensors(model).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name in meshes:
            full = DTensor.from_local(full, meshes[name]["expert"], [Shard(0)], run_check=False).full_tensor()
        if distributed.get_rank() == 0:
            whole[name] = full.detach().to("cpu", copy=True)  # a whole copy shares the memory of the model
    return whole


# --- tensors in the shapes of the whole model --------------------------------------------


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Under the keys of a checkpoint; they share memory with the model."""
    meshes = _expert_meshes(model)
    return {
        f"model.{name}": _whole(tensor, meshes.get(name)) for name, tensor in _named_tensors(model).items()
    }


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once, and persistent buffers."""
    persistent = model.state_dict().keys()  # and FSDP2 takes back what it gathered
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


def _expert_meshes(model: nn.Module) -> dict[str, DeviceMesh]:
    """Of each parameter that expert parallelism cut."""
    return {
        f"{name}.{key}": module.expert_mesh
        for name, module in model.named_modules()
        if hasattr(module, "expert_mesh")
        for key, _ in module.named_parameters()
    }


def _whole(tensor: Tensor, expert_mesh: DeviceMesh | None) -> Tensor:
    """The same memory, as a part of the tensor over all processes: FSDP2 does not know of other experts."""
    tensor = tensor.detach()
    if expert_mesh is None:
        return tensor
    assert isinstance(tensor, DTensor)
    shape = (expert_mesh["expert"].size() * tensor.shape[0], *tensor.shape[1:])
    return DTensor.from_local(
        tensor.to_local(),
        expert_mesh,
        [Replicate(), Shard(0), tensor.placements[-1]],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors, meshes = {}, _expert_meshes(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or (value.dim() > 0 and value.shape != parameter.shape):
                raise RunError(
                    f"train.optimizer must keep numbers, and tensors in the shape of a parameter, on several "
                    f"processes, got {type(optimizer).__name__}, which keeps {key} of {name}"
                )
            mesh = meshes.get(name) if value.dim() > 0 else None
            tensors[f"optimizer.{name}.{key}"] = _whole(value, mesh)
    return tensors


def _options(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """By parameter, because groups differ with the number of processes."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return {
        name_of[parameter]: {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


# --- reading -----------------------------------------------------------------------------


def _read_metadata(folder: str | Path) -> Metadata:
    try:
        return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except FileNotFoundError:
        raise RunError(f"{folder} must be a checkpoint of several processes, and holds none") from None


def load_model(folder: str | Path, model: nn.Module) -> None:
    """Read the model alone, in place; without other processes too, into a model as it was loaded.

    Raises:
        RunError: as `load_state`.
    """
    tensors, metadata = _model_tensors(model), _read_metadata(folder)
    saved = {name: data.size for name, data in metadata.items() if name.startswith("model.")}
    differing = saved.items() ^ {name: tensor.shape for name, tensor in tensors.items()}.items()
    if differing:
        name = min(name for name, _ in differing).removeprefix("model.")
        raise RunError(f"{folder} must hold this model, and holds another: see {name}")
    _read(tensors, folder)


def load_whole_optimizer(
    stored: dict[str, Any], names: list[str], model: nn.Module, optimizer: Optimizer
) -> None:
    """Take over what an optimizer of one process kept, each process its part.

    Args:
        stored: the `state_dict()` of that optimizer.
        names: of its parameters, in its order.
        model: spread by `parallelize`.
        optimizer: of this model.

    Raises:
        RunError: it kept other tensors than in the shape of a parameter.
    """
    of_group = [(position, group) for group in stored["param_groups"] for position in group["params"]]
    name_at = {position: name for (position, _), name in zip(of_group, names, strict=True)}
    options = {
        name_at[position]: {key: value for key, value in group.items() if key != "params"}
        for position, group in of_group
    }
    parameters, meshes = dict(model.named_parameters()), _expert_meshes(model)
    state = {
        name: {
            key: _part(f"{key} of {name}", value, parameters[name], meshes.get(name))
            for key, value in stored["state"][position].items()
        }
        for position, name in name_at.items()
        if position in stored["state"]
    }
    _set_optimizer(model, optimizer, state, options)


def load_optimizer(folder: str | Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read the optimizer alone, in place; without other processes too."""
    state = _optimizer_state(folder, _read_metadata(folder), model)
    _set_optimizer(model, optimizer, state, _load_pickled(folder, {"options"})["options"])


def _set_optimizer(
    model: nn.Module, optimizer: Optimizer, state: dict[str, Any], options: dict[str, dict[str, Any]]
) -> None:
    """`state` and `options` by the names of parameters."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    by_position: dict[int, dict[str, Tensor]] = {}
    groups = []
    for group, stored in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        names = [name_of[parameter] for parameter in group["params"]]
        positions = zip(stored["params"], names, strict=True)
        by_position |= {position: state[name] for position, name in positions if name in state}
        groups.append(stored | (options.get(names[0], {}) if names else {}))
    optimizer.load_state_dict({"state": by_position, "param_groups": groups})


def _optimizer_state(
    folder: str | Path, metadata: Metadata, model: nn.Module
) -> dict[str, dict[str, Tensor]]:
    """This process's part of what an optimizer kept, by parameter."""
    parameters, meshes = dict(model.named_parameters()), _expert_meshes(model)
    state: dict[str, dict[str, Tensor]] = {}
    read: dict[str, Any] = {}
    for name, data in metadata.items():
        if not name.startswith("optimizer.") or not isinstance(data, TensorStorageMetadata):
            continue
        owner, _, key = name.removeprefix("optimizer.").rpartition(".")
        dtype, is_number = data.properties.dtype, not data.size
        value = (
            torch.zeros((), dtype=dtype) if is_number else torch.zeros_like(parameters[owner], dtype=dtype)
        )
        state.setdefault(owner, {})[key] = value
        read[name] = _whole(value, None if is_number else meshes.get(owner))
    _read(read, folder)
    return state


def _part(what: str, value: Any, parameter: nn.Parameter, expert_mesh: DeviceMesh | None) -> Any:
    """This process's part of what an optimizer kept of a parameter."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    whole = _whole(parameter, expert_mesh)
    if value.shape != whole.shape:
        raise RunError(
            f"train.optimizer must keep numbers, and tensors in the shape of a parameter, on several "
            f"processes, got one that keeps {what} in the shape {tuple(value.shape)}"
        )
    assert isinstance(parameter, DTensor)
    assert isinstance(whole, DTensor)
    # without a source every process cuts its own copy
    part = distribute_tensor(
        value.to(parameter.device), whole.device_mesh, whole.placements, src_data_rank=None
    )
    return DTensor.from_local(
        part.to_local().clone(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _read(values: dict[str, Any], folder: str | Path) -> None:
    """In place; without other processes too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(values, checkpoint_id=folder)


def _load_pickled(folder: str | Path, names: set[str]) -> dict[str, Any]:
    pickled = dict.fromkeys(names, b"")
    _read(pickled, folder)
    return {name: pickle.loads(value) for name, value in pickled.items()}


# --- random numbers ----------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
