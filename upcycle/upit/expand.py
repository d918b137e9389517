"""More experts than checkpoints: children of pairs of them (stage 2 of UpIT; Hui et al. 2024).

    child = a · DARE(delta_j) + b · DARE(delta_k),   a ~ U(0, 1), b = 1 - a
    DARE(delta) = m ⊙ delta / (1 - p),   m ~ Bernoulli(1 - p) for every element

(j, k) is the least similar pair (or a random one) that has no child yet; a child joins the pool and may be a
parent. Of low-rank experts the factors are mutated, each with its own mask, and set beside each other:
B = [a · DARE(B_j), b · DARE(B_k)], A = [DARE(A_j); DARE(A_k)]. With p = 0 that is the same sum, and for any p
its expectation is; ranks add up.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.checkpoint import read_json
from upcycle.dtypes import from_float32
from upcycle.errors import UpcycleError
from upcycle.upit.expert import LORA_A, LORA_B, Expert, ExpertReader, open_expert, write_expert
from upcycle.upit.feed_forward import feed_forward_tensors
from upcycle.upit.files import fingerprint, generator, write_json
from upcycle.upit.recipe import ExpandRecipe
from upcycle.upit.similarity import similarities, slices

LIST_NAME = "experts.json"
CHILD_NAME = "child.json"  # what a child was made from


@dataclass(frozen=True)
class Origin:
    """Where an expert comes from: a checkpoint, or two experts of the pool with their weights."""

    folder: str
    parents: tuple[int, int] | None = None
    weights: tuple[float, float] | None = None
    similarity: float | None = None  # of the parents; None: they were drawn


def expand(
    checkpoints: Sequence[str | Path], count: int, folder: str | Path, settings: ExpandRecipe, seed: int
) -> tuple[Origin, ...]:
    """Grow a pool of experts to `count`, children written below `folder`.

    Children that are there already, from a run that was stopped, are kept if they were made from the same
    experts with the same settings.

    Args:
        checkpoints: folders of experts, in order.
        count: experts wanted.
        folder: where children and the list of all experts go.

    Raises:
        UpcycleError: there are fewer than two experts to start from, they are of several kinds or bases, or
            the folder holds other children.
    """
    folder = Path(folder)
    pool = [open_expert(path) for path in checkpoints]
    origins = [Origin(str(path)) for path in checkpoints]
    if len(pool) < count:
        _check_parents(pool, count)
    layers = feed_forward_tensors(pool[0].base) if pool else ()
    known: dict[tuple[int, int], float] = {}
    used: set[tuple[int, int]] = set()
    while len(pool) < count:
        number = len(pool)
        # never empty: every child makes more pairs than it uses
        free = [pair for pair in combinations(range(number), 2) if pair not in used]
        if settings.parents == "random":
            draw = generator(seed, f"parents {number}").integers(len(free))
            pair, similarity = free[int(draw)], None
        else:
            new = [pair for pair in free if pair not in known]
            known |= similarities(pool, new, layers, settings.similarity)
            pair = min(free, key=lambda pair: (known[pair], pair))
            similarity = known[pair]
        if settings.exclude_used:
            used.add(pair)
        a = float(generator(seed, f"weights {number}").uniform())
        child = folder / f"child-{number:02}"
        made_from = pool[pair[0]], pool[pair[1]], (a, 1.0 - a), settings.drop, seed, number
        if not child.exists():
            write_child(child, *made_from)
        elif read_json(child / CHILD_NAME) != child_record(*made_from):
            raise UpcycleError(
                f"{child} was made from other experts or with other settings; remove {folder} or choose "
                "another folder"
            )
        pool.append(open_expert(child))
        origins.append(Origin(str(child), pair, (a, 1.0 - a), similarity))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / LIST_NAME, {"experts": [asdict(origin) for origin in origins]})
    return tuple(origins)


def read_origins(folder: Path) -> tuple[Origin, ...]:
    """What `expand` listed."""
    entries = read_json(folder / LIST_NAME)["experts"]
    return tuple(
        Origin(
            entry["folder"],
            tuple(entry["parents"]) if entry["parents"] else None,
            tuple(entry["weights"]) if entry["weights"] else None,
            entry["similarity"],
        )
        for entry in entries
    )


def _check_parents(pool: Sequence[Expert], count: int) -> None:
    if len(pool) < 2:
        raise UpcycleError(
            f"expand needs two or more checkpoints to make {count} experts from, got {len(pool)}; "
            "record more often or train longer"
        )
    for expert in pool:
        if (expert.kind, expert.base.folder) != (pool[0].kind, pool[0].base.folder):
            raise UpcycleError(
                f"the experts must be of one kind and base, but {pool[0].folder} is {pool[0].kind} on "
                f"{pool[0].base.folder} and {expert.folder} is {expert.kind} on {expert.base.folder}"
            )


def child_record(
    one: Expert, other: Expert, weights: tuple[float, float], drop: float, seed: int, number: int
) -> dict[str, Any]:
    """All that a child's numbers depend on, as plain values."""
    return {
        "parents": [fingerprint(one), fingerprint(other)],
        "weights": list(weights),
        "drop": drop,
        "seed": seed,
        "number": number,
    }


def write_child(
    folder: Path,
    one: Expert,
    other: Expert,
    weights: tuple[float, float],
    drop: float,
    seed: int,
    number: int,
) -> None:
    """Write the child of two experts; see the module."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    if one.kind == "lora":
        shapes = _joined_shapes(one, other)
        kind: Any = "lora"
        dtype = next(iter(one.own.tensors.values())).dtype
        parts = _joined(one, other, shapes, weights, drop, f"{number}", seed)
    else:
        shapes = {name: one.tensors[name].shape for name in one.changed}
        kind = "delta"
        dtype = next(iter(one.own.tensors.values())).dtype
        parts = _mixed(one, other, weights, drop, f"{number}", seed)
    chunks = (from_float32(np.ascontiguousarray(part), dtype) for part in parts)
    write_expert(unfinished, one.base, kind, dtype, shapes, chunks)
    write_json(unfinished / CHILD_NAME, child_record(one, other, weights, drop, seed, number))
    unfinished.rename(folder)


def dare(values: NDArray[np.float32], drop: float, draws: np.random.Generator) -> NDArray[np.float32]:
    """Each element zero with probability `drop`, else divided by 1 - drop; nothing is drawn for 0."""
    if drop == 0:
        return values
    kept = draws.random(values.shape, dtype=np.float32) >= drop
    return np.where(kept, values / np.float32(1 - drop), np.float32(0))


def _mixed(
    one: Expert, other: Expert, weights: tuple[float, float], drop: float, label: str, seed: int
) -> Iterator[NDArray[np.float32]]:
    a, b = (np.float32(weight) for weight in weights)
    with ExpertReader(one) as first, ExpertReader(other) as second:
        for name in one.changed:
            shape = one.tensors[name].shape
            width = prod(shape[1:])
            masks = [generator(seed, f"dare {label} {side} {name}") for side in (0, 1)]
            for row, count in slices(shape):
                left = dare(first.delta_rows(name, width, row, count), drop, masks[0])
                yield a * left + b * dare(second.delta_rows(name, width, row, count), drop, masks[1])


def _joined_shapes(one: Expert, other: Expert) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in one.changed:
        of_one, of_other = (expert.own.tensors[name + LORA_A].shape for expert in (one, other))
        R = of_one[0] + of_other[0]
        shapes[name + LORA_A] = (R, of_one[1])
        shapes[name + LORA_B] = (one.tensors[name].shape[0], R)
    return shapes


def _joined(
    one: Expert,
    other: Expert,
    shapes: dict[str, tuple[int, ...]],
    weights: tuple[float, float],
    drop: float,
    label: str,
    seed: int,
) -> Iterator[NDArray[np.float32]]:
    with ExpertReader(one) as first, ExpertReader(other) as second:
        for name in shapes:
            parts = []
            for side, reader in enumerate((first, second)):
                draws = generator(seed, f"dare {label} {side} {name}")
                part = dare(reader.factor(name), drop, draws)
                parts.append(part * np.float32(weights[side]) if name.endswith(LORA_B) else part)
            yield np.concatenate(parts, axis=1 if name.endswith(LORA_B) else 0)
