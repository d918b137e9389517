"""Correctness first, then times of single steps, variants in turns, and the memory that a run adds."""

import ctypes
import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..generate import cache_of, step_seconds
from .settings import Cell
from .variants import DENSE, OURS, Variant

# Rms of the difference of two variants' logits, in units of their rms: rounding of many layers, and tokens
# whose choice of experts it tips. A wrong gate, expert or mask moves logits by more.
BOUND = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
CHECKED_TOKENS, CHECKED_STEPS = 64, 2
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a variant's logits are from those of `reference`, over a prefill and decode steps.

    `same_top_token` is the share of positions with the same most likely token.
    """

    reference: str
    difference: float
    bound: float
    same_top_token: float


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Seconds of one variant in one cell: a number per run in `prefill`, one per step of every run in
    `decode`."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    run: list[float] = field(default_factory=list)


def random_prompt(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """Token ids [B, L], the same for every variant."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


# --- correctness ---


def check_agreement(variants: Sequence[Variant], cell: Cell, seed: int) -> dict[str, Agreement]:
    """Compare the logits of all variants of one model; those of the dense model must be finite.

    The reference is the first variant that is not ours.

    Raises:
        ValueError: an implementation needs a package that is not installed, or the model has no cache.
        RuntimeError: two variants do not compute the same function, or one gives NaN or infinity.
    """
    steps = min(CHECKED_STEPS, cell.output - 1)
    length = min(cell.prompt, CHECKED_TOKENS) + steps
    logits = {}
    for variant in variants:
        tokens_BL = random_prompt(variant.model, cell.batch, length, seed)
        try:
            logits[variant.name] = _logits(variant, tokens_BL, steps)
        except ImportError as error:  # some of transformers' implementations need packages of their own
            raise ValueError(f"--compare {variant.name} cannot run here: {error}") from error
        if not logits[variant.name].isfinite().all():
            raise RuntimeError(f"the logits of {variant.name} are not finite; nothing was timed")
    same_model = [variant for variant in variants if variant.name != DENSE]
    reference = next((variant for variant in same_model if variant.name != OURS), None)
    if reference is None:  # ours alone, or the dense model alone
        return {}
    dtype = reference.model.dtype
    bound = BOUND[dtype]
    agreements = {}
    for variant in same_model:
        if variant is reference:
            continue
        agreement = _compare(logits[variant.name], logits[reference.name], reference.name, bound)
        if not agreement.difference <= bound:
            raise RuntimeError(
                f"{variant.name} and {reference.name} compute different logits: the rms of the difference is "
                f"{agreement.difference:.2g} of their rms and may be {bound:g} in "
                f"{str(dtype).removeprefix('torch.')}; nothing was timed"
            )
        agreements[variant.name] = agreement
    return agreements


def _logits(variant: Variant, tokens_BL: Tensor, steps: int) -> Tensor:
    """Logits of every position, the last `steps` of them decoded one by one."""
    prompt = tokens_BL.shape[1] - steps
    variant.enter("prefill")
    outputs = variant.model(input_ids=tokens_BL[:, :prompt], use_cache=True)
    parts = [outputs.logits]
    variant.enter("decode")
    for position in range(prompt, tokens_BL.shape[1]):
        outputs = variant.model(
            input_ids=tokens_BL[:, position : position + 1],
            past_key_values=cache_of(variant.model, outputs),
            use_cache=True,
        )
        parts.append(outputs.logits)
    return torch.cat(parts, 1).float()


def _compare(logits_BLV: Tensor, other_BLV: Tensor, reference: str, bound: float) -> Agreement:
    rms = other_BLV.square().mean().sqrt()
    same = logits_BLV.argmax(-1) == other_BLV.argmax(-1)
    return Agreement(
        reference=reference,
        difference=((logits_BLV - other_BLV).square().mean().sqrt() / rms).item(),
        bound=bound,
        same_top_token=same.float().mean().item(),
    )


# --- time ---


def in_turns(variants: Sequence[Variant], rounds: int) -> list[Variant]:
    """Every variant once per round, in an order that rotates: a slow moment hits all of them alike."""
    turns = []
    for number in range(rounds):
        shift = number % len(variants)
        turns += [*variants[shift:], *variants[:shift]]
    return turns


def run_steps(variant: Variant, prompt_BL: Tensor, new_steps: int) -> list[float]:
    """Seconds of the prefill, then of each decode step."""
    variant.enter("prefill")
    steps = step_seconds(variant.model, prompt_BL, new_steps)
    seconds = [next(steps)]
    variant.enter("decode")
    return seconds + list(steps)


def time_cell(
    variants: Sequence[Variant], cell: Cell, rounds: int, seed: int, on_run: Callable[[], None]
) -> dict[str, Samples]:
    """Time `rounds` runs of every variant, after an untimed prefill and a few steps of each."""
    prompts = {v.name: random_prompt(v.model, cell.batch, cell.prompt, seed) for v in variants}
    for variant in variants:
        run_steps(variant, prompts[variant.name], min(WARM_UP_STEPS, cell.output - 1))
        on_run()
    samples = {variant.name: Samples() for variant in variants}
    for variant in in_turns(variants, rounds):
        first, *others = run_steps(variant, prompts[variant.name], cell.output - 1)
        found = samples[variant.name]
        found.prefill.append(first)
        found.decode.extend(others)
        found.run.append(first + sum(others))
        on_run()
    return samples


# --- memory ---


def added_memory(device: torch.device, run: Callable[[], object]) -> int | None:
    """Peak bytes during `run` above those before it.

    On a GPU those of PyTorch's tensors. On a CPU the resident memory of the process, by the kernel's own
    high-water mark, after everything that was freed has gone back to the system; None where the system has no
    such mark to reset (it is Linux's /proc/self/clear_refs).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    _return_freed_memory()
    marked = _reset_high_water_mark()
    resident = resident_bytes("VmRSS")
    run()
    peak = resident_bytes("VmHWM")
    return peak - resident if marked and peak is not None and resident is not None else None


def resident_bytes(key: str) -> int | None:
    """VmRSS or VmHWM of this process: resident memory now, and at most since the mark was last reset."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc's allocator: what is free may hide what is added
        return
