"""Transformer blocks: sequential (attention, then feed-forward), or parallel (both added once)."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_runtime.attention import MixtureOfAttention, Rotary
from moe_runtime.config import BlockConfig
from moe_runtime.feed_forward import DenseFeedForward, MoEFeedForward
from moe_runtime.norms import make_norm


class BlockOutput(NamedTuple):
    """The residual stream, and what a Mixture of Experts adds to it: None in a block with a dense
    feed-forward, or without statistics.

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

    A parallel block with one norm reads it twice, norm2 = norm1, as BAM and Cohere's models do. With
    `norm_placement` other than "before" a sequential block norms what it adds. What is added may be scaled:

        after   h = x + m · norm1(attention(x))          y = h + m · norm2(feed_forward(h))
        both    h = x + m · norm2(attention(norm1(x)))   y = h + m · norm4(feed_forward(norm3(h)))

    The norms have the names that Llama, OLMo 2 and Gemma give them, in which `post_attention_layernorm` is
    the norm before the feed-forward if that is the only place of norms, else the one after the attention.

    `attend` replaces the attention itself, see MixtureOfAttention.
    """

    def __init__(self, config: BlockConfig, attend: nn.Module | None = None) -> None:
        super().__init__()
        self.block_config = config
        self.input_layernorm = self.post_attention_layernorm = None
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = None
        for name in config.norm_names:
            norm = make_norm(
                config.norm, config.attention.hidden_size, eps=config.norm_eps, bias=config.norm_bias
            )
            setattr(self, name, norm)
        self.self_attn = MixtureOfAttention(config.attention, attend)
        moe = config.feed_forward.router is not None
        self.mlp: MoEFeedForward | DenseFeedForward
        self.mlp = MoEFeedForward(config.feed_forward) if moe else DenseFeedForward(config.feed_forward)

    def forward(
        self,
        x_BLD: Tensor,
        rotary: Rotary | None = None,
        token_mask_BL: Tensor | None = None,
        statistics: bool = True,
        **attend_arguments: Any,
    ) -> BlockOutput:
        """One layer. `token_mask_BL` is False for padding, which counts in no auxiliary loss or statistic;
        without `statistics` there are none.
        """
        config = self.block_config
        before = config.norm_placement == "before"
        n_BLD = x_BLD if self.input_layernorm is None else self.input_layernorm(x_BLD)
        attended_BLD = self.self_attn(n_BLD, rotary, **attend_arguments)
        residual_BLD = x_BLD + self._added(attended_BLD, None if before else self.post_attention_layernorm)
        norm = self.post_attention_layernorm if before else self.pre_feedforward_layernorm
        if config.kind == "sequential":
            n_BLD = residual_BLD if norm is None else norm(residual_BLD)
        elif norm is not None:
            n_BLD = norm(x_BLD)
        # what is added as it is, the last step of the feed-forward adds
        adds = before and config.residual_multiplier == 1.0
        into_BLD = residual_BLD if adds else None
        if isinstance(self.mlp, DenseFeedForward):
            y_BLD, counted = self.mlp(n_BLD, into_BLD), (None, None, None)
        else:
            y_BLD, routing = self.mlp(n_BLD, into_BLD, token_mask_BL, statistics=statistics)
            counted = (routing.balance_loss, routing.z_loss, routing.count_E)
        if not adds:
            y_BLD = residual_BLD + self._added(y_BLD, self.post_feedforward_layernorm)
        return BlockOutput(y_BLD, *counted)

    def _added(self, y_BLD: Tensor, norm: nn.Module | None) -> Tensor:
        """What a branch adds to the residual stream."""
        multiplier = self.block_config.residual_multiplier
        y_BLD = y_BLD if norm is None else norm(y_BLD)
        return y_BLD if multiplier == 1.0 else y_BLD * multiplier


class ParallelBlock(Block):
    """y = x + attention(n) + feed_forward(n), n = norm(x): a Block whose config must say "parallel".

    Both branches read the same n, or with `num_norms` 2 each a norm of its own, and are added once. Source:
    BAM, Zhang et al. 2024.
    """

    def __init__(self, config: BlockConfig, attend: nn.Module | None = None) -> None:
        if config.kind != "parallel":
            raise ValueError(f"kind must be 'parallel' for a ParallelBlock, got {config.kind!r}; use Block")
        super().__init__(config, attend)
