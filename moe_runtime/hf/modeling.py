"""The causal LM as an ordinary transformers model: dense, Mixture of Experts, or with mixtures of attention.

The layers come from `moe_runtime` by absolute import, so that a published copy of this file works wherever
the package is installed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from moe_runtime.attention import (
    MixtureProjection,
    Rotary,
    RoutedMixtureProjection,
    RoutedQueryProjection,
    capped_attention,
)
from moe_runtime.block import Block, BlockOutput
from moe_runtime.experts import Experts
from moe_runtime.linear import Linear
from moe_runtime.norms import OffsetRMSNorm, make_norm
from moe_runtime.packing import check_cu_seqlens, packed_positions
from moe_runtime.publishing import AUTO_MAP
from moe_runtime.routers import SoftRouter, TopKRouter, TopKSoftRouter

from .configuration import MoeRuntimeConfig
from .rotary import MoeRuntimeRotaryEmbedding

# what transformers does not know how to draw, and has its weight drawn as that of a Linear
DRAWN_LIKE_LINEAR = (
    TopKRouter,
    SoftRouter,
    TopKSoftRouter,
    MixtureProjection,
    RoutedMixtureProjection,
    RoutedQueryProjection,
)
MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


# --- outputs ---


@dataclass
class MoeRuntimeModelOutput(ModelOutput):
    """`aux_loss` and `z_loss` are sums over the MoE layers, `expert_count` [MoE layers, E] int32; padding
    excluded.

    The three are None in a model without experts, and where tokens go on from `past_key_values` without
    gradients: a step of decoding, which `generate` makes, would spend more time on them than on the choice.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    expert_count: Tensor | None = None


@dataclass
class MoeRuntimeCausalLMOutput(ModelOutput):
    """As `MoeRuntimeModelOutput`; in training `loss` contains both auxiliary losses times their factors."""

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    expert_count: Tensor | None = None


# --- attention, by transformers' rules ---


def eager_attention_forward(
    module: "MoeRuntimeAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain matrix products, which also returns the weights [B, heads, L, keys]."""
    return capped_attention(query, key, value, attention_mask, scaling, softcap)


def _check_flash_dtype(implementation: str, query: Tensor) -> None:
    """transformers would look for the dtype of a Linear below the attention, and there is none."""
    if query.dtype == torch.float32:  # never under autocast, in which the projections return half precision
        raise ValueError(
            f"attn_implementation {implementation!r} needs a model in float16 or bfloat16, or autocast, got "
            "float32; load it with dtype=torch.bfloat16"
        )


class MoeRuntimeAttention(nn.Module):
    """The attention call of one layer: its cache, and the kernel that `config._attn_implementation` names.

    It owns no parameters: it is the `attend` of a MixtureOfAttention, which projects for all attention
    experts.
    """

    def __init__(self, config: MoeRuntimeConfig, layer_idx: int) -> None:
        super().__init__()
        attention = config.model_config().attention_config(layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = attention.head_dim
        self.num_key_value_groups = attention.attended_heads // attention.total_kv_heads
        self.scaling = attention.score_scale
        # only where it is set, because some implementations do not know it
        self.options = {} if attention.logit_cap is None else {"softcap": attention.logit_cap}
        self.sliding_window = attention.sliding_window
        self.is_causal = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, heads, L, P], key, value [B, kv heads, L, P] -> [B, L, heads, P], weights if eager."""
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, eager_attention_forward
        )
        if implementation.startswith("flash_attention"):
            _check_flash_dtype(implementation, query)
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **self.options,
            **kwargs,
        )


# Inherits Block, so that the checkpoint's keys have no extra level.
class MoeRuntimeDecoderLayer(Block, GradientCheckpointingLayer):
    """A Block that attends by transformers' rules and can be checkpointed."""

    def __init__(self, config: MoeRuntimeConfig, layer_idx: int) -> None:
        super().__init__(
            config.model_config().block_config(layer_idx), MoeRuntimeAttention(config, layer_idx)
        )


# --- models ---


class MoeRuntimePreTrainedModel(PreTrainedModel):
    """What base model and head share: what transformers may do with them, initialisation, publishing."""

    config: MoeRuntimeConfig
    config_class = MoeRuntimeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MoeRuntimeDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["selection_bias"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": OutputRecorder(TopKRouter, index=0),
        "hidden_states": OutputRecorder(MoeRuntimeDecoderLayer, index=0),
        "attentions": OutputRecorder(MoeRuntimeAttention, index=1),
    }

    @property
    def _supports_sdpa(self) -> bool:
        """PyTorch's attention cannot cap its scores."""
        return self.config.attn_logit_softcapping is None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, OffsetRMSNorm):
            init.zeros_(module.weight)
        if isinstance(module, DRAWN_LIKE_LINEAR):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        zeros = {
            TopKRouter: ["selection_bias"],
            MixtureProjection: ["bias"],
            RoutedQueryProjection: ["bias"],
            RoutedMixtureProjection: ["bias"],
            Experts: ["gate_up_bias", "down_bias"],
        }
        for name in zeros.get(type(module), ()):
            if getattr(module, name) is not None:
                init.zeros_(getattr(module, name))

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As transformers', and ready to publish: copies this code along and names it in `auto_map`."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


class MoeRuntimeModel(MoeRuntimePreTrainedModel):
    """Embeddings, layers and the last norm; no head."""

    def __init__(self, config: MoeRuntimeConfig) -> None:
        super().__init__(config)
        described = config.model_config()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MoeRuntimeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = make_norm(
            described.norm, described.hidden_size, eps=described.norm_eps, bias=described.norm_bias
        )
        self.rotary_emb = MoeRuntimeRotaryEmbedding(config)
        self.sliding_rotary_emb = None
        if config.sliding_rope_parameters is not None:
            sliding = copy.copy(config)
            sliding.rope_parameters = config.sliding_rope_parameters
            self.sliding_rotary_emb = MoeRuntimeRotaryEmbedding(sliding)
        self.has_rotary = [described.is_rotary_layer(number) for number in range(config.num_hidden_layers)]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeRuntimeModelOutput:
        """Hidden states of token ids, or of embeddings, [B, L, D].

        Positions that do not go up by one, or transformers' `cu_seq_lens_q`, pack documents that do not see
        each other, also with `use_cache`; without `past_key_values` and without an `attention_mask`, whose
        presence hides them from transformers.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, or `cu_seq_lens_q` has
                another form than in `moe_runtime.packing` or comes with a cache and no `position_ids`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        B, L = inputs_embeds.shape[:2]
        if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values must be None with cu_seq_lens_q and no position_ids, because positions "
                    f"then start at 0, got {type(past_key_values).__name__}"
                )
            check_cu_seqlens("cu_seq_lens_q", kwargs["cu_seq_lens_q"])
            position_ids = packed_positions(kwargs["cu_seq_lens_q"], B * L).view(B, L)
        # Before a cache is made and positions are filled in: positions that are given, and no cache, are what
        # transformers finds packed documents by, which waits for the device.
        mask_by_type = self._masks(attention_mask, inputs_embeds, past_key_values, position_ids)
        statistics = past_key_values is None or torch.is_grad_enabled() or self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(L, device=inputs_embeds.device) + seen).unsqueeze(0)
        x_BLD = inputs_embeds
        if self.config.embedding_multiplier != 1.0:
            # a tensor, so that the multiplier is rounded to the dtype as Gemma's is
            x_BLD = x_BLD * x_BLD.new_full((), self.config.embedding_multiplier)
        rotary_by_type = self._rotary_by_type(x_BLD, position_ids)
        token_mask_BL = _token_mask(attention_mask, L)
        outputs: list[BlockOutput] = []
        for layer, kind, has_rotary in zip(
            self.layers, self.config.layer_types, self.has_rotary, strict=True
        ):
            # by position: reentrant checkpointing follows gradients of positional arguments only, and turns a
            # named tuple into a plain one
            output = layer(
                x_BLD,
                rotary_by_type[kind] if has_rotary else None,
                token_mask_BL,
                statistics,
                attention_mask=mask_by_type[kind],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            x_BLD = output[0]
            outputs.append(BlockOutput(*output))
        aux_loss, z_loss, expert_count = _summed_over_layers(outputs)
        return MoeRuntimeModelOutput(
            last_hidden_state=self.norm(x_BLD),
            past_key_values=past_key_values,
            aux_loss=aux_loss,
            z_loss=z_loss,
            expert_count=expert_count,
        )

    def _rotary_by_type(self, x_BLD: Tensor, position_ids: Tensor) -> dict[str, Rotary]:
        """The rotation of each layer type."""
        rotary = sliding = self.rotary_emb(x_BLD, position_ids=position_ids)
        if self.sliding_rotary_emb is not None:
            sliding = self.sliding_rotary_emb(x_BLD, position_ids=position_ids)
        return {"full_attention": rotary, "sliding_attention": sliding}

    def _masks(
        self,
        attention_mask: Tensor | dict[str, Any] | None,
        inputs_embeds: Tensor,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
    ) -> dict[str, Any]:
        """The mask of each layer type in the form that the attention implementation wants."""
        if isinstance(attention_mask, dict):  # generate() made them already
            return attention_mask
        return {
            kind: MASKS[kind](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for kind in set(self.config.layer_types)
        }


class MoeRuntimeForCausalLM(MoeRuntimePreTrainedModel, GenerationMixin):
    """The language model: `MoeRuntimeModel` and a head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoeRuntimeConfig) -> None:
        super().__init__(config)
        self.model = MoeRuntimeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(  # trainers and generate() look for arguments by these names
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeRuntimeCausalLMOutput:
        """Logits [B, L, V] of the last `logits_to_keep` positions (0: all), and the loss if labels are given.

        loss = NLL, and in training NLL + router_aux_loss_coef · Σ balance + router_z_loss_coef · Σ z over
        layers. With `num_items_in_batch` (the labels of a whole accumulated batch) each micro-batch adds its
        share of both, so that their sum over micro-batches is the mean over the batch.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.final_logit_softcapping is not None:
            cap = self.config.final_logit_softcapping
            logits = (logits / cap).tanh() * cap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
            if self.training and outputs.aux_loss is not None:
                loss = loss + self._auxiliary_loss(outputs, labels, **kwargs).to(loss.device)
        return MoeRuntimeCausalLMOutput(
            loss=loss,
            logits=logits,
            **{name: value for name, value in outputs.items() if name != "last_hidden_state"},
        )

    def _auxiliary_loss(
        self,
        outputs: MoeRuntimeModelOutput,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        loss = (
            self.config.router_aux_loss_coef * outputs.aux_loss
            + self.config.router_z_loss_coef * outputs.z_loss
        )
        if num_items_in_batch is None:
            return loss
        predicted = labels[:, 1:] if shift_labels is None else shift_labels
        share = (predicted != -100).sum() / num_items_in_batch
        return loss * share.to(loss.device)

    @torch.no_grad()
    def update_selection_bias(self, expert_count: Tensor, gamma: float = 1e-3) -> None:
        """Balance the experts without an auxiliary loss: call it after each optimiser step.

        Args:
            expert_count: the output's `expert_count` [MoE layers, E], summed over micro-batches and devices.
            gamma: step of each bias, see `TopKRouter.update_selection_bias`.
        """
        routers = [module for module in self.modules() if isinstance(module, TopKRouter)]
        for router, count_E in zip(routers, expert_count, strict=True):
            router.update_selection_bias(count_E, gamma)


def _token_mask(attention_mask: Any, L: int) -> Tensor | None:
    """False for padding among the last L tokens; None where the mask does not say (no or a finished one)."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -L:].bool()


def _summed_over_layers(outputs: list[BlockOutput]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Balance loss and z loss summed, counts stacked; None without a MoE layer. Layers may span devices."""
    balance = _stacked([output.balance_loss for output in outputs])
    z = _stacked([output.z_loss for output in outputs])
    count = _stacked([output.count_E for output in outputs])
    return (None if balance is None else balance.sum()), (None if z is None else z.sum()), count


def _stacked(values: list[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.stack([value.to(present[0].device) for value in present]) if present else None


# Lets save_pretrained copy this code; a published copy runs this too, so that it can be saved again.
MoeRuntimeConfig.register_for_auto_class()
MoeRuntimeModel.register_for_auto_class("AutoModel")
MoeRuntimeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
