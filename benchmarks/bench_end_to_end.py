"""Whole models: a training step, a prefill and one decoded token, against transformers and dense models.

Ours is this project's causal LM, and transformers' own model with `experts_implementation="moe_runtime"`,
also after `accelerate_model`, which swaps its routers. Each MoE implementation has the same weights and must
give the logits (in training the loss and the gradient of the first layer's experts) of transformers' eager
path in float32 as nearly as that path does in bfloat16, within a factor. Dense models are matched on active
FLOPs and on the width of one expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import available, refuse_copies
from benchmarks.whole_models import (
    IMPLEMENTATIONS,
    SHAPES,
    Shape,
    decode_work,
    dense_configs,
    dense_model,
    described,
    our_model,
    prefill_work,
    rms_error,
    train_work,
    transformers_model,
)
from moe_runtime.hf.accelerate import accelerate_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
WORK = {"train_step": train_work, "prefill": prefill_work, "decode": decode_work}
ROUNDS = {"train_step": 5, "prefill": 20, "decode": 100}
# bfloat16 roundings change some tokens' experts; so the errors of transformers' eager path are the yardstick
TIMES_EAGER = 2.0


def train_step(model: torch.nn.Module, ids_BL: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, backward and AdamW; returns the loss and the gradient of the first layer's experts."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)
    experts = [p for name, p in model.named_parameters() if name.endswith("layers.0.mlp.experts.down_proj")]

    def step() -> tuple[Tensor, ...]:
        optimiser.zero_grad()
        loss = model(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        optimiser.step()
        return (loss.detach(), *(weight.grad for weight in experts))

    return step


def prefill(model: torch.nn.Module, ids_BL: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        return (model(input_ids=ids_BL, use_cache=True, logits_to_keep=1).logits,)

    return call


def decode(model: torch.nn.Module, ids_BL: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The last of the ids after all others, whose keys and values are there; the cache is then cut back."""
    before = ids_BL.shape[1] - 1
    with torch.no_grad():
        cache = model(input_ids=ids_BL[:, :before], use_cache=True).past_key_values

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        logits = model(input_ids=ids_BL[:, before:], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return (logits,)

    return call


PHASES = {"train_step": train_step, "prefill": prefill, "decode": decode}
RESULTS = {"train_step": ("loss", "ddown"), "prefill": ("logits",), "decode": ("logits",)}


def transformers_peer(shape: Shape, experts: str, phase: str, ids_BL: Tensor) -> Callable[[], Any]:
    if experts == "batched_mm":
        config = described(shape.make_config())
        rows = config.num_experts_per_tok * (1 if phase == "decode" else ids_BL.numel())
        refuse_copies(rows, 6 * config.hidden_size * config.moe_intermediate_size, DEVICE)
    return PHASES[phase](transformers_model(shape, experts, DTYPE, DEVICE), ids_BL)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SHAPES for name in SHAPES[kind]])
def bench_end_to_end(compare, tiny, kind, name, phase):
    if kind != ("tiny" if tiny else "gpu" if DEVICE == "cuda" else "cpu"):
        pytest.skip("the sizes of another device were not asked for")
    shape, make = SHAPES[kind][name], PHASES[phase]
    tokens = shape.tokens
    config = described(shape.make_config())
    ids_BL = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    exact, eager = (
        dict(
            zip(
                RESULTS[phase], make(transformers_model(shape, "eager", dtype, DEVICE), ids_BL)(), strict=True
            )
        )
        for dtype in (torch.float32, DTYPE)
    )
    largest = {result: TIMES_EAGER * rms_error(eager[result], exact[result]) for result in exact}

    served = transformers_model(shape, "moe_runtime", DTYPE, DEVICE)
    accelerated = transformers_model(shape, "moe_runtime", DTYPE, DEVICE)
    accelerate_model(accelerated)
    models = {
        "moe_runtime": our_model(served, DEVICE),
        "transformers_moe_runtime": served,
        "transformers_accelerated": accelerated,
    }
    works = dict.fromkeys(
        (*models, *(f"transformers_{name}" for name in IMPLEMENTATIONS)), WORK[phase](config, tokens)
    )
    for match, dense in dense_configs(config, tokens).items():
        models[match], works[match] = dense_model(dense, DEVICE), WORK[phase](dense, tokens)

    def check(name: str, out: tuple[Tensor, ...]) -> dict[str, float] | None:
        if name.startswith("dense_"):
            assert out[0].isfinite().all(), f"{name} is not finite"
            return None
        errors = {result: rms_error(value, exact[result]) for result, value in zip(exact, out, strict=True)}
        for result, error in errors.items():
            most = max(largest[result], torch.finfo(DTYPE).eps)
            assert error <= most, f"{name}: {result} is off by {error:.1e} of its rms, more than {most:.1e}"
        return errors

    compare(
        "end_to_end",
        {"model": name, "phase": phase, "tokens": tokens, "dtype": "bfloat16"},
        {name: make(model, ids_BL) for name, model in models.items()},
        check=check,
        rounds=ROUNDS[phase],
        work=works,
        peers=available(
            {
                f"transformers_{experts}": partial(transformers_peer, shape, experts, phase, ids_BL)
                for experts in IMPLEMENTATIONS[1:]
            }
        ),
    )
