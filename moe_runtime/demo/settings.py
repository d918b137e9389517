"""The sizes and rates of a demonstration run."""

from dataclasses import dataclass, field

from .train import TrainSettings

ROWS_PER_STEP = 2
FROZEN = (r"embed_tokens|lm_head", 0.0)  # a short run only adds noise to rows of rare tokens


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Rows are per domain. The defaults fill about seven minutes on two cores."""

    row_length: int = 256
    specialist_rows: int = 14
    tune_rows: int = 4
    heldout_rows: int = 5
    specialist: TrainSettings = field(default_factory=lambda: _rates(("", 2e-4)))
    # the better of 1e-4 and 3e-4, so that the baseline is a strong one
    dense: TrainSettings = field(default_factory=lambda: _rates(("", 1e-4)))
    mixture: TrainSettings = field(default_factory=lambda: _rates((r"router\.weight$", 1e-3), ("", 1e-4)))
    router_start_rows: int = 4
    router_sharpness: float = 4.0
    new_tokens: int = 16  # of a continuation
    latency_prompt: int = 128
    latency_new_tokens: int = 8
    latency_repeats: int = 1
    seed: int = 1  # rates and router start were chosen with seed 0, on other documents


def _rates(*learning_rates: tuple[str, float]) -> TrainSettings:
    return TrainSettings(learning_rates=(FROZEN, *learning_rates), rows_per_step=ROWS_PER_STEP)
