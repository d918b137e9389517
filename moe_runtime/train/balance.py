"""Auxiliary losses of routers for accumulated batches: each micro-batch gives its part of the whole.

For one layer, with f_e the share of routing slots that expert e got, p_te the score of token t, N the tokens
of all micro-batches and processes, and lse the logsumexp of a token's logits:

    z loss          Σ_t lse_t² / N
    micro_batch     E · Σ_e f_e(micro-batch) · Σ_t p_te / N
    sequence        Σ_s E · Σ_e f_e(s) · P_e(s) / S        P the mean over the tokens of sequence s, of S
    global_batch    E · Σ_e f_e(all)         · Σ_t p_te / N

Summed over micro-batches, z loss, sequence and global_batch are the losses of the whole batch, and so are
their gradients (f has none). micro_batch is not: it is the mean of losses of parts, as most trainers have it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.stats.layers import routed_layers

from .recipe import BalanceOver


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a micro-batch count, and the sequence of each: a row, or a packed document."""

    counted_T: Tensor  # bool
    sequence_T: Tensor  # int64
    num_sequences: int

    def totals(self) -> Tensor:
        """[tokens, sequences] that count, int64."""
        of_sequence_S = torch.zeros(self.num_sequences, dtype=torch.int64, device=self.counted_T.device)
        of_sequence_S = of_sequence_S.index_add(0, self.sequence_T, self.counted_T.long())
        return torch.stack([of_sequence_S.sum(), (of_sequence_S > 0).sum()])


def tokens_of(inputs: Mapping[str, Any]) -> Tokens:
    """The tokens of a micro-batch from its `input_ids` [B, L], `attention_mask` and `cu_seq_lens_q`."""
    ids_BL = inputs["input_ids"]
    B, L = ids_BL.shape
    mask_BL = inputs.get("attention_mask")
    counted_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
    position_T = torch.arange(B * L, device=ids_BL.device)
    end_S = inputs.get("cu_seq_lens_q")
    if end_S is None:
        return Tokens(counted_BL.flatten(), position_T // max(L, 1), B)
    sequence_T = torch.searchsorted(end_S[1:].long(), position_T, right=True)
    return Tokens(counted_BL.flatten(), sequence_T, len(end_S) - 1)


@dataclass(frozen=True)
class Routed:
    """What one router did with a micro-batch, in float32 or wider."""

    logits_TE: Tensor
    score_TE: Tensor  # rows sum to 1
    expert_TK: Tensor


class RouterWatch:
    """Records the routers of a model's feed-forwards while it runs, by hooks that do nothing otherwise.

    Hooks only keep what routers returned: what is computed from it must not be part of a forward pass that
    gradient checkpointing runs a second time without recording.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [layer for layer in routed_layers(model) if layer.kind == "feed_forward"]
        self._into: dict[int, Any] | None = None
        for number, layer in enumerate(self.layers):
            layer.router.register_forward_hook(self._hook(number))

    @contextmanager
    def recording(self) -> Iterator[dict[int, Any]]:
        """Yields what fills with the output of every router by its layer, for `routed`."""
        self._into = {}
        try:
            yield self._into
        finally:
            self._into = None

    def routed(self, outputs: Mapping[int, Any]) -> list[Routed]:
        """What the routers did, in the order of the layers."""
        result = []
        for number, layer in enumerate(self.layers):
            choice = layer.choice((), outputs[number])
            assert choice.expert_TK is not None
            logits_TE = outputs[number][0].to(choice.score_TE.dtype)
            result.append(Routed(logits_TE, choice.score_TE, choice.expert_TK))
        return result

    def _hook(self, number: int) -> Any:
        def on_router(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._into is not None:
                self._into[number] = output

        return on_router


def expert_counts(expert_TK: Tensor, num_experts: int, tokens: Tokens, *, per_sequence: bool) -> Tensor:
    """count_SE: counted tokens that chose each expert, int64, in each sequence or in all together (S = 1)."""
    T, K = expert_TK.shape
    group_T = tokens.sequence_T if per_sequence else torch.zeros_like(tokens.sequence_T)
    S = tokens.num_sequences if per_sequence else 1
    slot_TK = group_T[:, None] * num_experts + expert_TK.long()
    counted_TK = tokens.counted_T[:, None].expand(T, K).long()
    count = torch.zeros(S * num_experts, dtype=torch.int64, device=expert_TK.device)
    return count.index_add(0, slot_TK.flatten(), counted_TK.flatten()).view(S, num_experts)


def balance_loss(
    routed: Routed, tokens: Tokens, total: Tensor, over: BalanceOver, count_E: Tensor | None = None
) -> Tensor:
    """A micro-batch's part of the balance loss of one layer; see the head of this file.

    Args:
        routed: of the layer.
        tokens: of the micro-batch.
        total: [tokens, sequences] of the whole batch, as `Tokens.totals` counts them.
        over: the tokens over which shares are taken.
        count_E: for "global_batch", the counts of the whole batch.
    """
    score_TE, expert_TK = routed.score_TE, routed.expert_TK
    E = score_TE.shape[1]
    score_TE = torch.where(tokens.counted_T[:, None], score_TE, 0.0)
    total = total.to(score_TE.dtype).clamp(min=1)
    if over == "sequence":
        count_SE = expert_counts(expert_TK, E, tokens, per_sequence=True).to(score_TE.dtype)
        sum_SE = score_TE.new_zeros(count_SE.shape).index_add(0, tokens.sequence_T, score_TE)
        slots_S1 = count_SE.sum(1, keepdim=True)
        tokens_S1 = slots_S1 / expert_TK.shape[1]
        return E * (count_SE / slots_S1.clamp(min=1) * sum_SE / tokens_S1.clamp(min=1)).sum() / total[1]
    if count_E is None:
        count_E = expert_counts(expert_TK, E, tokens, per_sequence=False)[0]
    share_E = count_E.to(score_TE.dtype) / count_E.sum().clamp(min=1)
    return E * (share_E * score_TE.sum(0)).sum() / total[0]


def z_loss(routed: Routed, tokens: Tokens, total: Tensor) -> Tensor:
    """A micro-batch's part of the z loss of one layer."""
    square_T = routed.logits_TE.logsumexp(dim=1).square()
    return torch.where(tokens.counted_T, square_T, 0.0).sum() / total[0].to(square_T.dtype).clamp(min=1)


@torch.no_grad()
def certainty(routed: Routed, tokens: Tokens) -> Tensor:
    """[entropy in nats, margin], each summed over counted tokens.

    The margin is the lowest score that was chosen minus the highest that was not (0 where all are chosen).
    """
    score_TE = routed.score_TE.detach()
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, routed.expert_TK, True)
    entropy_T = -torch.xlogy(score_TE, score_TE).sum(1)
    margin_T = score_TE.masked_fill(~chosen_TE, 1.0).amin(1) - score_TE.masked_fill(chosen_TE, 0.0).amax(1)
    values_2T = torch.stack([entropy_T, margin_T])
    return torch.where(tokens.counted_T, values_2T, 0.0).sum(1)
