"""Experts and routers become one mixture (stage 4 of UpIT, first half), as an ordinary upcycling run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from upcycle.names import layer
from upcycle.provenance import copy_side_files
from upcycle.recipe import Dtype
from upcycle.run import upcycle
from upcycle.stored import StoredRows, stored_rows
from upcycle.upit.expert import LORA_A, LORA_B, ExpertReader, open_expert
from upcycle.upit.feed_forward import dense_config
from upcycle.upit.recipe import UpitRecipe

ADAPTER_NAME = "adapter"


def assemble(
    recipe: UpitRecipe,
    experts: Sequence[str | Path],
    rest: str | Path,
    routers: Path | None,
    output: Path,
    dtype: Dtype,
) -> Any:
    """Write the mixture to a folder that does not exist yet.

    Args:
        experts: folders of the experts.
        rest: folder of the dense model that everything else comes from: the base, or the mean.
        routers: file of the routers' weights; None: they are drawn.
        dtype: of the mixture's weights.

    Returns:
        The upcycling run's result, as plain values.
    """
    if Path(rest).absolute() != Path(recipe.base).expanduser().absolute():
        copy_side_files(Path(recipe.base).expanduser(), Path(rest))
    sources = [str(expert) for expert in experts]
    plan = recipe.assembly(str(output), sources, str(rest), "" if routers is None else str(routers), dtype)
    if recipe.lora_experts == "adapter":
        plan = replace(plan, method="copy", base=recipe.base, sources=(), experts=len(experts))
    return upcycle(plan).to_dict()


def add_adapter(model: Any, experts: Sequence[str | Path]) -> None:
    """Put low-rank experts on a mixture of equal ones as grouped adapters, their routers still to be trained.

    The stacked gate and up projections have one A: both factors' rows, and B has each factor's columns beside
    zeros. Experts of a smaller rank are filled up with zeros.
    """
    from moe_runtime.hf.lora import add_expert_lora

    opened = [open_expert(path) for path in experts]
    R = max(2 * expert.rank for expert in opened)
    add_expert_lora(model, r=R, alpha=R)
    rows = stored_rows(opened[0].base, dense_config(opened[0].base))
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            lora = block.mlp.experts.expert_lora
            for parameter in lora.parameters():
                parameter.zero_()
            for place, expert in enumerate(opened):
                with ExpertReader(expert) as reader:
                    for kind in ("gate", "up", "down"):
                        stored = rows.get(f"{layer(number)}.mlp.{kind}_proj.weight")
                        if stored is not None:  # without a gate there are two
                            _fill(reader, stored, lora, place, kind)
            block.mlp.router.weight.requires_grad_(True)


def _fill(reader: ExpertReader, stored: StoredRows, lora: Any, place: int, kind: str) -> None:
    """Copy one projection's factors to where they belong in those of its layer."""
    A_RI, B_OR = (torch.from_numpy(reader.factor(stored.tensor + part)) for part in (LORA_A, LORA_B))
    if stored.run:
        B_OR = B_OR[stored.first : stored.first + stored.run]
    R, O = A_RI.shape[0], B_OR.shape[0]
    name = "down_proj" if kind == "down" else "gate_up_proj"
    # the gate is above the up projection, and its factors have the first ranks
    first_row, first_rank = 0, 0
    if kind == "up":
        first_row = lora.lora_B[name].shape[1] - O
        first_rank = R if first_row else 0
    lora.lora_A[name][place, first_rank : first_rank + R] = A_RI
    lora.lora_B[name][place, first_row : first_row + O, first_rank : first_rank + R] = B_OR
