"""How alike the deltas of two experts are, as the mean over layers; read in slices, never a whole expert.

    cosine   <a, b> / (|a| |b|) of a layer's deltas as one long vector
    l2       -|a - b|
    cka      linear CKA |A'B|² / (|A'A| |B'B|) in Frobenius norms, of every matrix with its columns centred,
             the F hidden neurons as samples and the D channels as features (Kornblith et al. 2019)

Greater is more alike.
"""

from collections.abc import Iterator, Sequence, Set
from itertools import combinations
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from upcycle.upit.expert import Expert, ExpertReader, matrix_shape
from upcycle.upit.feed_forward import down_projections

Similarity = Literal["cosine", "l2", "cka"]

# Elements of a slice of one expert.
_SLICE = 2**20


def similarities(
    experts: Sequence[Expert],
    pairs: Sequence[tuple[int, int]],
    layers: Sequence[Sequence[str]],
    measure: Similarity,
) -> dict[tuple[int, int], float]:
    """The similarity of each pair of experts.

    Args:
        experts: of one base.
        pairs: of places in `experts`, the smaller first.
        layers: the names of each layer's feed-forward tensors.
    """
    totals = dict.fromkeys(pairs, 0.0)
    used = sorted({place for pair in pairs for place in pair})
    readers = {place: ExpertReader(experts[place]) for place in used}
    down = down_projections(experts[0].base) if measure == "cka" else frozenset()
    try:
        for names in layers:
            if measure == "cka":
                for first, second in pairs:
                    totals[first, second] += _layer_cka(readers[first], readers[second], names, down)
            else:
                gram_PP = _gram([readers[place] for place in used], names)
                for pair in pairs:
                    i, j = (used.index(place) for place in pair)
                    totals[pair] += _from_gram(gram_PP[i, i], gram_PP[j, j], gram_PP[i, j], measure)
    finally:
        for reader in readers.values():
            reader.__exit__(None, None, None)
    return {pair: total / len(layers) for pair, total in totals.items()}


def similarity_matrix(
    experts: Sequence[Expert], layers: Sequence[Sequence[str]], measure: Similarity
) -> list[list[float]]:
    """The similarities of all pairs, with the measure's own value of an expert and itself on the diagonal."""
    of_pair = similarities(experts, list(combinations(range(len(experts)), 2)), layers, measure)
    of_itself = 0.0 if measure == "l2" else 1.0
    places = range(len(experts))
    return [[of_itself if i == j else of_pair[min(i, j), max(i, j)] for j in places] for i in places]


def slices(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each slice of a tensor."""
    rows, width = matrix_shape(shape)
    step = max(1, _SLICE // max(width, 1))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _gram(readers: Sequence[ExpertReader], names: Sequence[str]) -> NDArray[np.float64]:
    """Inner products of the experts' deltas of one layer."""
    gram_PP = np.zeros((len(readers), len(readers)))
    for name in names:
        shape = readers[0].checkpoint.tensors[name].shape
        width = prod(shape[1:])
        for first, count in slices(shape):
            rows = [_delta(reader, name, width, first, count).reshape(-1) for reader in readers]
            x_PN = np.stack(rows).astype(np.float64)
            gram_PP += x_PN @ x_PN.T
    return gram_PP


def _delta(reader: ExpertReader, name: str, width: int, first: int, count: int) -> NDArray[np.float32]:
    if name not in reader.expert.changed:  # LoRA has no biases, and need not adapt every matrix
        return np.zeros((count, width), np.float32)
    return reader.delta_rows(name, width, first, count)


def _from_gram(aa: float, bb: float, ab: float, measure: Similarity) -> float:
    if measure == "l2":
        return -float(np.sqrt(max(aa + bb - 2 * ab, 0.0)))
    return float(ab / np.sqrt(aa * bb)) if aa * bb > 0 else 0.0


def _layer_cka(one: ExpertReader, other: ExpertReader, names: Sequence[str], down: Set[str]) -> float:
    matrices = [name for name in names if len(one.checkpoint.tensors[name].shape) == 2]
    return sum(_cka(one, other, name, name in down) for name in matrices) / len(matrices)


def _cka(one: ExpertReader, other: ExpertReader, name: str, down: bool) -> float:
    rows, width = one.checkpoint.tensors[name].shape
    stored = [_delta(reader, name, width, 0, rows).astype(np.float64) for reader in (one, other)]
    a_FD, b_FD = [delta.T for delta in stored] if down else stored
    a_FD, b_FD = a_FD - a_FD.mean(axis=0), b_FD - b_FD.mean(axis=0)
    norms = np.linalg.norm(a_FD.T @ a_FD) * np.linalg.norm(b_FD.T @ b_FD)
    return float(np.square(a_FD.T @ b_FD).sum() / norms) if norms > 0 else 0.0
