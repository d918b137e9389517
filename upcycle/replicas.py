"""Which experts of a mixture to copy: those whose weights the loss on a text asks most to change.

    G_e = Σ over batches of |d loss / d weights of e|²

Every expert is there once. Then, until there are as many as wanted, the expert with the largest G_e / copies
of it so far gets one more, up to a bound; ties go to the lowest index. Each layer for itself.

Source: Expert Upcycling, 2026 (greedy by squared gradient norms over ten batches, at most three copies).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from torch import Tensor, nn


def replica_counts(norms: Sequence[float], num_experts: int, most: int = 3) -> tuple[int, ...]:
    """How many copies each expert of one layer gets.

    Args:
        norms: G of each expert.
        num_experts: of the output.
        most: copies of one expert.

    Raises:
        UpcycleError: so many experts cannot be made, or a norm is not finite.
    """
    E = len(norms)
    if not E <= num_experts <= most * E:
        raise UpcycleError(
            f"experts must be from {E} to {most * E}, {most} copies of each expert at most, got {num_experts}"
        )
    if not all(0 <= norm < float("inf") for norm in norms):
        raise UpcycleError(
            "the gradients of the experts must be finite, and are not; the text may be unusable"
        )
    counts = [1] * E
    for _ in range(num_experts - E):
        open_ = [expert for expert in range(E) if counts[expert] < most]
        counts[max(open_, key=lambda expert: (norms[expert] / counts[expert], -expert))] += 1
    return tuple(counts)


def gradient_norms(
    model: Any, batches: "Sequence[Tensor]", *, on_batch: Callable[[], object] = lambda: None
) -> "dict[int, list[float]]":
    """G of every expert by the number of its layer.

    Gradients are summed up and dropped one tensor at a time, so that no second copy of the weights is kept.
    The model is left frozen.

    Args:
        model: a causal LM of this project or of transformers, whose experts are stacked.
        batches: token ids [B, L] each; the loss is that of the next token.

    Raises:
        ValueError: the model has no routers, or its experts are not stacked.
    """
    from moe_runtime.stats.layers import expert_weights, routed_layers

    parameters: dict[int, list[nn.Parameter]] = {}
    for layer in routed_layers(model):
        if layer.kind != "feed_forward":
            continue
        if (weights := expert_weights(layer)) is None:
            raise ValueError(f"the experts of {layer.name} must be stacked in one tensor, and are not")
        match = re.search(r"\.(\d+)\.", f"{layer.name}.")
        assert match is not None
        of_experts = layer.block.get_submodule("experts").parameters()
        parameters[int(match[1])] = [p for p in of_experts if len(p) == len(weights[0])]
    totals = {number: [0.0] * len(members[0]) for number, members in parameters.items()}
    model.requires_grad_(False)
    with _summed(parameters, totals):
        for ids_BL in batches:
            model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
            on_batch()
    model.requires_grad_(False)
    return totals


@contextmanager
def _summed(parameters: "dict[int, list[nn.Parameter]]", totals: dict[int, list[float]]) -> Iterator[None]:
    """Adds the squares of every gradient to its expert's total, and drops the gradient."""
    import torch

    def hook(total: list[float]) -> "Callable[[Tensor], None]":
        def add(parameter: "Tensor") -> None:
            assert parameter.grad is not None
            norm_E = torch.linalg.vector_norm(parameter.grad.flatten(1), dim=1, dtype=torch.float64)
            for expert, square in enumerate(norm_E.square().tolist()):
                total[expert] += square
            parameter.grad = None

        return add

    handles = [
        parameter.requires_grad_().register_post_accumulate_grad_hook(hook(totals[number]))
        for number, members in parameters.items()
        for parameter in members
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


ROWS_PER_BATCH = 4


def choose_counts(
    folder: str | Path,
    texts: Sequence[str | Path],
    *,
    num_experts: int,
    most: int = 3,
    max_tokens: int = 20480,
    on_share: Callable[[float], object] = lambda _: None,
) -> tuple[tuple[int, ...], ...]:
    """`replicate.counts` for a mixture, one tuple for each layer with experts.

    Args:
        folder: of the mixture, with its tokenizer; it runs in its own type, on a GPU if there is one.
        texts: UTF-8 files, of which the mixture is to learn more.
        num_experts: of the output.
        most: copies of one expert.
        max_tokens: of each file. Batches have 4 rows of 512 tokens; 20,480 tokens make ten.

    Raises:
        OSError, ValueError: the model or a text is unusable, or so many experts cannot be made.
    """
    import torch

    from moe_runtime.hf.loading import load_causal_lm, load_tokenizer
    from moe_runtime.text import ROW_LENGTH, token_rows

    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(folder, device=device)
    longest = getattr(model.config, "max_position_embeddings", ROW_LENGTH)
    batches: list[Tensor] = []
    for text in texts:
        rows = token_rows(text, tokenizer, max_tokens=max_tokens, longest_row=longest, min_tokens=2)
        whole = [row for row in rows if row.shape == rows[0].shape]
        batches += torch.cat(whole).to(device).split(ROWS_PER_BATCH)
        batches += [row.to(device) for row in rows[len(whole) :] if row.shape[1] > 1]
    done = iter(range(1, len(batches) + 1))
    norms = gradient_norms(model, batches, on_batch=lambda: on_share(next(done) / len(batches)))
    return tuple(replica_counts(norms[number], num_experts, most) for number in sorted(norms))
