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
    "state space",
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

LAYER_PARTS = {
    "attention": "attn|attention",
    "state space": "mamba",
    "feed-forward": "mlp|feed_forward|ffn|moe",
}


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
        for module, component in _components(layer):
            parts[module] = Part(component, number)
        parts[layer] = Part("rest of a layer", number, is_layer=True)
    return parts


def _decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The outermost list of as many modules as there are layers."""
    wanted = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((list(found) for found in lists if len(found) == wanted), [])


def _components(module: nn.Module, within: str | None = None) -> Iterator[tuple[nn.Module, str]]:
    """The parts of a layer, however deep, and what they are; `within` is the outermost part around it."""
    for name, child in module.named_children():
        component = _component(name, child, within)
        if component is not None:
            yield child, component
        yield from _components(child, within or component)


def _component(name: str, module: nn.Module, within: str | None) -> str | None:
    """What a module is, by its name and the part that it is in; None is counted with what is around it."""
    if name in ("router", "gate"):
        return "attention router" if within == "attention" else "router"
    if name == "experts":
        return "experts"
    if name.startswith("shared_expert"):
        return "shared expert"
    if within is not None:
        return None
    if re.search("norm|^ln_", name.lower()):  # a module with more in it is a group, such as norm_attn_norm
        return "norms" if not any(module.children()) else None
    if name == "mixer":  # the one name of everything that a layer can be, which its class tells apart
        name = type(module).__name__.lower()
    for component, names in LAYER_PARTS.items():
        if re.search(names, name):
            return component
    return None


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
