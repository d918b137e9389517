"""Frozen descriptions of one layer each, and of a whole model. Torch-free, so that plans and FLOPs need no
weights.

`ModelConfig` is flat and uses the names of transformers' config.json; `ModelConfig.block_config(layer)`
derives the nested configs that layers are built from. `moe_runtime.hf.configuration` maps it to one
`PreTrainedConfig`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from moe_runtime.config_checks import check_above_zero, check_choice, check_positive

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Score = Literal["softmax", "sigmoid"]
Gate = Literal["raw", "renorm", "straight_through"]
GroupScore = Literal["top2_sum", "max"]
BalanceOver = Literal["batch", "sequence"]
KeyValue = Literal["expert", "shared"]
Norm = Literal["rms_norm", "layer_norm", "offset_rms_norm"]
QKNorm = Literal["rms_norm", "layer_norm", "offset_rms_norm", "joint_rms_norm"]
BlockKind = Literal["sequential", "parallel"]
NormPlacement = Literal["before", "after", "both"]
NumNorms = Literal[1, 2]
LayerType = Literal["full_attention", "sliding_attention"]
ExpertsBackend = Literal["moe_runtime", "megablocks"]

# Far above any model: a damaged or hostile file ends in a sentence, not in years of listing layers.
MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts, and what the gate of a chosen expert is.

    `gate` over the K chosen scores s: `raw` s; `renorm` s / sum of chosen s; `straight_through` (K = 1 only)
    the value 1 forward and the gradient of s backward. `renorm` with softmax equals a softmax over the chosen
    logits (Mixtral).
    """

    hidden_size: int
    num_experts: int
    experts_per_token: int
    score: Score = "softmax"
    gate: Gate = "renorm"
    scale: float = 1.0  # multiplies every gate (DeepSeek-V3's routed_scaling_factor)
    num_groups: int = 1  # experts are limited to the groups_kept best of num_groups groups
    groups_kept: int = 1
    group_score: GroupScore = "top2_sum"
    selection_bias: bool = False  # a per-expert bias on selection only, moved by `update_selection_bias`
    balance_over: BalanceOver = "batch"  # sequence: the mean of the balance loss of each sequence
    aux_only: bool = (
        False  # allow K = 1 with renorm in training, though only auxiliary losses train the router
    )

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_experts", "experts_per_token", "num_groups", "groups_kept")
        check_choice("score", self.score, Score)
        check_choice("gate", self.gate, Gate)
        check_choice("group_score", self.group_score, GroupScore)
        check_choice("balance_over", self.balance_over, BalanceOver)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be between 1 and num_experts ({self.num_experts}), "
                f"got {self.experts_per_token}"
            )
        if self.gate == "straight_through" and self.experts_per_token != 1:
            raise ValueError(
                f"experts_per_token must be 1 with gate 'straight_through', got {self.experts_per_token}; "
                "use 'renorm'"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups must divide num_experts ({self.num_experts}), got {self.num_groups}"
            )
        if self.groups_kept > self.num_groups:
            raise ValueError(
                f"groups_kept must be at most num_groups ({self.num_groups}), got {self.groups_kept}"
            )
        if self.groups_kept * (self.num_experts // self.num_groups) < self.experts_per_token:
            raise ValueError(
                f"groups_kept must leave at least experts_per_token ({self.experts_per_token}) experts, got "
                f"{self.groups_kept} groups of {self.num_experts // self.num_groups}"
            )


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """A dense feed-forward layer (`router` is None), or a Mixture of Experts, maybe with a shared expert."""

    hidden_size: int
    intermediate_size: int  # width of one expert, or of the dense layer
    activation: Activation = "silu"
    gated: bool = True  # SwiGLU-like: act(gate) * up
    bias: bool = False
    router: RouterConfig | None = None
    shared_intermediate_size: int = 0  # 0: no shared expert
    shared_gate: bool = False  # Qwen2-MoE: the shared expert is scaled by sigmoid(x @ shared_expert_gate)
    expert_dropout: float = 0.0  # on expert hidden activations, in training only (FLAN-MoE)
    recompute_experts: bool = False  # backward computes the experts' hidden pre-activations again
    experts_backend: ExpertsBackend = "moe_runtime"  # whose grouped products; megablocks has to be installed

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "intermediate_size")
        check_choice("activation", self.activation, Activation)
        if not 0.0 <= self.expert_dropout < 1.0:
            raise ValueError(f"expert_dropout must be in [0, 1), got {self.expert_dropout}")
        if self.recompute_experts and self.expert_dropout > 0:
            raise ValueError(
                "recompute_experts must be False with expert_dropout, whose mask falls on what would be "
                f"recomputed, got expert_dropout={self.expert_dropout}"
            )
        check_choice("experts_backend", self.experts_backend, ExpertsBackend)
        if self.experts_backend == "megablocks":
            for name in ("bias", "recompute_experts"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} must be False with experts_backend 'megablocks', which has neither, got True"
                    )
        if self.shared_intermediate_size < 0:
            raise ValueError(
                f"shared_intermediate_size must not be negative, got {self.shared_intermediate_size}"
            )
        if self.router is not None and self.router.hidden_size != self.hidden_size:
            raise ValueError(
                f"router.hidden_size must equal hidden_size ({self.hidden_size}), "
                f"got {self.router.hidden_size}"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention, or a mixture of attention over `num_experts` experts. Head counts are per expert.

    `kv`: every expert has its own keys and values (`expert`), or all read one set (`shared`). `top_k`: None
    mixes all experts softly; a number computes for each token only the experts of its k largest gates.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int = 1
    kv: KeyValue = "expert"
    top_k: int | None = None
    renormalise_top_k: bool = False
    bias: bool = False  # of the query, key and value projections
    output_bias: bool = False
    qk_norm: QKNorm | None = None
    norm_eps: float = 1e-6
    rope_interleaved: bool = False  # Cohere, GPT-J: rotate (0, 1), (2, 3) … instead of the two halves
    sliding_window: int | None = None
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    logit_cap: float | None = None  # scores become cap · tanh(score / cap) (Gemma 2)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_heads", "num_kv_heads", "head_dim", "num_experts")
        check_choice("kv", self.kv, KeyValue)
        check_above_zero(self, "scale", "logit_cap")
        if self.qk_norm is not None:
            check_choice("qk_norm", self.qk_norm, QKNorm)
        if self.sliding_window is not None:
            check_positive(self, "sliding_window")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads ({self.num_heads}), got {self.num_kv_heads}"
            )
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k must be between 1 and num_experts ({self.num_experts}), got {self.top_k}"
            )

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def total_heads(self) -> int:
        return self.num_experts * self.num_heads

    @property
    def total_kv_heads(self) -> int:
        return self.num_kv_heads * (self.num_experts if self.kv == "expert" else 1)

    @property
    def experts_per_token(self) -> int:
        return self.num_experts if self.top_k is None else self.top_k

    @property
    def attended_heads(self) -> int:
        """Query heads of the attention call: with shared keys and values those of a token's experts only."""
        return self.num_heads * (self.num_experts if self.kv == "expert" else self.experts_per_token)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One transformer layer.

    `parallel`: y = x + attention(n1(x)) + feed_forward(n2(x)), n2 = n1 when num_norms is 1. `norm_placement`:
    norms `before` the attention and the feed-forward, `after` them on what they add (OLMo 2), or `both`
    (Gemma 2). `residual_multiplier` scales what is added (Granite).
    """

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    kind: BlockKind = "sequential"
    num_norms: NumNorms = 2
    norm: Norm = "rms_norm"
    norm_bias: bool = False
    norm_eps: float = 1e-6
    norm_placement: NormPlacement = "before"
    residual_multiplier: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, BlockKind)
        check_choice("norm_placement", self.norm_placement, NormPlacement)
        check_above_zero(self, "residual_multiplier")
        check_choice("norm", self.norm, Norm)
        check_choice("num_norms", self.num_norms, NumNorms)
        if self.kind == "sequential" and self.num_norms != 2:
            raise ValueError(f"num_norms must be 2 in a sequential block, got {self.num_norms}")
        if self.norm != "layer_norm" and self.norm_bias:
            raise ValueError(f"norm_bias must be False with norm {self.norm!r}, which has no bias; got True")
        if self.kind == "parallel" and self.norm_placement != "before":
            raise ValueError(
                f"norm_placement must be 'before' in a parallel block, got {self.norm_placement!r}"
            )

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Of the norms of the layer, as its modules and tensors are named."""
        if self.norm_placement == "after":
            return ("post_attention_layernorm", "post_feedforward_layernorm")
        names = ("input_layernorm", "post_attention_layernorm")
        if self.norm_placement == "both":
            return (*names, "pre_feedforward_layernorm", "post_feedforward_layernorm")
        return names[: self.num_norms]


# Fields that config.json leaves out at their default, so that files stay what they were before these.
_LEFT_OUT = {"left_out_at_default": True}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model: dense, MoE, or with mixtures of attention. Names follow transformers'
    config.json.

    `num_attention_heads` and `num_key_value_heads` are totals over the attention experts, as serving engines
    size their caches from them; with `attention_kv="shared"` the key-value heads are counted once. Layers
    that are not in `attention_mixture_layers` (None: all) have one attention expert; layers not in
    `moe_layers` (None: all) a dense feed-forward of `intermediate_size`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    # attention
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: QKNorm | None = None
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    rope_interleaved: bool = False
    # of sliding layers; None: rope_parameters
    sliding_rope_parameters: dict[str, Any] | None = field(default=None, metadata=_LEFT_OUT)
    # layers that rotate queries and keys; None: all
    rope_layers: tuple[int, ...] | None = field(default=None, metadata=_LEFT_OUT)
    # of the scores; None: 1 / sqrt(head_dim)
    attention_multiplier: float | None = field(default=None, metadata=_LEFT_OUT)
    attn_logit_softcapping: float | None = field(default=None, metadata=_LEFT_OUT)
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None  # None: all alike, sliding if sliding_window is set
    num_attention_experts: int = 1
    attention_kv: KeyValue = "expert"
    attention_top_k: int | None = None
    attention_top_k_renorm: bool = False
    attention_mixture_layers: tuple[int, ...] | None = None
    # feed-forward
    hidden_act: Activation = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    num_experts: int = 0  # 0: no layer is a Mixture of Experts
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_layers: tuple[int, ...] | None = None
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    expert_dropout: float = 0.0
    recompute_experts: bool = False
    experts_backend: ExpertsBackend = "moe_runtime"
    # router
    router_score: Score = "softmax"
    router_gate: Gate = "renorm"
    router_scale: float = 1.0
    router_num_groups: int = 1
    router_groups_kept: int = 1
    router_group_score: GroupScore = "top2_sum"
    router_selection_bias: bool = False
    router_balance_over: BalanceOver = "batch"
    router_aux_only: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    # block
    block: BlockKind = "sequential"
    num_norms: NumNorms = 2
    norm: Norm = "rms_norm"
    norm_bias: bool = False
    norm_eps: float = 1e-6
    norm_placement: NormPlacement = field(default="before", metadata=_LEFT_OUT)
    residual_multiplier: float = field(default=1.0, metadata=_LEFT_OUT)
    # outside the layers
    tie_word_embeddings: bool = False
    embedding_multiplier: float = field(default=1.0, metadata=_LEFT_OUT)
    head_bias: bool = field(default=False, metadata=_LEFT_OUT)
    logit_scale: float = 1.0
    final_logit_softcapping: float | None = field(default=None, metadata=_LEFT_OUT)

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "num_hidden_layers", "num_attention_experts")
        check_above_zero(self, "attention_multiplier", "attn_logit_softcapping", "embedding_multiplier")
        check_above_zero(self, "final_logit_softcapping")
        if self.num_experts != 0:  # here, because layers know these fields by other names
            check_positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        for name in ("moe_layers", "attention_mixture_layers", "rope_layers", "layer_types"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        for name in ("moe_layers", "attention_mixture_layers", "rope_layers"):
            for layer in getattr(self, name) or ():
                if not 0 <= layer < self.num_hidden_layers:
                    raise ValueError(
                        f"{name} must name layers between 0 and {self.num_hidden_layers - 1}, got {layer}"
                    )
        self._check_layers()
        self._check_rotated_width()
        A = self.num_attention_experts
        if self.num_attention_heads % A:
            raise ValueError(
                f"num_attention_heads is a total and must be a multiple of num_attention_experts ({A}), "
                f"got {self.num_attention_heads}"
            )
        if self.attention_kv == "expert" and self.num_key_value_heads % A:
            raise ValueError(
                f"num_key_value_heads is a total and must be a multiple of num_attention_experts ({A}) when "
                f"attention_kv is 'expert', got {self.num_key_value_heads}"
            )
        for layer in range(self.num_hidden_layers):
            self.block_config(layer)  # every layer's own checks, at the time the model is described

    def _check_layers(self) -> None:
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, got {self.num_hidden_layers}")
        if self.layer_types is None:
            return
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have num_hidden_layers ({self.num_hidden_layers}) entries, got "
                f"{len(self.layer_types)}"
            )
        for kind in self.layer_types:
            check_choice("layer_types", kind, LayerType)
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError(
                "sliding_window must be a number where layer_types has 'sliding_attention', got None"
            )

    def _check_rotated_width(self) -> None:
        width = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))
        if width % 2 or not 0 < width <= self.head_dim:
            raise ValueError(
                "head_dim * rope_parameters['partial_rotary_factor'] must be an even width of at most "
                f"head_dim ({self.head_dim}), got {width}"
            )

    # --- per layer ---

    @property
    def heads_per_expert(self) -> int:
        return self.num_attention_heads // self.num_attention_experts

    @property
    def kv_heads_per_expert(self) -> int:
        shared = self.attention_kv == "shared"
        return self.num_key_value_heads if shared else self.num_key_value_heads // self.num_attention_experts

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 0 and (self.moe_layers is None or layer in self.moe_layers)

    def is_attention_mixture_layer(self, layer: int) -> bool:
        listed = self.attention_mixture_layers
        return self.num_attention_experts > 1 and (listed is None or layer in listed)

    def is_rotary_layer(self, layer: int) -> bool:
        return self.rope_layers is None or layer in self.rope_layers

    def attention_config(self, layer: int) -> AttentionConfig:
        slides = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.heads_per_expert,
            num_kv_heads=self.kv_heads_per_expert,
            head_dim=self.head_dim,
            num_experts=self.num_attention_experts if self.is_attention_mixture_layer(layer) else 1,
            kv=self.attention_kv,
            top_k=self.attention_top_k if self.is_attention_mixture_layer(layer) else None,
            renormalise_top_k=self.attention_top_k_renorm,
            bias=self.attention_bias,
            output_bias=self.attention_output_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            rope_interleaved=self.rope_interleaved,
            sliding_window=self.sliding_window if slides else None,
            scale=self.attention_multiplier,
            logit_cap=self.attn_logit_softcapping,
        )

    def router_config(self) -> RouterConfig:
        return RouterConfig(
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            experts_per_token=self.num_experts_per_tok,
            score=self.router_score,
            gate=self.router_gate,
            scale=self.router_scale,
            num_groups=self.router_num_groups,
            groups_kept=self.router_groups_kept,
            group_score=self.router_group_score,
            selection_bias=self.router_selection_bias,
            balance_over=self.router_balance_over,
            aux_only=self.router_aux_only,
        )

    def feed_forward_config(self, layer: int) -> FeedForwardConfig:
        moe = self.is_moe_layer(layer)
        return FeedForwardConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.moe_intermediate_size if moe else self.intermediate_size,
            activation=self.hidden_act,
            gated=self.gated_mlp,
            bias=self.mlp_bias,
            router=self.router_config() if moe else None,
            shared_intermediate_size=self.shared_expert_intermediate_size if moe else 0,
            shared_gate=self.shared_expert_gate if moe else False,
            expert_dropout=self.expert_dropout if moe else 0.0,
            recompute_experts=self.recompute_experts if moe else False,
            experts_backend=self.experts_backend if moe else "moe_runtime",
        )

    def block_config(self, layer: int) -> BlockConfig:
        return BlockConfig(
            attention=self.attention_config(layer),
            feed_forward=self.feed_forward_config(layer),
            kind=self.block,
            num_norms=self.num_norms,
            norm=self.norm,
            norm_bias=self.norm_bias,
            norm_eps=self.norm_eps,
            norm_placement=self.norm_placement,
            residual_multiplier=self.residual_multiplier,
        )

    # --- to and from config.json ---

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, under the names of the fields."""
        values = asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if values[name] != LEFT_OUT_DEFAULTS.get(name, ...)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Build from a config.json of this model type; keys that are not fields are ignored."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


# What config.json does not say, because it is what absent fields mean.
LEFT_OUT_DEFAULTS = {f.name: f.default for f in fields(ModelConfig) if f.metadata.get("left_out_at_default")}
