"""A callback of transformers' Trainer that calls a function at fixed shares of an epoch."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class EpochCallback(TrainerCallback):
    """Calls `start(model)` when training begins, then `at_point(model, step=, epoch=, loss=)` regularly.

    A point is the first optimiser step at or after a multiple of `every` epochs; `loss` is the last one that
    was logged. Only the first process calls.
    """

    def __init__(self, every: float, start: Callable[[Any], None], at_point: Callable[..., None]) -> None:
        self.every, self.start, self.at_point = every, start, at_point
        self.points = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.points = self._points(state)
        if state.is_world_process_zero:
            self.start(kwargs["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        points = self._points(state)
        if points > self.points and state.is_world_process_zero:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            loss = losses[-1] if losses else None
            self.at_point(kwargs["model"], step=state.global_step, epoch=state.epoch, loss=loss)
        self.points = points

    def _points(self, state: TrainerState) -> int:
        # an epoch is a sum of shares: a little below its value
        return int((state.epoch or 0.0) / self.every + 1e-6)
