"""Experts from one training: the recorder that saves them on the way, and the choice among what it saved.

A recording is a folder: `index.json`, one expert's folder for every point of the training (`0001`, `0002` …),
and of a full training `rest-NNNN`, the mean so far of all tensors that are no feed-forward. The index is
replaced last: what it does not name does not exist, so a killed training leaves a whole recording.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from upcycle import names
from upcycle.checkpoint import Checkpoint, read_json
from upcycle.errors import UpcycleError
from upcycle.sources import open_source
from upcycle.stored import stored_rows, stored_shapes
from upcycle.upit.expert import (
    LORA_A,
    LORA_B,
    Kind,
    numbers,
    open_expert,
    save_expert,
    whole_tensor,
    write_expert,
)
from upcycle.upit.feed_forward import dense_config, feed_forward_tensors
from upcycle.upit.files import HEADER_DTYPE, fingerprint, write_json

INDEX_NAME = "index.json"
_PEFT_PREFIX = "base_model.model."

RecordDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Recorded:
    """One point of a training."""

    folder: str
    step: int
    epoch: float
    loss: float | None


@dataclass(frozen=True)
class Recording:
    """What a recorder wrote: experts in the order of training, and the mean of everything else."""

    folder: Path
    base: str
    fingerprint: str
    kind: Kind
    dtype: RecordDtype
    rest: str | None  # of a full training
    checkpoints: tuple[Recorded, ...]

    @property
    def last_step(self) -> int:
        return self.checkpoints[-1].step if self.checkpoints else 0


def open_recording(folder: str | Path) -> Recording:
    """Read and check the index of a recording.

    Raises:
        UpcycleError: there is none, it is damaged, or its checkpoints are out of order.
    """
    folder = Path(folder).expanduser()
    path = folder / INDEX_NAME
    if not path.is_file():
        raise UpcycleError(f"{folder} holds no {INDEX_NAME}; name a folder that a Recorder wrote")
    values = read_json(path)
    try:
        checkpoints = tuple(Recorded(**entry) for entry in values.pop("checkpoints"))
        recording = Recording(folder=folder, checkpoints=checkpoints, **values)
        in_order = all(a.step < b.step for a, b in pairwise(checkpoints))
    except (KeyError, TypeError):
        raise UpcycleError(f"{path} is damaged; record the training again") from None
    if not in_order:
        raise UpcycleError(
            f"{path}: checkpoints must be in the order of training, got steps "
            f"{', '.join(str(checkpoint.step) for checkpoint in checkpoints)}"
        )
    return recording


def check_base(recording: Recording, base: Checkpoint) -> None:
    """Refuse a recording that was made from other weights, wherever in the model they differ."""
    if recording.fingerprint != fingerprint(base):
        raise UpcycleError(
            f"the checkpoints in {recording.folder} must be trained from {base.folder}, "
            f"but they were made from another base ({recording.base})"
        )


def select(recording: Recording, count: int) -> tuple[Recorded, ...]:
    """At most `count` checkpoints: evenly spaced in the later half of the training, the last one included.

    With more than half of them wanted, the last `count`.
    """
    available = recording.checkpoints
    if count >= len(available):
        return available
    half = max(count, -(-len(available) // 2))
    last = len(available) - 1
    if count == 1:
        return available[-1:]
    places = [last - (count - 1 - i) * (half - 1) // (count - 1) for i in range(count)]
    return tuple(available[place] for place in places)


class Recorder:
    """Saves the feed-forwards of a model in training as experts, every `every` of an epoch.

    With transformers' Trainer: `Trainer(..., callbacks=[recorder.callback()])`. In a loop of your own:
    `start(model)` before the first step, `record(model, step=…, epoch=…, loss=…)` wherever an expert shall be
    saved. A recording that is there already is continued; a step that it has is not recorded again.

    Args:
        folder: of the recording.
        base: checkpoint folder that the training starts from.
        every: epochs between two points.
        kind: "delta" or "value" saves the feed-forwards and the mean of everything else, "lora" the low-rank
            factors of PEFT (or of the command) on the feed-forwards.
        dtype: of the saved tensors; means are float32 always.

    Raises:
        ValueError: an argument is not allowed; in `start` and `record`: the model is not the base, or has
            no or other adapters.
    """

    def __init__(
        self,
        folder: str | Path,
        base: str | Path,
        *,
        every: float = 0.25,
        kind: Kind = "delta",
        dtype: RecordDtype = "float32",
    ) -> None:
        if not every > 0:
            raise ValueError(f"every must be above 0 epochs, got {every}")
        for name, value, allowed in (("kind", kind, get_args(Kind)), ("dtype", dtype, get_args(RecordDtype))):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.folder, self.every = Path(folder).expanduser(), every
        self.base = open_source(str(base))
        self.feed_forward = frozenset(name for layer in feed_forward_tensors(self.base) for name in layer)
        if (self.folder / INDEX_NAME).is_file():
            self.recording = open_recording(self.folder)
            check_base(self.recording, self.base)
            if (self.recording.kind, self.recording.dtype) != (kind, dtype):
                raise UpcycleError(
                    f"{self.folder} holds experts of kind {self.recording.kind} in {self.recording.dtype}, "
                    f"not {kind} in {dtype}; choose another folder or remove it"
                )
        else:
            path = str(self.base.folder.absolute())
            self.recording = Recording(self.folder, path, fingerprint(self.base), kind, dtype, None, ())

    def callback(self) -> Any:
        """A TrainerCallback that starts and records."""
        from moe_runtime.hf.epoch_callback import EpochCallback

        return EpochCallback(self.every, self.start, self.record)

    def start(self, model: Any) -> None:
        """Check that the model is the base, before it is trained."""
        parameters = self._parameters(model)
        wanted = self.feed_forward
        if self.recording.kind != "lora":  # a mean is made of the others too
            wanted = wanted | stored_shapes(self.base, dense_config(self.base)).keys()
        missing = sorted(wanted - parameters.keys())
        if missing:
            raise ValueError(f"model must be one of {self.base.folder}, but it has no parameter {missing[0]}")
        if self.recording.kind == "lora":
            self._factors(model)
        if self.recording.checkpoints:
            return
        with self.base.open_rows() as reader:
            for name in sorted(self.feed_forward):
                ours = numbers(parameters[name])
                stored = whole_tensor(reader, name)
                if stored.shape != ours.shape or not np.array_equal(ours, stored):
                    raise ValueError(
                        f"model must hold the weights of {self.base.folder}, unrounded, when training "
                        f"starts, but {name} differs"
                    )

    def record(self, model: Any, *, step: int, epoch: float, loss: float | None = None) -> None:
        """Save the model's feed-forwards as the next expert."""
        if step <= self.recording.last_step:
            return
        number = len(self.recording.checkpoints) + 1
        entry = Recorded(f"{number:04}", step, epoch, loss)
        if self.recording.kind == "lora":
            tensors = self._factors(model)
        else:
            tensors = {
                name: value for name, value in self._parameters(model).items() if name in self.feed_forward
            }
        dtype = HEADER_DTYPE[self.recording.dtype]
        save_expert(self.folder / entry.folder, self.base, self.recording.kind, dtype, tensors)
        before, rest = self.recording.rest, None
        if self.recording.kind != "lora":
            rest = f"rest-{number:04}"
            self._write_mean(model, number, before, rest)
        self.recording = replace(self.recording, rest=rest, checkpoints=(*self.recording.checkpoints, entry))
        write_json(self.folder / INDEX_NAME, _index(self.recording))
        if before is not None:
            shutil.rmtree(self.folder / before)

    def _write_mean(self, model: Any, number: int, before: str | None, rest: str) -> None:
        """mean_n = mean_(n-1) + (x_n - mean_(n-1)) / n, tensor by tensor."""
        tensors = {
            name: value
            for name, value in self._parameters(model).items()
            if name not in self.feed_forward and name in self.base.tensors
        }

        def means() -> Iterator[NDArray]:
            if before is None:
                yield from (np.ascontiguousarray(numbers(tensor)) for tensor in tensors.values())
                return
            with open_expert(self.folder / before).open_rows() as old:
                for name, tensor in tensors.items():
                    values = numbers(tensor)
                    mean = whole_tensor(old, name)
                    yield np.ascontiguousarray(mean + (values - mean) / np.float32(number))

        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        write_expert(self.folder / rest, self.base, "value", "F32", shapes, means())

    def _parameters(self, model: Any) -> dict[str, Any]:
        """By the names that the base's checkpoint has, adapters left out."""
        # what shares another's memory counts: a base may store a tied head
        parameters = {
            name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", "."): parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if ".lora_" not in name
        }
        # the one module that transformers names otherwise than some checkpoints do
        head = stored_rows(self.base, dense_config(self.base))[names.HEAD].tensor.removesuffix(".weight")
        for kind in ("weight", "bias"):
            if f"lm_head.{kind}" in parameters:
                parameters.setdefault(f"{head}.{kind}", parameters[f"lm_head.{kind}"])
        return parameters

    def _factors(self, model: Any) -> dict[str, Any]:
        """lora_A and lora_B of every adapted feed-forward weight, the scaling multiplied into lora_B."""
        factors: dict[str, Any] = {}
        for module_name, module in model.named_modules():
            if not hasattr(module, "lora_A") or not hasattr(module, "scaling"):
                continue
            weight = module_name.removeprefix(_PEFT_PREFIX).removesuffix(".lora") + ".weight"
            if weight not in self.feed_forward:
                raise ValueError(
                    f"model must have adapters on its feed-forwards only, got one on {module_name}"
                )
            if list(module.lora_A) != ["default"]:
                raise ValueError(f"model must have one adapter, 'default', got {list(module.lora_A)}")
            factors[weight + LORA_A] = module.lora_A["default"].weight
            factors[weight + LORA_B] = module.lora_B["default"].weight * module.scaling["default"]
        if not factors:
            raise ValueError("model must have LoRA adapters on its feed-forwards for kind 'lora', got none")
        return factors


def _index(recording: Recording) -> dict[str, Any]:
    values = asdict(recording)
    del values["folder"]
    return values
