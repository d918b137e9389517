"""Tiny random models and runs for tests of layers and of the causal LM."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.hf import MoeRuntimeConfig, MoeRuntimeForCausalLM

VOCAB_SIZE = 61

DENSE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # wide, so that attention and routing are far from uniform
}
MOE = DENSE | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
BAM = MOE | {
    "block": "parallel",
    "num_norms": 1,
    "num_attention_experts": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
}
BAM_SHARED_KV = BAM | {"attention_kv": "shared", "num_key_value_heads": 2}
BAM_TOP_K = BAM | {"attention_top_k": 2}
BAM_SHARED_KV_TOP_K = BAM_SHARED_KV | {"attention_top_k": 2, "qk_norm": "rms_norm"}
KINDS = {
    "dense": DENSE,
    "moe": MOE,
    "bam": BAM,
    "bam-shared-kv": BAM_SHARED_KV,
    "bam-top-k": BAM_TOP_K,
    "bam-shared-kv-top-k": BAM_SHARED_KV_TOP_K,
}


def tiny_model(kind: dict[str, Any] = MOE, *, seed: int = 0, **changes: Any) -> MoeRuntimeForCausalLM:
    """A random model in eval mode; norms are perturbed, because all-ones weights would hide their absence."""
    torch.manual_seed(seed)
    model = MoeRuntimeForCausalLM(MoeRuntimeConfig(**(kind | changes))).eval()
    perturb(model)
    return model


def perturb(module: nn.Module) -> None:
    """Random vectors where initialisation left constants: norms, biases."""
    for parameter in module.parameters():
        if parameter.dim() == 1 or (parameter == parameter.flatten()[0]).all():
            nn.init.normal_(parameter, mean=0.5, std=0.3)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that are the same, rounded, in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(call: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, the gradient of x and those of all parameters, under a random upstream gradient."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = call(module, x)
    y.backward(randn(*y.shape, seed=99).to(y.dtype))
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "dx": x.grad} | grads


# Two orders of summation of one layer differ by rounding only. These bounds are in units of the data's rms; a
# wrong head, norm or gate is off by 1e-1 or more. (The yardstick of close.py bounds one kernel's error by
# another's, which is a toss-up for the worst element of a whole layer.)
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-5}


def assert_equal_up_to_rounding(
    name: str, actual: Tensor, expected: Tensor, bound: float | None = None
) -> None:
    """`bound` replaces that of ROUNDING where a test says why."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    rms = expected.square().mean().sqrt()
    assert rms > 0, f"{name}: all zeros are expected, so this compares nothing"
    error = ((actual - expected).abs().max() / rms).item()
    bound = ROUNDING[actual.dtype] if bound is None else bound
    assert error <= bound, f"{name}: worst error {error:.2e} of the data's rms"


def assert_same_function(
    actual: Callable[[nn.Module, Tensor], Tensor],
    reference: Callable[[nn.Module, Tensor], Tensor],
    module: nn.Module,
    x: Tensor,
) -> None:
    """Two ways to compute one module agree: in float64 with all gradients, and in float32."""
    with torch.no_grad():
        assert_equal_up_to_rounding("output in float32", actual(module, x), reference(module, x))
    module, x = copy.deepcopy(module).double(), x.double()
    mine, theirs = outcome(actual, module, x), outcome(reference, module, x)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_equal_up_to_rounding(name, mine[name], value)
