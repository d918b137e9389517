"""What a profile measures: a grid of batches, prompts and outputs, and how often."""

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One kind of request: `batch` prompts of `prompt` tokens, each continued by `output` tokens.

    The first of these comes from the prefill, each other one from a decode step.
    """

    batch: int
    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt} + {self.output}"


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """`rounds` runs of every variant are timed in each cell; the cell's breakdown has as many prefills."""

    batches: tuple[int, ...] = (1,)
    prompts: tuple[int, ...] = (32, 128)
    outputs: tuple[int, ...] = (16,)
    rounds: int = 3
    operations: int = 12  # rows of a table
    traced_steps: int = 3  # decode steps under PyTorch's profiler
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batches", "prompts", "outputs"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be at least 1 each, got {', '.join(map(str, values))}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, so that there is a spread, got {self.rounds}")

    @property
    def cells(self) -> list[Cell]:
        sizes = product(self.batches, self.prompts, self.outputs)
        return [Cell(batch=batch, prompt=prompt, output=output) for batch, prompt, output in sizes]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prompts) + max(self.outputs)


def parse_sizes(option: str, text: str) -> tuple[int, ...]:
    """`"1,4"` -> (1, 4), each once.

    Raises:
        ValueError: naming the option, if a part is no whole number of at least 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be whole numbers of at least 1, joined by commas, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))
