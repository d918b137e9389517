"""What a training logs beside its loss: sums on the device, read once per log entry."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.config import ModelConfig
from moe_runtime.flops import training_flops


@dataclass(frozen=True)
class Yardstick:
    """What speed is held against: FLOPs of the model by formula, and the FLOPs per second of the device."""

    config: ModelConfig | None  # None: of a family whose formula is not known
    flops_per_s: float | None  # of all processes together; None: not measured

    def flops(self, tokens: int, sequences: int) -> int:
        """Of training on `tokens` in `sequences` of about equal length; 0 where there is no formula."""
        if self.config is None or tokens == 0:
            return 0
        return tokens * training_flops(self.config, max(1, round(tokens / max(1, sequences))))


class Window:
    """Sums over the steps since the last log entry; every tensor is of this process's micro-batches only."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps = 0
        self.total: Tensor | None = None  # [labels, tokens, sequences, positions] of all processes
        self.loss: Tensor | None = None  # of the language model, a part of the batch's mean
        self.balance_L: Tensor | None = None
        self.z_L: Tensor | None = None
        self.count_LE: Tensor | None = None
        self.certainty_L2: Tensor | None = None  # entropy and margin, summed over tokens

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            known = getattr(self, name)
            setattr(self, name, value.detach() if known is None else known + value.detach())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside takes no time of training."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - before

    def parts(self) -> list[str]:
        """Names of what has to be summed over processes."""
        names = ("loss", "balance_L", "z_L", "count_LE", "certainty_L2")
        return [name for name in names if getattr(self, name) is not None]

    def figures(self, yardstick: Yardstick) -> dict[str, float]:
        """The log entry, once the parts are summed over processes."""
        assert self.total is not None
        assert self.loss is not None
        seconds = time.perf_counter() - self.started
        _, tokens, sequences, positions = self.total.tolist()
        steps = max(1, self.steps)
        logged = {
            "lm_loss": float(self.loss) / steps,
            "tokens_per_s": tokens / seconds,
            "padding_share": 1.0 - tokens / max(1, positions),
            "memory_gb": memory_bytes() / 1e9,
        }
        flops = yardstick.flops(tokens, sequences)
        if flops:
            logged["tflops_per_s"] = flops / seconds / 1e12
            if yardstick.flops_per_s is not None:
                logged["mfu"] = flops / seconds / yardstick.flops_per_s
        return logged | self._of_routers(tokens, steps)

    def _of_routers(self, tokens: int, steps: int) -> dict[str, float]:
        """Means over layers; balance is 1 where experts are used evenly."""
        if self.count_LE is None:
            return {}
        assert self.balance_L is not None
        assert self.z_L is not None
        assert self.certainty_L2 is not None
        load_LE = loads(self.count_LE)
        entropy, margin = (self.certainty_L2.mean(0) / max(1, tokens)).tolist()
        cv_L = load_LE.std(1, correction=0) * load_LE.shape[1]
        return {
            "balance_loss": float(self.balance_L.mean()) / steps,
            "z_loss": float(self.z_L.mean()) / steps,
            "load_cv": float(cv_L.mean()),
            "load_cv_worst": float(cv_L.max()),
            "load_highest": float(load_LE.max()) * load_LE.shape[1],
            "load_lowest": float(load_LE.min()) * load_LE.shape[1],
            "dead_experts": int((self.count_LE == 0).sum()),
            "router_entropy": entropy,
            "router_margin": margin,
        }


def loads(count_LE: Tensor) -> Tensor:
    """The share of routing slots of every expert, rows sum to 1; float64."""
    count_LE = count_LE.double()
    return count_LE / count_LE.sum(1, keepdim=True).clamp(min=1)


def memory_bytes() -> int:
    """The most that was in use so far: on the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def as_line(logs: dict[str, Any], step: int, steps: int) -> str:
    """A log entry for people."""
    words = [f"step {step}/{steps}"]
    for name, form in LINE.items():
        if name in logs:
            words.append(f"{name.replace('_', ' ')} {logs[name]:{form}}")
    return ", ".join(words)


LINE = {
    "lm_loss": ".4f",
    "balance_loss": ".3f",
    "load_cv": ".2f",
    "dead_experts": "d",
    "learning_rate": ".2e",
    "tokens_per_s": ",.0f",
    "mfu": ".1%",
}
