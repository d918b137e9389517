"""The learning rate of a step as a share of the full one. Torch-free."""

import math

from .recipe import TrainSection


def learning_rate_share(step: int, steps: int, section: TrainSection) -> float:
    """The share at a step (from 0) of a run of `steps`: up in a line, then as `schedule` says.

    A cycle lasts from one entry of `restarts` to the next, the last one to the end of the run. In a cycle of
    n steps of which w warm up, step i has (i + 1) / (w + 1) while i < w, then, with x = (i - w) / (n - w):

        constant  1        linear  1 - x        cosine  (1 + cos(π x)) / 2
    """
    first = max((restart for restart in section.restarts if restart <= step), default=0)
    last = min((restart for restart in section.restarts if restart > step), default=steps)
    warm_up = min(section.warmup_steps, last - first)
    done = step - first
    if done < warm_up:
        return (done + 1) / (warm_up + 1)
    x = min(1.0, (done - warm_up) / max(1, last - first - warm_up))
    if section.schedule == "constant":
        return 1.0
    return 1.0 - x if section.schedule == "linear" else (1.0 + math.cos(math.pi * x)) / 2


def first_difference(
    old: TrainSection, new: TrainSection, old_steps: int, new_steps: int, done: int
) -> int | None:
    """The first of the `done` steps that two schedules give different shares; None if they agree."""
    for step in range(done):
        if learning_rate_share(step, old_steps, old) != learning_rate_share(step, new_steps, new):
            return step
    return None
