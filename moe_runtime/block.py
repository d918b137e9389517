"""Transformer blocks: sequential (attention, then feed-forward), or parallel (both added once)."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_runtime.attention import MixtureOfAttention, Rotary
from moe_runtime.config import BlockConfig
from moe_runtime.feed_forward import DenseFeedForward, MoEFeedForward
from moe_runtime.norms import make_norm


class BlockOutput(NamedTuple):
    """The residual stream, and what a Mixture of Experts adds to it: None in a block with a dense
    feed-forward.

    The losses are returned, never kept on a module, so that they survive gradient checkpointing.
    """

    x_BLD: Tensor
    balance_loss: Tensor | None
    z_loss: Tensor | None
    count_E: Tensor | None


class Block(nn.Module):
    """One layer of the model, of the kind its config names.

        sequential   h = x + attention(norm1(x))    y = h + feed_forward(norm2(h))
        parallel     y = x + attention(norm1(x)) + feed_forward(norm2(x))

    A parallel block with one norm reads it twice, norm2 = norm1, as BAM and Cohere's models do.

    `attend` replaces the attention itself, see MixtureOfAttention.
    """

    def __init__(self, config: BlockConfig, attend: nn.Module | None = None) -> None:
        super().__init__()
        D = config.attention.hidden_size
        self.block_config = config
        self.input_layernorm = make_norm(config.norm, D, eps=config.norm_eps, bias=config.norm_bias)
        self.post_attention_layernorm = None
        if config.num_norms == 2:
            self.post_attention_layernorm = make_norm(
                config.norm, D, eps=config.norm_eps, bias=config.norm_bias
            )
        self.self_attn = MixtureOfAttention(config.attention, attend)
        moe = config.feed_forward.router is not None
        self.mlp: MoEFeedForward | DenseFeedForward
        self.mlp = MoEFeedForward(config.feed_forward) if moe else DenseFeedForward(config.feed_forward)

    def forward(
        self,
        x_BLD: Tensor,
        rotary: Rotary | None = None,
        token_mask_BL: Tensor | None = None,
        **attend_arguments: Any,
    ) -> BlockOutput:
        """One layer. `token_mask_BL` is False for padding, which counts in no auxiliary loss or statistic."""
        n_BLD = self.input_layernorm(x_BLD)
        residual_BLD = x_BLD + self.self_attn(n_BLD, rotary, **attend_arguments)
        if self.post_attention_layernorm is not None:
            sequential = self.block_config.kind == "sequential"
            n_BLD = self.post_attention_layernorm(residual_BLD if sequential else x_BLD)
        if isinstance(self.mlp, DenseFeedForward):
            return BlockOutput(self.mlp(n_BLD, residual_BLD), None, None, None)
        y_BLD, routing = self.mlp(n_BLD, residual_BLD, token_mask_BL)
        return BlockOutput(y_BLD, routing.balance_loss, routing.z_loss, routing.count_E)


class ParallelBlock(Block):
    """y = x + attention(n) + feed_forward(n), n = norm(x): a Block whose config must say "parallel".

    Both branches read the same n, or with `num_norms` 2 each a norm of its own, and are added once. Source:
    BAM, Zhang et al. 2024.
    """

    def __init__(self, config: BlockConfig, attend: nn.Module | None = None) -> None:
        if config.kind != "parallel":
            raise ValueError(f"kind must be 'parallel' for a ParallelBlock, got {config.kind!r}; use Block")
        super().__init__(config, attend)
