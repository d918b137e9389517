"""What a person sees while stages run: bars with the time left, or plain lines where there is no terminal."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

QUIET_SECONDS = 15.0  # between plain lines of one stage


class StageProgress:
    """A bar for the running stage and one for the whole run.

    The time left scales the stages' expected costs by how long the costs spent in this run took.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = 0.0
        self._num_stages = 0
        self._number = 0
        self._spent = 0.0  # cost of finished stages, run now or earlier
        self._worked = 0.0  # cost of what ran now
        self._seconds = 0.0  # what that took

    def expect(self, costs: Sequence[float]) -> None:
        """The costs of all stages to come."""
        self._total, self._num_stages = sum(costs), len(costs)

    def skip(self, title: str, cost: float) -> None:
        """A stage whose result is there already."""
        self._number += 1
        self._spent += cost
        self._console.print(f"{self._label(title)}: done before", highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, cost: float) -> Iterator[Callable[[float], None]]:
        """Show one stage; yields a callback for the share done, from 0 to 1."""
        self._number += 1
        started = time.perf_counter()
        label = self._label(title)
        if self._console.is_terminal:
            with self._shown_bars(label) as show:
                yield lambda share: show(share, self._left(share, cost, started))
        else:
            yield self._plain_lines(label, cost, started)
        seconds = time.perf_counter() - started
        self._spent += cost
        self._worked += cost
        self._seconds += seconds
        left = f", about {_duration(self._left(0.0, 0.0, started))} left" if self._spent < self._total else ""
        self._console.print(f"{label}: {seconds:.1f} s{left}", highlight=False, soft_wrap=True)

    def _label(self, title: str) -> str:
        return f"({self._number:>2}/{self._num_stages}) {title}"

    def _left(self, share: float, cost: float, started: float) -> float:
        """Seconds to the end of the run, from the pace so far."""
        remaining = self._total - self._spent - share * cost
        worked = self._worked + share * cost
        seconds = self._seconds + (time.perf_counter() - started if share else 0.0)
        return remaining * (seconds / worked if worked > 0 else 1.0)

    @contextmanager
    def _shown_bars(self, label: str) -> Iterator[Callable[[float, float], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(label, total=1.0, left="")

            def show(share: float, left: float) -> None:
                bars.update(task, completed=share, left=f"{_duration(left)} left in all")

            yield show

    def _plain_lines(self, label: str, cost: float, started: float) -> Callable[[float], None]:
        last = [started]

        def show(share: float) -> None:
            now = time.perf_counter()
            if share < 1.0 and now - last[0] >= QUIET_SECONDS:
                last[0] = now
                left = _duration(self._left(share, cost, started))
                self._console.print(
                    f"{label}: {share:.0%}, about {left} left in all", highlight=False, soft_wrap=True
                )

        return show


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
