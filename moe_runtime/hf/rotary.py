"""The rotary embedding by transformers' rules: every kind of RoPE that it can initialise and update."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from moe_runtime.attention import Rotary


class MoeRuntimeRotaryEmbedding(nn.Module):
    """cos and sin [B, L, R] of every position, float32, for any RoPE type of transformers, also partial."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: PreTrainedConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[Tensor, float]:
        """theta^(-2r / rotated width), and no scaling of attention. transformers calls it by this name."""
        rope = config.rope_parameters
        width = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        pair_R = torch.arange(0, width, 2, device=device, dtype=torch.float32)
        return rope["rope_theta"] ** (-pair_R / width), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> Rotary:
        angle_BLR = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        return angle_BLR.cos() * self.attention_scaling, angle_BLR.sin() * self.attention_scaling
