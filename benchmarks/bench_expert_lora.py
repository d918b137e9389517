"""LoRA of experts as grouped products, against PEFT's LoRA of the same stacked weights.

A small model of transformers, with the same weights and, through files, the same adapters. PEFT adds B A
to the weights of all experts in every forward. It is timed on transformers' own grouped products, which it
meets by default, and on this project's (on a CPU, where it takes seconds, forward only). No dropout; the base
weights are frozen.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM, set_seed

from benchmarks.shapes import EXPERTS
from benchmarks.whole_models import rms_error
from moe_runtime.hf.experts_interface import register
from moe_runtime.hf.lora import add_expert_lora, load_expert_lora, save_expert_lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
VOCAB_SIZE = 512
RANK = 8


@dataclass(frozen=True)
class Case:
    model: str
    layers: int
    heads: int
    tokens: int


CASES = {False: Case("olmoe-1b-7b", 2, 16, 256), True: Case("tiny", 1, 2, 24)}
ROUNDS = {"forward": 7, "forward_backward": 3}


def base_model(case: Case) -> nn.Module:
    """Random weights, wide enough that experts and their adapters matter to the logits."""
    sizes = EXPERTS[case.model]
    config = OlmoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=sizes.D,
        intermediate_size=sizes.F,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        num_experts=sizes.E,
        num_experts_per_tok=sizes.K,
        initializer_range=sizes.D**-0.5,
        pad_token_id=None,
        eos_token_id=None,
        dtype=DTYPE,
    )
    set_seed(0)
    return OlmoeForCausalLM._from_config(config, experts_implementation="moe_runtime").to(DEVICE).eval()


def sharing(model: nn.Module, experts: str) -> Any:
    """The same parameters in modules of their own, so that one model's adapters are not the other's."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: Any = copy.deepcopy(model, shared)
    twin.set_experts_implementation(experts)
    return twin


def adapted_models(base: nn.Module, folder: Path) -> dict[str, nn.Module]:
    peft = pytest.importorskip("peft")
    ours = sharing(base, "moe_runtime")
    add_expert_lora(ours, r=RANK)
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=RANK**-0.5)
    save_expert_lora(ours, folder)
    models = {
        name: peft.PeftModel.from_pretrained(sharing(base, experts), folder, is_trainable=True).eval()
        for name, experts in (("peft", "grouped_mm"), ("peft_moe_runtime", "moe_runtime"))
    }
    loaded = sharing(base, "moe_runtime")
    load_expert_lora(loaded, folder)
    return {**models, "moe_runtime": loaded}


def forward(model: nn.Module, ids_BL: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        return (model(input_ids=ids_BL, use_cache=False).logits,)

    return call


def forward_backward(model: nn.Module, ids_BL: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The logits, and the rms of every adapter's gradient, whose entries PEFT keeps in another order."""
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def call() -> tuple[Tensor, ...]:
        logits = model(input_ids=ids_BL, use_cache=False).logits
        gradients = torch.autograd.grad(logits.float().square().mean(), adapters)
        sizes = torch.stack([gradient.float().square().mean().sqrt() for gradient in gradients])
        return logits.detach(), sizes.sort().values

    return call


DIRECTIONS = {"forward": forward, "forward_backward": forward_backward}


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    register()
    case = CASES[request.config.getoption("--tiny")]
    base = base_model(case)
    adapted = adapted_models(base, tmp_path_factory.mktemp("adapter"))
    ids_BL = torch.randint(VOCAB_SIZE, (1, case.tokens), generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    expected = forward_backward(adapted["peft"], ids_BL)()
    # roundings to bfloat16 change some tokens' experts in the second layer; without adapters all is different
    without = rms_error(forward(sharing(base, "moe_runtime"), ids_BL)()[0], expected[0])
    return case, ids_BL, adapted, expected, 0.2 * without


@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_expert_lora(compare, models, direction):
    case, ids_BL, adapted, expected, largest = models
    calls = {name: DIRECTIONS[direction](model, ids_BL) for name, model in adapted.items()}
    if DEVICE == "cpu" and direction == "forward_backward":
        del calls["peft_moe_runtime"]

    def check(name: str, out: tuple[Tensor, ...]) -> dict[str, float]:
        errors = {
            result: rms_error(value, exact)
            for result, value, exact in zip(("logits", "gradients"), out, expected, strict=False)
        }
        for result, error in errors.items():
            assert error <= largest, f"{name}: {result} is off PEFT's by {error:.1e}, more than {largest:.1e}"
        return errors

    compare(
        "expert_lora",
        {
            "shape": case.model,
            "layers": case.layers,
            "tokens": case.tokens,
            "rank": RANK,
            "direction": direction,
            "dtype": "bfloat16",
        },
        calls,
        check=check,
        rounds=ROUNDS[direction],
    )
