"""Attention and mixtures of attention, computed as ONE attention call over the heads of all experts.

Head order: with own keys and values [expert][head]; with shared keys and values [kv head][expert][head in
group], because grouped-query kernels expect the queries of one key-value head to be neighbours. Both are one
view of the attention's output, `o_TSAQ`: S = 1 and Q = H·P, or S = key-value heads and Q = (H / key-value
heads)·P.

With `top_k` below the number of experts, a token's query and output projections are those of its K experts:
grouped products over N = T·K rows, whose Q is H·P. Shared keys and values then need K·H heads in the order
[kv head][choice][head in group]. Own keys and values differ by expert, so that no fixed set of heads serves
every token: the call has all A·H heads, with a query of zero where a token did not choose the expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from moe_runtime_kernels import (
    RoutingPlan,
    attention_mix,
    combine,
    gathered_grouped_gemm,
    make_plan,
    scatter_rows,
)
from torch import Tensor, nn

from moe_runtime.config import AttentionConfig
from moe_runtime.linear import Linear
from moe_runtime.norms import JointRMSNorm, make_norm
from moe_runtime.packing import check_packed, flash_attention, flash_takes, same_document
from moe_runtime.routers import INITIAL_STD, SoftRouter, TopKSoftRouter

Rotary = tuple[Tensor, Tensor]  # cos and sin, [B or 1, L, R], of the R rotated pairs of every head; float32


class MixtureOfAttention(nn.Module):
    """Σ over attention experts a of gate[t, a] · (attention of expert a) · o_projᵀ; one expert is plain
    attention.

    `attend` computes the attention itself and may hold a cache; the default is causal attention by PyTorch.
    It is called as `attend(query, key, value, **attend_arguments)` with query [B, heads, L, P], key and value
    [B, all key-value heads, L, P], and returns ([B, L, heads, P], anything). The heads are those of all
    experts, or with `top_k` and shared keys and values those of each token's K experts.
    """

    def __init__(self, config: AttentionConfig, attend: nn.Module | None = None) -> None:
        super().__init__()
        D, P, A = config.hidden_size, config.head_dim, config.num_experts
        heads, kv_heads = config.total_heads, config.total_kv_heads
        S = 1 if config.kv == "expert" else config.num_kv_heads
        is_sparse = config.experts_per_token < A
        self.config = config
        self.q_proj: Linear | RoutedQueryProjection
        if is_sparse:
            self.q_proj = RoutedQueryProjection(D, heads * P, num_experts=A, slots=S, bias=config.bias)
        else:
            self.q_proj = Linear(D, heads * P, bias=config.bias)
        self.k_proj = Linear(D, kv_heads * P, bias=config.bias)
        self.v_proj = Linear(D, kv_heads * P, bias=config.bias)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm == "joint_rms_norm":
            group = config.num_heads // S
            self.q_norm = JointRMSNorm(heads, P, slots=S, group=group, eps=config.norm_eps)
            self.k_norm = JointRMSNorm(kv_heads, P, slots=1, group=config.num_kv_heads, eps=config.norm_eps)
        elif config.qk_norm is not None:
            self.q_norm = make_norm(config.qk_norm, heads, P, eps=config.norm_eps)
            self.k_norm = make_norm(config.qk_norm, kv_heads, P, eps=config.norm_eps)
        if attend is None:
            attend = CausalAttention(config.sliding_window, scale=config.scale, logit_cap=config.logit_cap)
        self.attend = attend
        self.router: SoftRouter | TopKSoftRouter | None = None
        self.o_proj: Linear | MixtureProjection | RoutedMixtureProjection
        if A == 1:
            self.o_proj = Linear(heads * P, D, bias=config.output_bias)
        elif is_sparse:
            K = config.experts_per_token
            self.router = TopKSoftRouter(D, A, top_k=K, renormalise=config.renormalise_top_k)
            self.o_proj = RoutedMixtureProjection(
                heads * P, D, num_experts=A, slots=S, bias=config.output_bias
            )
        else:
            self.router = SoftRouter(D, A)
            self.o_proj = MixtureProjection(heads * P, D, num_experts=A, bias=config.output_bias)

    def forward(self, x_BLD: Tensor, rotary: Rotary | None = None, **attend_arguments: Any) -> Tensor:
        """x_BLD -> y_BLD. `rotary` turns queries and keys, see `rotary_tables`; None encodes no position."""
        if isinstance(self.router, TopKSoftRouter):
            return self._chosen_experts(x_BLD, rotary, attend_arguments)
        query = self._heads(self.q_proj(x_BLD), self.q_norm, rotary)
        key = self._heads(self.k_proj(x_BLD), self.k_norm, rotary)
        value = self._heads(self.v_proj(x_BLD))
        attended, _ = self.attend(query, key, value, **attend_arguments)
        del query, key, value  # their memory serves what follows: fresh pages are dear on a CPU
        if self.router is None:
            return self.o_proj(attended.flatten(2))
        S = 1 if self.config.kv == "expert" else self.config.num_kv_heads
        Q = (
            self.config.num_heads // S * self.config.head_dim
        )  # not -1, which nothing decides when there are no tokens
        o_TSAQ = attended.reshape(x_BLD.shape[0] * x_BLD.shape[1], S, self.config.num_experts, Q)
        return self.o_proj(o_TSAQ, self.router(x_BLD.flatten(0, 1))).view(x_BLD.shape)

    def _chosen_experts(
        self, x_BLD: Tensor, rotary: Rotary | None, attend_arguments: dict[str, Any]
    ) -> Tensor:
        """The same for the K experts of each token."""
        config, (B, L, _) = self.config, x_BLD.shape
        A, K, Q = config.num_experts, config.experts_per_token, config.num_heads * config.head_dim
        own = config.kv == "expert"
        S = 1 if own else config.num_kv_heads
        x_TD = x_BLD.flatten(0, 1)
        assert self.router is not None
        weight_TK, expert_TK = self.router(x_TD)
        plan = None if _few(x_TD) else make_plan(expert_TK, A)
        query_TKQ = self.q_proj(x_TD, expert_TK, plan)
        if own:
            query = self._heads(_Spread.apply(query_TKQ, expert_TK, A).view(B, L, A * Q), self.q_norm, rotary)
        else:
            which = None
            if self.q_norm is not None:
                which = self._heads_of(expert_TK).view(B, L, K * config.num_heads)
            query = query_TKQ.view(B, L, K, S, Q // S).transpose(2, 3).reshape(B, L, K * Q)
            query = self._heads(query, self.q_norm, rotary, which)
        del query_TKQ
        key = self._heads(self.k_proj(x_BLD), self.k_norm, rotary)
        value = self._heads(self.v_proj(x_BLD))
        attended, _ = self.attend(query, key, value, **attend_arguments)
        del query, key, value
        if own:
            o_TKQ = _Pick.apply(attended.reshape(B * L, A, Q), expert_TK)
        else:
            o_TKQ = attended.reshape(B * L, S, K, Q // S).transpose(1, 2).reshape(B * L, K, Q)
        return self.o_proj(o_TKQ, weight_TK, expert_TK, plan).view(x_BLD.shape)

    def _heads_of(self, expert_TK: Tensor) -> Tensor:
        """Which of all heads, [kv head][expert][head in group], those of a token's experts are, in the order
        [kv head][choice][head in group].
        """
        S, A = self.config.num_kv_heads, self.config.num_experts
        group = self.config.num_heads // S
        head = torch.arange(S * A * group, device=expert_TK.device).view(S, A, group)
        return head[:, expert_TK].movedim(0, 1).flatten(1)

    def _heads(
        self,
        heads: Tensor,
        norm: nn.Module | None = None,
        rotary: Rotary | None = None,
        which: Tensor | None = None,
    ) -> Tensor:
        """Heads [B, L, heads · P] normalised and turned, [B, heads, L, P]; `which` of all, if not all in
        order.
        """
        heads = heads.unflatten(-1, (-1, self.config.head_dim))
        if norm is not None:
            heads = norm(heads) if which is None else norm(heads, which)
        if rotary is not None:
            heads = rotate(heads, rotary, self.config.rope_interleaved)
        return heads.transpose(1, 2)


class MixtureProjection(nn.Module):
    """The output projections of all attention experts, `weight [D, all heads · P]`, applied and mixed in one
    GEMM.

    Each expert has a bias row of its own, `bias [A, D]`, scaled by its gate like the rest of its output.
    """

    def __init__(self, in_features: int, out_features: int, *, num_experts: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, o_TSAQ: Tensor, gate_TA: Tensor) -> Tensor:
        return _add_biases(attention_mix(o_TSAQ, gate_TA, self.weight), gate_TA, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}"


def _add_biases(y_TD: Tensor, gate_TA: Tensor, bias_AD: Tensor | None) -> Tensor:
    return y_TD if bias_AD is None else y_TD + (gate_TA @ bias_AD.to(gate_TA.dtype)).to(y_TD.dtype)


# Up to so many tokens the weights decide, not the products: reading those of all experts once costs less than
# reading, writing and reading them again in expert order.
FEW_TOKENS = 16


def _few(x_TD: Tensor) -> bool:
    """Whether all experts are computed for want of tokens; never in a graph for any number of them."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and len(x_TD) <= FEW_TOKENS


class RoutedQueryProjection(nn.Module):
    """The query projections of all attention experts, `weight [all heads · P, D]` in the order of the heads,
    of which a token passes those of its K experts: 2·T·K·D·H·P FLOPs, K/A of a dense product's.

    With S = `slots` above 1 (shared keys and values) the rows of an expert are not neighbours, and each
    forward copies the weight into expert order: one pass over all of it, kept for backward. With S = 1 it is
    a view. A few tokens without a gradient pass all experts instead, which reads the weight once.
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_experts: int, slots: int, bias: bool
    ) -> None:
        super().__init__()
        self.by_expert = (slots, num_experts, out_features // (slots * num_experts))
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, x_TD: Tensor, expert_TK: Tensor, plan: RoutingPlan | None) -> Tensor:
        """query_TKQ of the chosen experts, Q = H·P. Without a plan all experts are computed."""
        (T, K), Q = expert_TK.shape, self.by_expert[0] * self.by_expert[2]
        if plan is None:
            query_TAQ = F.linear(x_TD, self.weight, self.bias).unflatten(1, self.by_expert).transpose(1, 2)
            return _Pick.apply(query_TAQ.reshape(T, self.by_expert[1], Q), expert_TK)
        weight_AQD = self.weight.unflatten(0, self.by_expert).transpose(0, 1).flatten(1, 2)
        bias_AQ = None
        if self.bias is not None:
            bias_AQ = self.bias.unflatten(0, self.by_expert).transpose(0, 1).flatten(1)
        query_NQ = gathered_grouped_gemm(x_TD, weight_AQD, plan, bias_AQ)
        # rows in expert order -> the rows of a token next to each other
        return scatter_rows(query_NQ, _choices(plan)).view(T, K, Q)

    def extra_repr(self) -> str:
        O, D = self.weight.shape
        return f"{D} -> {O}, {self.by_expert[1]} experts, bias={self.bias is not None}"


class RoutedMixtureProjection(nn.Module):
    """The output projections of all attention experts, `weight [D, all heads · P]` in the order of the heads,
    of which a token passes and sums those of its K experts, times their gates.

    Each expert has a bias row of its own, `bias [A, D]`, scaled by its gate like the rest of its output.
    FLOPs are 2·T·K·D·H·P, K/A of MixtureProjection's. The columns of an expert lie apart in every row, so
    that each forward copies the weight to [A, D, H·P]: one pass over all of it, kept for backward. A few
    tokens without a gradient go through MixtureProjection's product, with gates of zero.
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_experts: int, slots: int, bias: bool
    ) -> None:
        super().__init__()
        self.by_expert = (slots, num_experts, in_features // (slots * num_experts))
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(
        self, o_TKQ: Tensor, weight_TK: Tensor, expert_TK: Tensor, plan: RoutingPlan | None
    ) -> Tensor:
        """y_TD of the chosen experts' heads, Q = H·P. Without a plan all experts are computed."""
        if plan is None:
            S, A, _ = self.by_expert
            o_TSAQ = _Spread.apply(o_TKQ, expert_TK, A).unflatten(2, (S, -1)).transpose(1, 2)
            gate_TA = weight_TK.new_zeros(len(weight_TK), A).scatter(1, expert_TK.long(), weight_TK)
            return _add_biases(attention_mix(o_TSAQ, gate_TA, self.weight), gate_TA, self.bias)
        weight_ADQ = self.weight.unflatten(1, self.by_expert).permute(2, 0, 1, 3).flatten(2)
        y_ND = gathered_grouped_gemm(o_TKQ.flatten(0, 1), weight_ADQ, _choices(plan), self.bias)
        return combine(y_ND, weight_TK, plan)

    def extra_repr(self) -> str:
        D, I = self.weight.shape
        return f"{I} -> {D}, {self.by_expert[1]} experts, bias={self.bias is not None}"


def _choices(plan: RoutingPlan) -> RoutingPlan:
    """The plan of N tokens with one choice each: every (token, choice) has a row of its own."""
    return plan._replace(row_TK=plan.row_TK.reshape(-1, 1), token_N=plan.slot_N)


class _Spread(torch.autograd.Function):
    """rows_TKQ -> [T, A, Q], in the places of the chosen experts and zero elsewhere; `_Pick` is its gradient.

    Two functions, because autograd's own gradient of a gather adds by atomics on a GPU. The experts of a
    token differ, so that each place has one writer.
    """

    @staticmethod
    def forward(ctx: Any, rows_TKQ: Tensor, expert_TK: Tensor, num_experts: int) -> Tensor:
        ctx.save_for_backward(expert_TK)
        T, _, Q = rows_TKQ.shape
        spread_TAQ = rows_TKQ.new_zeros(T, num_experts, Q)
        return spread_TAQ.scatter_(1, _places(expert_TK, Q), rows_TKQ)

    @staticmethod
    def backward(ctx: Any, grad_TAQ: Tensor) -> tuple[Tensor | None, ...]:
        (expert_TK,) = ctx.saved_tensors
        return _Pick.apply(grad_TAQ, expert_TK), None, None


class _Pick(torch.autograd.Function):
    """o_TAQ -> [T, K, Q], the rows of the chosen experts; `_Spread` is its gradient."""

    @staticmethod
    def forward(ctx: Any, o_TAQ: Tensor, expert_TK: Tensor) -> Tensor:
        ctx.save_for_backward(expert_TK)
        _, ctx.num_experts, Q = o_TAQ.shape
        return o_TAQ.gather(1, _places(expert_TK, Q))

    @staticmethod
    def backward(ctx: Any, grad_TKQ: Tensor) -> tuple[Tensor | None, ...]:
        (expert_TK,) = ctx.saved_tensors
        return _Spread.apply(grad_TKQ, expert_TK, ctx.num_experts), None


def _places(expert_TK: Tensor, Q: int) -> Tensor:
    """The index of a gather or scatter along the experts; a view that takes no memory of size T·K·Q."""
    return expert_TK.long()[:, :, None].expand(-1, -1, Q)


class CausalAttention(nn.Module):
    """softmax(q kᵀ · scale) v over the current and earlier positions, at most `sliding_window` of them.

    `scale` is 1 / sqrt(P) unless given; with `logit_cap` a score s becomes cap · tanh(s / cap). With
    `cu_seqlens` and `max_seqlen` the row is a packed batch, whose documents attend to themselves only; see
    `moe_runtime.packing`.
    """

    def __init__(
        self,
        sliding_window: int | None = None,
        *,
        scale: float | None = None,
        logit_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.scale = scale
        self.logit_cap = logit_cap

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, None]:
        check_packed(query, cu_seqlens, max_seqlen)
        if cu_seqlens is not None and max_seqlen is not None and flash_takes(query):
            window, scale, cap = self.sliding_window, self.scale, self.logit_cap
            return flash_attention(query, key, value, cu_seqlens, max_seqlen, window, scale, cap), None
        mask_LL = self._mask(query, cu_seqlens)
        if self.logit_cap is not None:
            L = query.shape[2]
            if mask_LL is None:
                mask_LL = torch.ones(L, L, device=query.device, dtype=torch.bool).tril_()
            bias_LL = torch.zeros(L, L, device=query.device, dtype=query.dtype)
            bias_LL.masked_fill_(~mask_LL, -torch.inf)
            scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
            return capped_attention(query, key, value, bias_LL, scale, self.logit_cap)[0], None
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_LL,
            is_causal=mask_LL is None,
            scale=self.scale,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2), None

    def _mask(self, query: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        """What a position sees; None for all earlier ones."""
        L = query.shape[2]
        window = L if self.sliding_window is None else self.sliding_window
        if cu_seqlens is None:
            if window >= L:
                return None
            mask_LL = torch.ones(L, L, device=query.device, dtype=torch.bool)
        else:
            mask_LL = same_document(cu_seqlens, L)
        mask_LL.tril_()
        return mask_LL if window >= L else mask_LL.triu_(1 - window)


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    logit_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention in plain matrix products: query [B, heads, L, P] -> [B, L, heads, P] and the weights.

    `bias` is added to the scores after the cap, -inf where a position is not seen.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if logit_cap is not None:
        scores = (scores / logit_cap).tanh() * logit_cap
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def rotary_tables(position_BL: Tensor, rotated_width: int, theta: float = 10000.0) -> Rotary:
    """cos and sin of position · theta^(-2r / rotated_width), float32, for the R = rotated_width / 2 pairs of
    a head.

    Source: Su et al. 2021. `rotated_width` is the head's width, or less where only a part is rotated; it must
    be even.
    """
    if rotated_width % 2:
        raise ValueError(f"rotated_width must be even, got {rotated_width}")
    pair_R = torch.arange(0, rotated_width, 2, device=position_BL.device, dtype=torch.float32)
    angle_BLR = position_BL[..., None].float() * theta ** (-pair_R / rotated_width)
    return angle_BLR.cos(), angle_BLR.sin()


def rotate(x: Tensor, rotary: Rotary, interleaved: bool = False) -> Tensor:
    """Rotate the first 2R entries of every head of x [B, L, heads, P]; the rest passes through.

    A pair is (r, r + R), or with `interleaved` (2r, 2r + 1), as Cohere and GPT-J store their heads. Computed
    in the wider of both dtypes, returned in x's. The tables are constants: they get no gradient.
    """
    cos, sin = (table.unsqueeze(2) for table in rotary)
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin, interleaved, True)
    return _rotated(x, cos, sin, interleaved, heads_first=True)


# Elements; on a CPU each of the rotation's passes then finds them in the cache.
ROTATED_AT_A_TIME = 1 << 17


class _Rotate(torch.autograd.Function):
    """Its own gradient is the rotation back, so that neither x nor the products are kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, forth: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.forth = interleaved, forth
        return _rotated(x, cos, sin, interleaved, heads_first=forth)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin, ctx.interleaved, not ctx.forth), None, None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, heads_first: bool) -> Tensor:
    """With `heads_first`, each head of the result lies in one piece of memory, as attention reads it."""
    B, L, heads, P = x.shape
    y = x.new_empty(B, heads, L, P).transpose(1, 2) if heads_first else x.new_empty(x.shape)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() <= ROTATED_AT_A_TIME:
        _rotate_into(y, x, cos, sin, interleaved)
        return y
    step = max(1, ROTATED_AT_A_TIME * heads // x.numel())
    for x_part, y_part in zip(x.split(step, 2), y.split(step, 2), strict=True):
        _rotate_into(y_part, x_part, cos, sin, interleaved)
    return y


def _rotate_into(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        y[..., rotated:] = x[..., rotated:]
        x, y = x[..., :rotated], y[..., :rotated]
    first, second = _pairs(x, interleaved)
    out_first, out_second = _pairs(y, interleaved)
    if torch.promote_types(x.dtype, cos.dtype) == x.dtype:
        out_first.copy_(first).mul_(cos).addcmul_(second, sin, value=-1)
        out_second.copy_(second).mul_(cos).addcmul_(first, sin)
    else:
        out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
        out_second.copy_((second * cos).addcmul_(first, sin))


def _pairs(heads: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second entry of every pair."""
    if interleaved:
        return heads[..., ::2], heads[..., 1::2]
    first, second = heads.chunk(2, dim=-1)
    return first, second
