"""The sizes and rates of a demonstration run."""

from dataclasses import dataclass, field

from .train import TrainSettings

SPECIALIST_RATE = 3e-4
MIXTURE_RATE = 3e-4
ROUTER_RATE = 1e-3
ROWS_PER_STEP = 2


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Rows are per domain. The defaults fill about six minutes on two cores."""

    row_length: int = 256
    specialist_rows: int = 24
    tune_rows: int = 12
    heldout_rows: int = 6
    specialist: TrainSettings = field(default_factory=lambda: _all_parameters(SPECIALIST_RATE))
    dense: TrainSettings = field(default_factory=lambda: _all_parameters(SPECIALIST_RATE))
    mixture: TrainSettings = field(default_factory=lambda: _all_parameters(MIXTURE_RATE, router=ROUTER_RATE))
    new_tokens: int = 24  # of a continuation
    latency_prompt: int = 128
    latency_new_tokens: int = 8
    latency_repeats: int = 2
    seed: int = 0


def _all_parameters(rate: float, router: float | None = None) -> TrainSettings:
    rates = (("", rate),) if router is None else ((r"router\.weight$", router), ("", rate))
    return TrainSettings(learning_rates=rates, rows_per_step=ROWS_PER_STEP)
