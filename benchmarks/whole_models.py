"""One causal language model in all the implementations that are compared, and the dense models it is held to.

The MoE models have the same weights: random, wide enough that a wrong expert or a wrong gate changes the
logits. The dense ones are this project's, with the same attention and their own random weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from benchmarks.floor import Work
from moe_runtime.config import ModelConfig
from moe_runtime.families import model_config
from moe_runtime.flops import (
    decode_bytes,
    decode_flops,
    kv_cache_bytes,
    match_dense,
    model_flops,
    model_parameters,
)
from moe_runtime.hf import MoeRuntimeConfig, MoeRuntimeForCausalLM
from moe_runtime.hf.experts_interface import register

_COMMON = {"initializer_range": 0.05, "router_aux_loss_coef": 0.0, "pad_token_id": None}
_MIXTRAL = _COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN3 = _COMMON | {"num_experts_per_tok": 8, "norm_topk_prob": True}


@dataclass(frozen=True)
class Shape:
    """A published model with fewer layers and, on a CPU, narrower; `tokens` are those of a row."""

    config: type[MixtralConfig] | type[Qwen3MoeConfig]
    fields: dict[str, Any]
    tokens: int

    def make_config(self, experts: str | None = None) -> MixtralConfig | Qwen3MoeConfig:
        return self.config(**self.fields, experts_implementation=experts)


def _sizes(D: int, F: int, layers: int, heads: int, kv_heads: int, P: int, V: int) -> dict[str, Any]:
    return {
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": P,
        "vocab_size": V,
    }


def _qwen3(experts: int, **sizes: int) -> dict[str, Any]:
    return _QWEN3 | _sizes(**sizes) | {"num_experts": experts, "moe_intermediate_size": sizes["F"]}


SHAPES = {
    "gpu": {
        "mixtral-8x7b, 1 layer": Shape(
            MixtralConfig, _MIXTRAL | _sizes(4096, 14336, 1, 32, 8, 128, 32000), tokens=2048
        ),
        "qwen3-30b-a3b, 2 layers": Shape(
            Qwen3MoeConfig,
            _qwen3(128, D=2048, F=768, layers=2, heads=32, kv_heads=4, P=128, V=32000),
            tokens=2048,
        ),
    },
    "cpu": {
        "mixtral, an eighth as wide": Shape(
            MixtralConfig, _MIXTRAL | _sizes(512, 1792, 2, 8, 2, 64, 4096), tokens=256
        ),
        "qwen3-moe, a quarter as wide": Shape(
            Qwen3MoeConfig, _qwen3(64, D=512, F=192, layers=2, heads=8, kv_heads=2, P=64, V=4096), tokens=256
        ),
    },
    "tiny": {
        "mixtral, tiny": Shape(MixtralConfig, _MIXTRAL | _sizes(32, 48, 1, 4, 2, 8, 61), tokens=8),
        "qwen3-moe, tiny": Shape(
            Qwen3MoeConfig, _qwen3(16, D=32, F=16, layers=1, heads=4, kv_heads=2, P=8, V=61), tokens=8
        ),
    },
}
IMPLEMENTATIONS = ("moe_runtime", "eager", "grouped_mm", "batched_mm")  # of experts, in transformers
_CLASSES = {MixtralConfig: MixtralForCausalLM, Qwen3MoeConfig: Qwen3MoeForCausalLM}


# --- models ---


def transformers_model(shape: Shape, experts: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """With the seeded weights, the same for every `experts`, rounded to bfloat16."""
    register()
    set_seed(0)
    model = _CLASSES[shape.config](shape.make_config(experts)).to(torch.bfloat16)
    return model.to(device, dtype).eval()


def our_model(original: torch.nn.Module, device: str) -> MoeRuntimeForCausalLM:
    """This project's model with the weights of one of transformers'."""
    config = described(original.config)
    model = MoeRuntimeForCausalLM(MoeRuntimeConfig.from_model_config(config)).to(torch.bfloat16)
    weights = {
        name.replace("mlp.gate.", "mlp.router."): weight for name, weight in original.state_dict().items()
    }
    for name, weight in weights.items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # one row for all heads there
            heads = config.num_attention_heads if "q_norm" in name else config.num_key_value_heads
            weights[name] = weight.expand(heads, -1)
    model.load_state_dict(weights)
    return model.to(device).eval()


def dense_model(config: ModelConfig, device: str) -> MoeRuntimeForCausalLM:
    set_seed(0)
    return MoeRuntimeForCausalLM(MoeRuntimeConfig.from_model_config(config)).to(device, torch.bfloat16).eval()


def described(config: Any) -> ModelConfig:
    return model_config(config.to_dict())


def dense_configs(config: ModelConfig, tokens: int) -> dict[str, ModelConfig]:
    """Matched on the FLOPs per token of a row of so many, and on the width of one expert."""
    return {
        "dense_active_flops": match_dense(config, "active_flops", context=tokens, convention="full").config,
        "dense_width": match_dense(config, "width").config,
    }


# --- what a call has to do, by formula; every query times every key, as PyTorch's counter has attention ---


def prefill_work(config: ModelConfig, tokens: int) -> Work:
    """A prompt, with the logits of its last token; every weight in use is read once, the cache is written."""
    flops = model_flops(config, tokens, "full")
    head = flops.pop("head")
    weights = decode_bytes(config, tokens, batch_size=tokens).weights
    return Work(flops.total() * tokens + head, weights + kv_cache_bytes(config, tokens))


def decode_work(config: ModelConfig, context: int) -> Work:
    """One token that sees `context`, itself among them."""
    return Work(decode_flops(config, context).total(), decode_bytes(config, context).total)


def train_work(config: ModelConfig, tokens: int) -> Work:
    """Three forwards' FLOPs; the weights twice, their gradients, AdamW's 4 reads and 3 writes."""
    passes = 2 + 1 + 7
    return Work(
        3 * model_flops(config, tokens, "full").total() * tokens,
        passes * 2 * model_parameters(config).total(),
    )


# --- what is timed ---


def rms_error(value: Tensor, exact: Tensor) -> float:
    """In units of the exact one's rms."""
    error = (value.detach().to(exact.dtype) - exact).square().mean().sqrt()
    return (error / exact.square().mean().sqrt()).item()
