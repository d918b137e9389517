"""Mixture-of-Experts models that start from dense checkpoints, on a kernel-backed PyTorch runtime.

Names are loaded when first used, so that `import moe_runtime.config` needs no torch.
"""

from importlib import import_module

_HOME = {
    "AttentionConfig": "config",
    "BlockConfig": "config",
    "FeedForwardConfig": "config",
    "ModelConfig": "config",
    "RouterConfig": "config",
    "Block": "layers",
    "DenseFeedForward": "layers",
    "ExpertChoiceRouter": "layers",
    "Experts": "layers",
    "MixtureOfAttention": "layers",
    "MoEFeedForward": "layers",
    "ParallelBlock": "layers",
    "SoftRouter": "layers",
    "TopKRouter": "layers",
    "TopKSoftRouter": "layers",
    "accelerate_model": "hf.accelerate",
    "expert_stats": "stats.measure",
    "load_balancing_loss": "layers",
    "mean_gate_balance_loss": "layers",
    "pack_experts": "packed_experts",
    "register": "hf.experts_interface",
    "unpack_experts": "packed_experts",
    "z_loss": "layers",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
