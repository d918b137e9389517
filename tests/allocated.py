"""Bytes that PyTorch's CPU allocator has given out: what a plan of memory is held against."""

from collections.abc import Callable

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_of(prepare: Callable[[], Callable[[], object]]) -> int:
    """The most bytes that were given out while the function ran that `prepare` returns, its own among them.

    Everything that `prepare` has made counts, temporary tensors inside operations too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run = prepare()
        with torch.profiler.record_function("measured"):
            run()
    current, peak, started = 0, 0, None
    alive = (
        set()
    )  # what was given out before, such as a test's model, may be freed meanwhile: it never counted
    events = sorted(
        _flat(seen.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns
    )
    for event in events:
        if event.name == "measured":
            started = event.start_time_ns
            peak = current
        if event.tag == _EventType.Allocation:
            place, size = event.extra_fields.ptr, event.extra_fields.alloc_size
            if size < 0 and place not in alive:
                continue
            (alive.add if size > 0 else alive.discard)(place)
            current += size
            peak = max(peak, current) if started is not None else 0
    return peak


def _flat(events):
    for event in events:
        yield event
        yield from _flat(event.children)
