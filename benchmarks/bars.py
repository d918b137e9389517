"""What the kernels are held to on one H100 in bfloat16, and what the newest results of an H100 say.

A bar whose numbers do not exist is "not measured on an H100"; nothing is estimated. Backward is the
difference of two medians, of forward with backward and of forward.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

OURS = "moe_runtime"
MODEL = "qwen3-30b-a3b"
SUITES = ("route", "plan", "combine", "expert_ffn")  # whose results the bars read
Rows = list[dict[str, Any]]
Suites = dict[str, Rows]


class NotMeasuredError(Exception):
    """Why a bar has no number."""


@dataclass(frozen=True)
class Bar:
    """`measure` gives a number, which is to be `wanted` or better; both are shown by `text`."""

    what: str
    wanted: float
    text: str
    measure: Callable[[Suites], float]
    at_most: bool = False

    def holds(self, measured: float) -> bool:
        return measured <= self.wanted if self.at_most else measured >= self.wanted

    def line(self, suites: Suites) -> list[str]:
        """What, wanted, measured, whether it holds."""
        wanted = f"{'at most' if self.at_most else 'at least'} {self.text.format(self.wanted)}"
        try:
            measured = self.measure(suites)
        except NotMeasuredError as reason:
            return [self.what, wanted, str(reason), ""]
        return [self.what, wanted, self.text.format(measured), "yes" if self.holds(measured) else "no"]


def find(suites: Suites, suite: str, **case: Any) -> Rows:
    """Rows of a suite whose case has these values and whose routing is uniform; at least one."""
    if suite not in suites:
        raise NotMeasuredError("not measured on an H100")
    uniform = [row for row in suites[suite] if row["case"].get("routing", "uniform") == "uniform"]
    rows = [row for row in uniform if all(row["case"].get(name) == case[name] for name in case)]
    if not rows:
        raise NotMeasuredError("the result has no such case")
    return rows


def median_s(row: dict[str, Any], name: str = OURS) -> float:
    if name not in row["timings"]:
        raise NotMeasuredError(row["not_timed"].get(name, f"{name} is not in the result"))
    return row["timings"][name]["median_s"]


# --- measures ---------------------------------------------------------------------------


def routing_us(suites: Suites) -> float:
    rows = [row for row in find(suites, "route", model=MODEL) if row["case"]["tokens"] <= 512]
    return max(1e6 * median_s(row) for row in rows)


def routing_and_plan_us(suites: Suites) -> float:
    pair = (find(suites, suite, model=MODEL, tokens=8192)[0] for suite in ("route", "plan"))
    return sum(1e6 * median_s(row) for row in pair)


def combine_share(suites: Suites) -> float:
    return min(row["copy_share"][OURS] for row in find(suites, "combine", tokens=8192))


def layer(suites: Suites, tokens: int, direction: str) -> dict[str, Any]:
    return find(suites, "expert_ffn", model=MODEL, tokens=tokens, direction=direction)[0]


def tflops(tokens: int, direction: str) -> Callable[[Suites], float]:
    """Of "inference" or "forward", or of "backward" alone."""

    def measure(suites: Suites) -> float:
        if direction != "backward":
            return layer(suites, tokens, direction)["flops_per_s"][OURS] / 1e12
        both, forward = (layer(suites, tokens, name) for name in ("forward_backward", "forward"))
        flops = both["useful_flops"] - forward["useful_flops"]
        return flops / (median_s(both) - median_s(forward)) / 1e12

    return measure


def floor_share(tokens: int) -> Callable[[Suites], float]:
    return lambda suites: layer(suites, tokens, "forward")["floor_share"][OURS]


def timed_rows(rows: Rows, peer: str) -> Rows:
    """Those in which the peer was timed; at least one."""
    timed = [row for row in rows if peer in row["timings"]]
    if not timed:
        median_s(rows[0], peer)  # says why
    return timed


def memory_share(peer: str) -> Callable[[Suites], float]:
    """Largest share of the peer's peak memory, forward with backward."""

    def measure(suites: Suites) -> float:
        rows = find(suites, "expert_ffn", direction="forward_backward")
        large = [row for row in rows if row["case"]["tokens"] >= 8192]
        if not large:
            raise NotMeasuredError("the result has no such case")
        large = timed_rows(large, peer)
        return max(row["peak_bytes"][OURS] / row["peak_bytes"][peer] for row in large)

    return measure


def speedup(peer: str) -> Callable[[Suites], float]:
    """Geometric mean over all cases in which the peer was timed."""

    def measure(suites: Suites) -> float:
        rows = timed_rows(find(suites, "expert_ffn"), peer)
        ratios = (median_s(row, peer) / median_s(row) for row in rows)
        return math.exp(sum(math.log(ratio) for ratio in ratios) / len(rows))

    return measure


def _layer_bars() -> Iterable[Bar]:
    for direction, tokens, wanted in (
        ("forward", 8192, 450),
        ("forward", 32768, 520),
        ("backward", 8192, 380),
        ("backward", 32768, 430),
        ("inference", 32768, 540),
    ):
        what = f"`expert_ffn`, {direction}, {tokens:,} tokens"
        yield Bar(what, wanted, "{:.0f} TFLOP/s", tflops(tokens, direction))
    for tokens, share in ((128, 0.90), (1024, 0.88)):
        what = f"`expert_ffn`, forward, {tokens:,} tokens: share of the floor"
        yield Bar(what, share, "{:.0%}", floor_share(tokens))
    yield Bar(
        "`expert_ffn`, forward and backward, 8,192 tokens and more: peak memory against Liger's",
        1.0,
        "{:.0%}",
        memory_share("liger"),
        at_most=True,
    )
    for peer, name in (("transformers_grouped_mm", "transformers' `grouped_mm`"), ("liger", "Liger")):
        what = f"`expert_ffn`: geometric mean of the speed-ups over {name}"
        yield Bar(what, 1.8, "{:.2f}", speedup(peer))


BARS = (
    Bar("`route_topk`, 512 tokens or fewer", 5, "{:.1f} µs", routing_us, at_most=True),
    Bar("`route_topk` and `make_plan`, 8,192 tokens", 60, "{:.1f} µs", routing_and_plan_us, at_most=True),
    Bar("`combine`, 8,192 tokens: share of a copy's speed", 0.90, "{:.0%}", combine_share),
    *_layer_bars(),
)
