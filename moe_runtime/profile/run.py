"""One profile, from a model's name to its report."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..flops import decode_bytes, decode_flops, model_flops, model_parameters
from ..generate import check_length
from ..machine import describe_machine
from ..progress import StageProgress
from .breakdown import Breakdown, break_down
from .measure import Samples, check_agreement, resident_bytes, time_cell
from .operations import top_operations, write_trace
from .roof import Roof, measure_roof
from .settings import Cell, ProfileSettings
from .variants import CONVENTION, Variant, load_subject, make_variants

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def run_profile(
    source: str,
    *,
    settings: ProfileSettings,
    compare: Sequence[str] | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    trace: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a model in every cell of the grid and return the report as JSON values.

    Args:
        source: a checkpoint folder, a config.json, or a named shape; the last two get random weights.
        settings: the grid and how often it is run.
        compare: variants by name, see `make_variants`.
        device: where the model runs.
        dtype: of the weights, see `load_subject`.
        trace: file of a Chrome trace of the last cell.
        console: where progress goes.

    Raises:
        FileNotFoundError, ValueError: the model, a variant or the grid is not usable.
        RuntimeError: variants of one model compute different logits.
    """
    from ..hf.quiet import quiet_transformers

    started = time.perf_counter()
    progress = StageProgress(console or Console(stderr=True))
    cells = settings.cells
    progress.expect([15.0, 5.0, *map(_cost, cells), 10.0])
    place, context = torch.device(device), settings.longest
    with torch.no_grad(), quiet_transformers():
        with progress.stage("load", 15.0):
            model, weights = load_subject(source, dtype=dtype, device=place, seed=settings.seed)
            check_length(model, max(settings.prompts), max(settings.outputs))
            variants, notes = make_variants(model, compare, context=context, seed=settings.seed)
        with progress.stage("check that logits agree", 5.0):
            agreement = check_agreement(variants, cells[0], settings.seed)
            roof = measure_roof(place, model.dtype)
        resident = resident_bytes("VmRSS")
        measured = [_measure_cell(variants, cell, settings, roof, progress) for cell in cells]
        with progress.stage("profile operations", 10.0):
            operations = {variant.name: top_operations(variant, cells[-1], settings) for variant in variants}
            if trace is not None:
                write_trace(trace, variants, cells[-1], settings)
    report = {
        "model": source,
        "weights": weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "machine": describe_machine(),
        "settings": asdict(settings),
        "variants": {variant.name: _variant_entry(variant, context) for variant in variants},
        "notes": notes,
        "agreement": {name: asdict(found) for name, found in agreement.items()},
        "roof": asdict(roof),
        "process_resident_bytes": resident,
        "cells": measured,
        "operations": {"cell": asdict(cells[-1]), "variants": operations},
        "trace": str(trace) if trace else None,
        "seconds": time.perf_counter() - started,
    }
    # tuples become lists, so that the report in memory equals the one in the file
    return json.loads(json.dumps(report))


def _cost(cell: Cell) -> float:
    """Of a cell's stage, in the unit of the others: about seconds of a small model on a slow machine."""
    return 1.0 + 0.005 * cell.batch * cell.prompt + 0.3 * cell.output


def _measure_cell(
    variants: Sequence[Variant],
    cell: Cell,
    settings: ProfileSettings,
    roof: Roof,
    progress: StageProgress,
) -> dict[str, Any]:
    with progress.stage(f"measure {cell} tokens", _cost(cell)) as on_share:
        all_runs = len(variants) * (1 + 2 * settings.rounds)  # warm-up, timed, broken down
        done = 0

        def on_run() -> None:
            nonlocal done
            done += 1
            on_share(done / all_runs)

        samples = time_cell(variants, cell, settings.rounds, settings.seed, on_run)
        parts = break_down(variants, cell, settings.rounds, settings.seed, on_run)
    return {
        **asdict(cell),
        "variants": {
            variant.name: _cell_entry(variant, cell, samples[variant.name], parts[variant.name], roof)
            for variant in variants
        },
    }


# --- parts of the report ---


def _variant_entry(variant: Variant, context: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "title": variant.title,
        "model_type": variant.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in variant.model.parameters()),
        "weight_bytes": variant.weight_bytes,
    }
    if variant.config is not None:
        entry["active_parameters"] = model_parameters(variant.config, active=True).total()
        entry["forward_flops_per_token"] = model_flops(variant.config, context, CONVENTION).total()
        entry["decode_flops_per_token"] = decode_flops(variant.config, context).total()
    return entry


def _cell_entry(
    variant: Variant, cell: Cell, samples: Samples, breakdown: Breakdown, roof: Roof
) -> dict[str, Any]:
    prefill, decode = summarize(samples.prefill), summarize(samples.decode) if samples.decode else None
    run = summarize(samples.run)
    entry: dict[str, Any] = {
        "time_to_first_token_s": prefill,
        "time_per_output_token_s": decode,
        "request_s": run,
        "tokens_per_s": cell.batch * cell.output / run["p50"],
        "decode_tokens_per_s": cell.batch / decode["p50"] if decode else None,
        "added_memory_bytes": breakdown.added_memory,
        "breakdown": asdict(breakdown),
        "samples": asdict(samples),
    }
    if variant.config is not None:
        entry |= _share_of_roof(variant, cell, prefill["p50"], decode["p50"] if decode else None, roof)
    return entry


def _share_of_roof(
    variant: Variant, cell: Cell, prefill_s: float, decode_s: float | None, roof: Roof
) -> dict[str, Any]:
    """FLOPs of the prefill over its time and a product's speed; bytes of a decode step over a copy's."""
    config = variant.config
    assert config is not None
    per_token = model_flops(config, cell.prompt, CONVENTION)
    # only the last position of a prompt has its logits computed
    flops = cell.batch * (cell.prompt * (per_token.total() - per_token["head"]) + per_token["head"])
    shares = {"prefill_flops": flops, "prefill_share_of_product": flops / prefill_s / roof.flops_per_s}
    if decode_s is not None:
        context = cell.prompt + cell.output // 2
        moved = decode_bytes(config, context, cell.batch, variant.model.dtype.itemsize).total
        shares |= {"decode_bytes": moved, "decode_share_of_copy": moved / decode_s / roof.bytes_per_s}
    return shares


def summarize(seconds: list[float]) -> dict[str, Any]:
    """Quantiles, linear between neighbours, and how many numbers they are of."""
    ordered = torch.tensor(seconds, dtype=torch.float64)
    points = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    return dict(zip(QUANTILES, ordered.quantile(points).tolist(), strict=True)) | {"count": len(seconds)}
