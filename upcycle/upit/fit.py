"""The training loop of every stage: AdamW, linear warm-up then a cosine to zero, resumable at every point.

What is drawn depends on (seed, epoch) and (seed, step) alone, so a training that was stopped and goes on from
its last point ends with the bits of one that was not.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_runtime.train.data.samples import IGNORED, Sample
from upcycle.errors import UpcycleError
from upcycle.upit.files import generator

_MAX_GRAD_NORM = 1.0

# Least time between two states: they hold three numbers per parameter, and a short training needs none.
STATE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and in what steps. `label` tells the draws of one training from those of another."""

    epochs: float
    batch_size: int
    warmup: float
    seed: int
    label: str
    every: float | None = None  # epochs between two points; None: no points
    device: str = "cpu"
    bfloat16: bool = False

    def num_steps(self, num_samples: int) -> int:
        return max(1, round(self.epochs * steps_per_epoch(num_samples, self.batch_size)))

    def points(self, num_samples: int) -> dict[int, float]:
        """The steps after which there is a point, with the epochs done.

        Raises:
            UpcycleError: two points would fall on one step.
        """
        if self.every is None:
            return {}
        steps = steps_per_epoch(num_samples, self.batch_size)
        points = {
            round(number * self.every * steps): number * self.every
            for number in range(1, round(self.epochs / self.every) + 1)
        }
        if self.every * steps < 1:
            raise UpcycleError(
                f"prepare.every must be at least one step, but {self.every} of an epoch of {steps} steps "
                f"({num_samples} samples in batches of {self.batch_size}) is less; record less often, or "
                "take smaller batches or more data"
            )
        return points


@dataclass(frozen=True)
class Batch:
    """Samples padded to one length on the right."""

    ids_BL: Tensor
    mask_BL: Tensor
    labels_BL: Tensor
    places: tuple[int, ...]  # of the samples among all


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    return -(-num_samples // batch_size)


def collate(samples: Sequence[Sample], places: Sequence[int], device: str) -> Batch:
    chosen = [samples[place] for place in places]
    L = max(len(sample.ids_L) for sample in chosen)
    ids_BL = torch.zeros(len(chosen), L, dtype=torch.long)
    labels_BL = torch.full((len(chosen), L), IGNORED)
    mask_BL = torch.zeros(len(chosen), L, dtype=torch.long)
    for row, sample in enumerate(chosen):
        length = len(sample.ids_L)
        ids_BL[row, :length] = torch.from_numpy(sample.ids_L)
        labels_BL[row, :length] = torch.from_numpy(sample.labels_L)
        mask_BL[row, :length] = 1
    return Batch(ids_BL.to(device), mask_BL.to(device), labels_BL.to(device), tuple(places))


def fit(
    loss_of: Callable[[Batch, int], Tensor],
    parameters: Sequence[tuple[float, Mapping[str, nn.Parameter]]],
    samples: Sequence[Sample],
    training: Training,
    *,
    states: Path | None = None,
    at_point: Callable[[int, float, float], None] = lambda step, epoch, loss: None,
) -> list[float]:
    """Train, and return the mean loss of every epoch that was run whole or in part.

    Args:
        loss_of: the loss of a batch in a step.
        parameters: what is trained, by name, with the learning rate of each group.
        samples: of one epoch.
        states: folder for weights and moments, saved at points that are at least `STATE_SECONDS` apart; if it
            holds a state, training goes on from there.
        at_point: called with step, epochs done and the mean loss since the point before; again for the points
            after the last state.

    Raises:
        UpcycleError: a loss is not finite.
    """
    points, num_steps = training.points(len(samples)), training.num_steps(len(samples))
    groups = [{"params": list(of_rate.values()), "lr": rate} for rate, of_rate in parameters]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    named = {name: parameter for _, of_rate in parameters for name, parameter in of_rate.items()}
    start = 0 if states is None else last_state(states)
    if states is not None and start:
        _restore(_state_path(states, start), named, optimizer)
    saved = time.monotonic()
    since_point: list[Tensor] = []
    by_epoch: dict[int, list[Tensor]] = {}
    for step in range(start + 1, num_steps + 1):
        factor = _rate_factor(step, num_steps, training.warmup)
        for group, (rate, _) in zip(optimizer.param_groups, parameters, strict=True):
            group["lr"] = rate * factor
        epoch, batch = _batch(samples, step, training)
        loss = _step(loss_of, batch, step, training, optimizer, named)
        since_point.append(loss)
        by_epoch.setdefault(epoch, []).append(loss)
        if step in points:
            mean = torch.stack(since_point).mean().item()
            since_point.clear()
            _check_finite(mean, step, training)
            at_point(step, points[step], mean)
            # after at_point: what that has kept is never behind the state
            if states is not None and time.monotonic() - saved >= STATE_SECONDS:
                _save(_state_path(states, step), named, optimizer)
                _remove_others(states, step)
                saved = time.monotonic()
    means = [torch.stack(losses).mean().item() for losses in by_epoch.values()]
    _check_finite(math.fsum(means), num_steps, training)
    return means


def _check_finite(loss: float, step: int, training: Training) -> None:
    if not math.isfinite(loss):
        raise UpcycleError(
            f"{training.label}: the loss is not finite after step {step}; take a lower learning rate"
        )


def _batch(samples: Sequence[Sample], step: int, training: Training) -> tuple[int, Batch]:
    """The epoch of a step, and its share of that epoch's order."""
    size = training.batch_size
    epoch, place = divmod(step - 1, steps_per_epoch(len(samples), size))
    order = generator(training.seed, f"{training.label} epoch {epoch}").permutation(len(samples))
    return epoch, collate(samples, order[place * size : (place + 1) * size].tolist(), training.device)


def _step(
    loss_of: Callable[[Batch, int], Tensor],
    batch: Batch,
    step: int,
    training: Training,
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
) -> Tensor:
    device = torch.device(training.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # for dropout, if the model has any
        torch.manual_seed(int(generator(training.seed, f"{training.label} step {step}").integers(2**62)))
        with torch.autocast(device.type, torch.bfloat16, enabled=training.bfloat16):
            loss = loss_of(batch, step)
        loss.backward()
    nn.utils.clip_grad_norm_(list(named.values()), _MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """Of the learning rate in a step: up to 1 over the warm-up, then down along a cosine."""
    warmup_steps = math.ceil(warmup * num_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps) / (num_steps - warmup_steps + 1)
    return 0.5 * (1.0 + math.cos(math.pi * done))


# --- states ---


def last_state(folder: Path) -> int:
    """The step of the newest state in a folder; 0 if there is none."""
    return max(
        (int(path.stem.removeprefix("state-")) for path in folder.glob("state-*.safetensors")), default=0
    )


def _remove_others(folder: Path, step: int) -> None:
    for path in folder.glob("state-*.safetensors"):
        if path != _state_path(folder, step):
            path.unlink()


def _state_path(folder: Path, step: int) -> Path:
    return folder / f"state-{step:08}.safetensors"


def _save(path: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors = {}
    for name, parameter in named.items():
        state = optimizer.state[parameter]
        tensors[f"{name}:value"] = parameter.detach().contiguous()
        tensors[f"{name}:steps"] = state["step"]
        tensors[f"{name}:mean"] = state["exp_avg"].contiguous()
        tensors[f"{name}:square"] = state["exp_avg_sq"].contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def _restore(path: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"{name}:value"])
            device = parameter.device
            optimizer.state[parameter] = {
                "step": tensors[f"{name}:steps"],
                "exp_avg": tensors[f"{name}:mean"].to(device),
                "exp_avg_sq": tensors[f"{name}:square"].to(device),
            }
