"""Parameters, FLOPs and bytes of a model, from its configuration alone. Pure functions; no torch, no weights.

A multiply-add is 2 FLOPs. Only matrix products are counted: projections, attention scores and values,
experts, routers, the output head. Norms, activations, gates, softmax, rotary embedding and biases are not,
and neither are the padding tiles of a grouped GEMM. All FLOPs are forward FLOPs per token unless a name says
otherwise.

What one query attends to has a named convention, for a context of n tokens and H query heads of width P:

    full     4·n·H·P         every query times every key: what PyTorch's counter credits a masked kernel with
    causal   2·(n + 1)·H·P   the exact mean over the n positions of the keys that a causal mask leaves
    half     2·n·H·P         half of `full`, the convention of the BAM paper's table

A sliding window of w < n keys shortens `causal` and `half` (means rounded to a whole FLOP), and leaves `full`
as it is.

"Active" is what one token passes through: K of E experts, everything else whole. Of a mixture of attention
with `attention_top_k` these are the query and output projections of K attention experts. All keys and values
are active, because later tokens may choose any expert. Scores and values are charged as the attention call
computes them: for the K experts' heads where keys and values are shared, else for those of all experts.
"""

from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from .config import AttentionConfig, FeedForwardConfig, ModelConfig

Convention = Literal["full", "causal", "half"]
MatchOn = Literal["active_flops", "active_parameters", "total_parameters", "width"]
Regime = Literal["data_matched", "compute_matched", "active_parameter_matched", "total_parameter_matched"]


def _check_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


# --- parameters ---


def _attention_parameters(config: AttentionConfig, *, active: bool) -> Counter[str]:
    D, P, mixture = config.hidden_size, config.head_dim, config.num_experts > 1
    num_used = config.experts_per_token if active else config.num_experts
    query, key_value = num_used * config.num_heads * P, config.total_kv_heads * P
    weights = 2 * D * query + 2 * D * key_value
    biases = config.bias * (query + 2 * key_value) + config.output_bias * num_used * D
    return Counter(
        attention=weights + biases,
        attention_router=mixture * config.num_experts * D,
        norms=query + key_value if config.qk_norm else 0,
    )


def _ffn_parameters(config: FeedForwardConfig, width: int, *, bias: bool) -> int:
    """Parameters of one feed-forward network: the dense layer, one expert, or the shared expert."""
    up_rows = width * (2 if config.gated else 1)
    return config.hidden_size * (up_rows + width) + bias * (up_rows + config.hidden_size)


def _feed_forward_parameters(config: FeedForwardConfig, *, active: bool) -> Counter[str]:
    one = _ffn_parameters(config, config.intermediate_size, bias=config.bias)
    if config.router is None:
        return Counter(feed_forward=one)
    num_used = config.router.experts_per_token if active else config.router.num_experts
    shared = 0
    if config.shared_intermediate_size:
        shared = _ffn_parameters(config, config.shared_intermediate_size, bias=config.bias)
        shared += config.shared_gate * config.hidden_size
    return Counter(
        router=config.router.num_experts * config.hidden_size,
        experts=num_used * one,
        shared_expert=shared,
    )


def layer_parameters(config: ModelConfig, layer: int, *, active: bool = False) -> Counter[str]:
    """Parameters of one layer by component: those that exist, or those that one token uses (`active`).

    Keys: attention, attention_router, feed_forward (dense layers), router, experts, shared_expert (with its
    gate), norms. Query and key norms have one row per head here, also for families that share one row among
    heads. The selection bias of a router is a buffer and not counted.
    """
    block = config.block_config(layer)
    norms = len(block.norm_names) * config.hidden_size * (2 if block.norm_bias else 1)
    return (
        _attention_parameters(block.attention, active=active)
        + _feed_forward_parameters(block.feed_forward, active=active)
        + Counter(norms=norms)
    )


def model_parameters(config: ModelConfig, *, active: bool = False) -> Counter[str]:
    """Parameters of the model by component: those of the layers, and embedding and head (0 when tied).

    `.total()` is the model's count. The embedding table counts as active, as model cards count it.
    """
    table = config.vocab_size * config.hidden_size
    outside = Counter(
        embedding=table,
        head=(0 if config.tie_word_embeddings else table) + config.head_bias * config.vocab_size,
        norms=config.hidden_size * (2 if config.norm_bias else 1),
    )
    return sum((layer_parameters(config, layer, active=active) for layer in _layers(config)), outside)


def _layers(config: ModelConfig) -> range:
    return range(config.num_hidden_layers)


# --- FLOPs ---


def attention_pairs(context: int, convention: Convention = "causal", window: int | None = None) -> Fraction:
    """(query, key) pairs that one head is charged for over a sequence of `context` tokens."""
    _check_at_least_one(context=context)
    if convention not in get_args(Convention):
        raise ValueError(f"convention must be one of {', '.join(get_args(Convention))}, got {convention!r}")
    n, w = context, min(window or context, context)
    if convention == "full":
        return Fraction(n * n)
    return Fraction(w * (2 * n - w + (1 if convention == "causal" else 0)), 2)


def _linear_flops(config: ModelConfig, layer: int) -> Counter[str]:
    """2 FLOPs for each active weight of one layer's matrices; attention scores are not among them."""
    attention, ffn = config.attention_config(layer), config.feed_forward_config(layer)
    # a bias is an addition; those of a soft mixture are a product with their gates
    soft = attention.experts_per_token == attention.num_experts > 1
    matrices = replace(attention, bias=False, output_bias=attention.output_bias and soft, qk_norm=None)
    weights = _attention_parameters(matrices, active=True)
    weights += _feed_forward_parameters(replace(ffn, bias=False), active=True)
    return Counter({component: 2 * count for component, count in weights.items()})


def layer_flops(
    config: ModelConfig, layer: int, context: int, convention: Convention = "causal"
) -> Counter[str]:
    """Forward FLOPs per token of one layer, averaged over a sequence of `context` tokens, by component.

    Keys: attention (projections), attention_scores (scores and values), attention_router, feed_forward,
    router, experts, shared_expert.
    """
    attention = config.attention_config(layer)
    pairs = attention_pairs(context, convention, attention.sliding_window)
    scores = round(4 * attention.attended_heads * attention.head_dim * pairs / context)
    return _linear_flops(config, layer) + Counter(attention_scores=scores)


def model_flops(config: ModelConfig, context: int, convention: Convention = "causal") -> Counter[str]:
    """Forward FLOPs per token of the model by component: those of the layers, and the head."""
    head = Counter(head=2 * config.vocab_size * config.hidden_size)
    return sum((layer_flops(config, layer, context, convention) for layer in _layers(config)), head)


def training_flops(
    config: ModelConfig, context: int, convention: Convention = "causal", *, recompute: bool = False
) -> int:
    """FLOPs per trained token: 3 times the forward pass, or 4 times when the whole forward is recomputed.

    Every parameter is taken to be trained. Attention kernels that recompute their scores in backward do one
    product more than is counted here; a frozen weight needs one product less.
    """
    return (4 if recompute else 3) * model_flops(config, context, convention).total()


def six_n(config: ModelConfig) -> int:
    """Rule of thumb for training FLOPs per token: 6 times the active parameters without the input table."""
    active = model_parameters(config, active=True)
    return 6 * (active.total() - (0 if config.tie_word_embeddings else active["embedding"]))


# --- decoding: FLOPs and bytes ---


def decode_flops(config: ModelConfig, context: int) -> Counter[str]:
    """FLOPs of one decoded token that sees `context` tokens, itself among them, by component."""
    _check_at_least_one(context=context)
    flops = Counter(head=2 * config.vocab_size * config.hidden_size)
    for layer in _layers(config):
        attention = config.attention_config(layer)
        keys = min(context, attention.sliding_window or context)
        flops += _linear_flops(config, layer)
        flops += Counter(attention_scores=4 * keys * attention.attended_heads * attention.head_dim)
    return flops


def kv_cache_bytes(config: ModelConfig, context: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that `context` tokens keep; a sliding layer keeps its window at most."""
    _check_at_least_one(context=context, bytes_per_value=bytes_per_value)
    values = 0
    for layer in _layers(config):
        attention = config.attention_config(layer)
        kept = min(context, attention.sliding_window or context)
        values += 2 * kept * attention.total_kv_heads * attention.head_dim
    return values * bytes_per_value


def expected_experts(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """Mean number of distinct experts that `num_tokens` tokens use: E · (1 − (1 − K/E)^T).

    Tokens choose independently and evenly: an upper bound for real routers, which repeat themselves.
    """
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** num_tokens)


@dataclass(frozen=True, kw_only=True)
class DecodeBytes:
    """Bytes that one decode step of a batch moves; activations stay in caches and are left out.

    `weights` holds each weight in use once (experts by `expected_experts`) and one input row per sequence.
    Attention experts are all in use, also with `attention_top_k`: their projections are read whole.
    """

    weights: int
    cache_read: int
    cache_written: int

    @property
    def total(self) -> int:
        return self.weights + self.cache_read + self.cache_written


def decode_bytes(
    config: ModelConfig, context: int, batch_size: int = 1, bytes_per_value: int = 2
) -> DecodeBytes:
    """Bytes moved to decode one token for each of `batch_size` sequences, each seeing `context` tokens."""
    _check_at_least_one(context=context, batch_size=batch_size, bytes_per_value=bytes_per_value)
    values = (batch_size + config.vocab_size) * config.hidden_size  # input rows and the output head
    values += config.hidden_size * (2 if config.norm_bias else 1)  # final norm
    values += config.vocab_size * config.head_bias
    expert_values = 0.0
    for layer in _layers(config):
        parts = layer_parameters(config, layer)
        values += parts.total() - parts["experts"]
        router = config.feed_forward_config(layer).router
        if router is not None:
            used = expected_experts(router.num_experts, router.experts_per_token, batch_size)
            expert_values += used / router.num_experts * parts["experts"]
    return DecodeBytes(
        weights=round((values + expert_values) * bytes_per_value),
        cache_read=batch_size * kv_cache_bytes(config, context, bytes_per_value),
        cache_written=batch_size * kv_cache_bytes(config, 1, bytes_per_value),
    )


# --- all of it, for reports ---


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """The figures of one model that a comparison shows, at one context length. FLOPs are per token."""

    total_parameters: int
    active_parameters: int
    forward_flops: int
    training_flops: int
    training_flops_recompute: int
    six_n: int
    decode_flops: int
    kv_cache_bytes_per_token: int
    decode_weight_bytes: int
    decode_total_bytes: int


def model_cost(
    config: ModelConfig,
    context: int,
    convention: Convention = "causal",
    *,
    batch_size: int = 1,
    bytes_per_value: int = 2,
) -> ModelCost:
    """Everything above for one model; `batch_size` and `bytes_per_value` are those of decoding."""
    moved = decode_bytes(config, context, batch_size, bytes_per_value)
    return ModelCost(
        total_parameters=model_parameters(config).total(),
        active_parameters=model_parameters(config, active=True).total(),
        forward_flops=model_flops(config, context, convention).total(),
        training_flops=training_flops(config, context, convention),
        training_flops_recompute=training_flops(config, context, convention, recompute=True),
        six_n=six_n(config),
        decode_flops=decode_flops(config, context).total(),
        kv_cache_bytes_per_token=kv_cache_bytes(config, 1, bytes_per_value),
        decode_weight_bytes=moved.weights,
        decode_total_bytes=moved.total,
    )


# --- dense baselines ---


@dataclass(frozen=True, kw_only=True)
class DenseMatch:
    """A dense model, and by how much it misses the quantity it was matched on (dense minus given)."""

    config: ModelConfig
    on: MatchOn
    residual: int  # FLOPs per token, parameters, or width


def dense_config(config: ModelConfig, intermediate_size: int) -> ModelConfig:
    """The same model with one attention expert and a dense feed-forward of this width in every layer."""
    return replace(
        config,
        intermediate_size=intermediate_size,
        num_attention_heads=config.heads_per_expert,
        num_key_value_heads=config.kv_heads_per_expert,
        num_attention_experts=1,
        attention_kv="expert",
        attention_top_k=None,
        attention_top_k_renorm=False,
        attention_mixture_layers=None,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        moe_layers=None,
        shared_expert_intermediate_size=0,
        shared_expert_gate=False,
        expert_dropout=0.0,
    )


def match_dense(
    config: ModelConfig,
    on: MatchOn = "active_flops",
    *,
    context: int = 2048,
    convention: Convention = "causal",
) -> DenseMatch:
    """The dense baseline of a model: same layers, width and attention, and a feed-forward chosen by `on`.

    `width` takes the width of one expert, i.e. the dense model that upcycling started from. The others solve
    for the width that makes forward FLOPs per token at `context`, active or total parameters equal, to the
    nearest whole width; the rest is the residual. What a mixture of attention costs more than one attention
    is given to the feed-forward.

    Raises:
        ValueError: no width of at least 1 reaches the quantity.
    """
    if on not in get_args(MatchOn):
        raise ValueError(f"on must be one of {', '.join(get_args(MatchOn))}, got {on!r}")

    def quantity(model: ModelConfig) -> int:
        if on == "active_flops":
            return model_flops(model, context, convention).total()
        return model_parameters(model, active=on == "active_parameters").total()

    if on == "width":
        width = config.moe_intermediate_size if config.num_experts else config.intermediate_size
        return DenseMatch(config=dense_config(config, width), on=on, residual=0)
    narrowest = quantity(dense_config(config, 1))
    slope = quantity(dense_config(config, 2)) - narrowest
    width = 1 + round(Fraction(quantity(config) - narrowest, slope))
    if width < 1:
        raise ValueError(f"no dense feed-forward is narrow enough to match {on}: it would need width {width}")
    dense = dense_config(config, width)
    return DenseMatch(config=dense, on=on, residual=quantity(dense) - quantity(config))


# --- regimes of a comparison ---


def compute_matched_tokens(
    config: ModelConfig,
    tokens: int,
    baseline: ModelConfig,
    *,
    context: int,
    convention: Convention = "causal",
) -> int:
    """Tokens on which `baseline` trains for the FLOPs that `config` needs for `tokens`, rounded down."""
    budget = tokens * training_flops(config, context, convention)
    return budget // training_flops(baseline, context, convention)


def matched_regimes(
    config: ModelConfig,
    tokens: int,
    baseline: ModelConfig,
    baseline_tokens: int,
    *,
    context: int,
    convention: Convention = "causal",
    tolerance: float = 0.01,
) -> tuple[Regime, ...]:
    """Name what is equal between two training runs, and with it the regimes in which they are comparable.

    Token counts must be equal for `data_matched`; the other quantities may differ by `tolerance`, relative.
    """

    def close(a: int, b: int) -> bool:
        return abs(a - b) <= tolerance * max(a, b)

    def compute(model: ModelConfig, count: int) -> int:
        return count * training_flops(model, context, convention)

    def active(model: ModelConfig) -> int:
        return model_parameters(model, active=True).total()

    holds: dict[Regime, bool] = {
        "data_matched": tokens == baseline_tokens,
        "compute_matched": close(compute(config, tokens), compute(baseline, baseline_tokens)),
        "active_parameter_matched": close(active(config), active(baseline)),
        "total_parameter_matched": close(
            model_parameters(config).total(), model_parameters(baseline).total()
        ),
    }
    return tuple(regime for regime, is_matched in holds.items() if is_matched)
