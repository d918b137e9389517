"""Where a step's time goes: seconds of every layer and of its parts, from hooks around modules."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..generate import step_seconds
from .measure import added_memory, in_turns, random_prompt
from .settings import Cell
from .variants import Variant

COMPONENTS = (
    "attention",
    "attention router",
    "router",
    "experts",
    "shared expert",
    "feed-forward",
    "norms",
    "rest of a layer",
    "embedding",
    "head",
    "outside layers",
)


@dataclass(frozen=True)
class Part:
    """What a module is: one of `COMPONENTS`, and the layer it stands in."""

    component: str
    layer: int | None = None
    is_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One step of a model. Components add up to `total`; what a component spends in another counts there."""

    total: float
    components: dict[str, float]
    layers: list[float]


def model_parts(model: Any) -> dict[nn.Module, Part]:
    """The modules that are timed. Names are those that transformers' models have in common."""
    parts: dict[nn.Module, Part] = {model: Part("outside layers")}
    parts[model.get_input_embeddings()] = Part("embedding")
    parts[model.get_output_embeddings()] = Part("head")
    for number, layer in enumerate(_decoder_layers(model)):
        for name, module in layer.named_modules():
            component = _component(name)
            if component is not None:
                parts[module] = Part(component, number)
        parts[layer] = Part("rest of a layer", number, is_layer=True)
    return parts


def _decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The outermost list of as many modules as there are layers."""
    wanted = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((list(found) for found in lists if len(found) == wanted), [])


def _component(name: str) -> str | None:
    """What a module of a layer is, by its name there; None is counted with the module around it."""
    parent, _, last = name.rpartition(".")
    if not parent:
        if "norm" in last.lower():
            return "norms"
        if re.search("attn|attention", last):
            return "attention"
        if re.search("mlp|feed_forward|ffn|moe", last):
            return "feed-forward"
    if last in ("router", "gate"):
        return "attention router" if re.search("attn|attention", parent) else "router"
    if last == "experts":
        return "experts"
    return "shared expert" if last.startswith("shared_expert") else None


# --- clocks ---


@dataclass
class _Span:
    """One call of a part, and the calls of other parts in it. Moments are seconds, or events of a GPU."""

    part: Part
    started: Any
    ended: Any = None
    inner: list["_Span"] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        if isinstance(self.started, float):
            return self.ended - self.started
        return self.started.elapsed_time(self.ended) / 1e3  # milliseconds between events


@contextmanager
def timed_parts(model: nn.Module) -> Iterator[Callable[[], StepTimes]]:
    """Time every part of `model`; yields what a call returns: the times since the last such call.

    On a GPU these are times between events on its stream: gaps in which it waits for the host count too.
    """
    parts = model_parts(model)
    on_gpu = next(model.parameters()).is_cuda
    spans: list[_Span] = []
    open_spans: list[_Span] = []

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(module: nn.Module, args: Any) -> None:
        span = _Span(parts[module], now())
        if open_spans:
            open_spans[-1].inner.append(span)
        spans.append(span)
        open_spans.append(span)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        open_spans.pop().ended = now()

    def read() -> StepTimes:
        if on_gpu:
            torch.cuda.synchronize()
        times = _step_times(spans)
        spans.clear()
        return times

    handles: list[Any] = []
    for module in parts:
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _step_times(spans: list[_Span]) -> StepTimes:
    components = dict.fromkeys(COMPONENTS, 0.0)
    layers: dict[int, float] = {}
    for span in spans:
        part, seconds = span.part, span.seconds
        components[part.component] += seconds - sum(inner.seconds for inner in span.inner)
        if part.is_layer:
            assert part.layer is not None
            layers[part.layer] = layers.get(part.layer, 0.0) + seconds
    return StepTimes(
        total=spans[0].seconds,  # the model itself is entered first
        components={name: seconds for name, seconds in components.items() if seconds},
        layers=[layers[number] for number in sorted(layers)],
    )


# --- a cell ---


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The prefill and the decode step whose totals are the medians of `prefills` and `steps` timed ones."""

    prefill: StepTimes
    decode: StepTimes | None
    prefills: int
    steps: int
    added_memory: int | None


def break_down(
    variants: Sequence[Variant], cell: Cell, rounds: int, seed: int, on_run: Callable[[], None]
) -> dict[str, Breakdown]:
    """The breakdown of every variant in a cell, by runs of their own; the first of them shows its memory."""
    prefills: dict[str, list[StepTimes]] = {variant.name: [] for variant in variants}
    steps: dict[str, list[StepTimes]] = {variant.name: [] for variant in variants}
    memory: dict[str, int | None] = {}
    for number, variant in enumerate(in_turns(variants, rounds)):
        prompt_BL = random_prompt(variant.model, cell.batch, cell.prompt, seed)
        is_first = number < len(variants)

        def run(variant: Variant = variant, prompt_BL: Tensor = prompt_BL, whole: bool = is_first) -> None:
            with timed_parts(variant.model) as read:
                variant.enter("prefill")
                times = step_seconds(variant.model, prompt_BL, cell.output - 1 if whole else 0)
                next(times)
                prefills[variant.name].append(read())
                variant.enter("decode")
                for _ in times:
                    steps[variant.name].append(read())

        if is_first:
            memory[variant.name] = added_memory(variant.model.device, run)
        else:
            run()
        on_run()
    return {
        name: Breakdown(
            prefill=_middle(prefills[name]),
            decode=_middle(steps[name]) if steps[name] else None,
            prefills=len(prefills[name]),
            steps=len(steps[name]),
            added_memory=memory[name],
        )
        for name in prefills
    }


def _middle(times: list[StepTimes]) -> StepTimes:
    return sorted(times, key=lambda step: step.total)[len(times) // 2]
