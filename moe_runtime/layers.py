"""The layers, each usable alone in any PyTorch model."""

from moe_runtime.attention import CausalAttention, MixtureOfAttention, rotary_tables
from moe_runtime.block import Block, BlockOutput, ParallelBlock
from moe_runtime.experts import Experts
from moe_runtime.feed_forward import DenseFeedForward, MoEFeedForward
from moe_runtime.losses import load_balancing_loss, mean_gate_balance_loss, z_loss
from moe_runtime.norms import LayerNorm, RMSNorm
from moe_runtime.packing import packed_positions
from moe_runtime.routers import ExpertChoiceRouter, Routing, SoftRouter, TopKRouter, TopKSoftRouter

__all__ = [
    "Block",
    "BlockOutput",
    "CausalAttention",
    "DenseFeedForward",
    "ExpertChoiceRouter",
    "Experts",
    "LayerNorm",
    "MixtureOfAttention",
    "MoEFeedForward",
    "ParallelBlock",
    "RMSNorm",
    "Routing",
    "SoftRouter",
    "TopKRouter",
    "TopKSoftRouter",
    "load_balancing_loss",
    "mean_gate_balance_loss",
    "packed_positions",
    "rotary_tables",
    "z_loss",
]
