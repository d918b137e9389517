"""What PyTorch's profiler says: operations by their own time, and a Chrome trace."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..generate import step_seconds
from .breakdown import model_parts
from .measure import random_prompt
from .settings import Cell, ProfileSettings
from .variants import Variant

OUR_OPERATIONS = "moe_runtime::"


def _profiler(device: torch.device) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its library tells stderr of every start and stop
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu])


def top_operations(
    variant: Variant, cell: Cell, settings: ProfileSettings
) -> dict[str, list[dict[str, Any]]]:
    """The operations of one prefill and of a few decode steps that take most time themselves.

    `self_s` leaves out what an operation calls, `total_s` does not; both are the device's. The registered
    operations of this project are always there: on a CPU most of their time is in the products that they
    call. The profiler's own cost is in the times; read them as shares.
    """
    prompt_BL = random_prompt(variant.model, cell.batch, cell.prompt, settings.seed)
    rows, steps = settings.operations, min(settings.traced_steps, cell.output - 1)
    step_times = step_seconds(variant.model, prompt_BL, steps)
    variant.enter("prefill")
    with _profiler(variant.model.device) as prefill:
        next(step_times)
    tables = {"prefill": _rows(prefill, rows, variant.model.device)}
    variant.enter("decode")
    if steps:
        with _profiler(variant.model.device) as decode:
            list(step_times)
        tables["decode"] = _rows(decode, rows, variant.model.device)
    return tables


def _rows(profiler: profile, rows: int, device: torch.device) -> list[dict[str, Any]]:
    kind = "device" if device.type == "cuda" else "cpu"
    found = [
        {
            "name": event.key,
            "calls": event.count,
            "self_s": getattr(event, f"self_{kind}_time_total") / 1e6,
            "total_s": getattr(event, f"{kind}_time_total") / 1e6,
        }
        for event in profiler.key_averages()
    ]
    of_all = sum(row["self_s"] for row in found) or 1.0
    found.sort(key=lambda row: row["self_s"], reverse=True)
    shown = found[:rows] + [row for row in found[rows:] if row["name"].startswith(OUR_OPERATIONS)]
    return [row | {"share": row["self_s"] / of_all} for row in shown]


# --- trace ---


def write_trace(path: Path, variants: Sequence[Variant], cell: Cell, settings: ProfileSettings) -> None:
    """A Chrome trace of a prefill and some decode steps of every variant, with the parts of layers named.

    The file appears when it is whole; a name that ends in .gz is compressed.
    """
    steps = min(settings.traced_steps, cell.output - 1)
    with _profiler(variants[0].model.device) as profiler:
        for variant in variants:
            prompt_BL = random_prompt(variant.model, cell.batch, cell.prompt, settings.seed)
            step_times = step_seconds(variant.model, prompt_BL, steps)
            with _named_parts(variant.model):
                variant.enter("prefill")
                with record_function(f"{variant.name}: prefill of {cell.batch} x {cell.prompt}"):
                    next(step_times)
                variant.enter("decode")
                for number in range(1, steps + 1):
                    with record_function(f"{variant.name}: decode step {number} of {cell.batch}"):
                        next(step_times)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        profiler.export_chrome_trace(str(unfinished))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _named_parts(model: nn.Module) -> Iterator[None]:
    """Every part of the model as a named range of the profiler."""
    handles: list[Any] = []
    ranges: list[record_function] = []
    for module, part in model_parts(model).items():
        if part.layer is None:
            name = part.component
        else:
            name = f"layer {part.layer}" + ("" if part.is_layer else f": {part.component}")

        def begin(module: nn.Module, args: Any, name: str = name) -> None:
            ranges.append(record_function(name))
            ranges[-1].__enter__()

        def end(module: nn.Module, args: Any, output: Any) -> None:
            ranges.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
