"""A plain training loop: AdamW, linear warm-up and decay, bfloat16 products over float32 weights."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one model is trained.

    `learning_rates` lists (pattern, peak rate): a parameter takes the rate of the first pattern found in its
    name, and is frozen if none is.
    """

    learning_rates: tuple[tuple[str, float], ...]
    rows_per_step: int
    warmup_steps: int = 3
    final_share: float = 0.1  # of the peak rate, at the last step
    weight_decay: float = 0.1  # of matrices
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainLog:
    """What a training run did. `losses` are those of the steps, auxiliary losses of a mixture included."""

    losses: tuple[float, ...]
    tokens: int
    trained_parameters: int
    seconds: float


def schedule(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    done = step / max(1, num_steps - 1)
    return warm * (1.0 - (1.0 - settings.final_share) * done)


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Optimiser groups by learning rate and weight decay; freezes every other parameter of the model."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = next((rate for pattern, rate in settings.learning_rates if re.search(pattern, name)), 0.0)
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()
    ]


def train(
    model: Any,
    rows_NL: Tensor,
    settings: TrainSettings,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainLog:
    """One pass over the rows, in their order. The model is left in eval mode, float32, all of it trainable.

    Args:
        model: a transformers causal LM with float32 weights.
        rows_NL: token ids; every `rows_per_step` neighbours make one step.
        on_step: told the number of steps done and the last loss.

    Raises:
        ValueError: no parameter's name matches a pattern of `learning_rates`.
    """
    groups = parameter_groups(model, settings)
    if not groups:
        raise ValueError(
            f"learning_rates must match a parameter's name, got {[p for p, _ in settings.learning_rates]}"
        )
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, fused=True)
    peaks = [group["lr"] for group in groups]
    batches: Sequence[Tensor] = rows_NL.split(settings.rows_per_step)
    losses = []
    started = time.perf_counter()
    model.train()
    for step, batch_BL in enumerate(batches):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, len(batches), settings)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch_BL, labels=batch_BL, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(step + 1, losses[-1])
    model.eval().requires_grad_(True)
    return TrainLog(
        losses=tuple(losses),
        tokens=rows_NL.numel(),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        seconds=time.perf_counter() - started,
    )
