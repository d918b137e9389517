"""The parts of the auxiliary losses against the definitions in `moe_runtime.losses`, and their additivity."""

import pytest
import torch
from tiny_models import assert_equal_up_to_rounding, randn, tokens

from moe_runtime import losses
from moe_runtime.train.balance import (
    Routed,
    Tokens,
    balance_loss,
    certainty,
    expert_counts,
    tokens_of,
    z_loss,
)

T, E, K = 12, 5, 2


def routed(logits_TE):
    score_TE = logits_TE.softmax(-1)
    return Routed(logits_TE, score_TE, score_TE.topk(K, dim=-1).indices)


def some_tokens(lengths=(5, 3, 4), padding=(2, 7)):
    counted_T = torch.ones(T, dtype=torch.bool)
    counted_T[list(padding)] = False
    return Tokens(counted_T, torch.arange(3).repeat_interleave(torch.tensor(lengths)), 3)


def part(of, tokens, rows):
    """What a micro-batch of these tokens has."""
    return (
        Routed(of.logits_TE[rows], of.score_TE[rows], of.expert_TK[rows]),
        Tokens(tokens.counted_T[rows], tokens.sequence_T[rows], tokens.num_sequences),
    )


def test_over_one_micro_batch_the_losses_are_the_definitions():
    logits_TE, batch = randn(T, E, dtype=torch.float64), some_tokens()
    of, total, mask_T = routed(logits_TE), batch.totals(), batch.counted_T
    count_E = expert_counts(of.expert_TK, E, batch, per_sequence=False)[0]
    expected = losses.load_balancing_loss(of.score_TE, count_E, K, mask_T)
    for over, counts in (("micro_batch", None), ("global_batch", count_E)):
        assert balance_loss(of, batch, total, over, counts).item() == pytest.approx(
            expected.item(), rel=1e-12
        )
    expected = losses.z_loss(logits_TE, mask_T)
    assert z_loss(of, batch, total).item() == pytest.approx(expected.item(), rel=1e-12)


def test_over_sequences_the_loss_is_the_mean_of_their_losses():
    logits_TE, batch = randn(T, E, dtype=torch.float64), some_tokens(padding=(2, 5, 6, 7))
    of, each = routed(logits_TE), []
    for rows in (slice(0, 5), slice(8, 12)):  # of the third sequence nothing counts
        here, tokens = part(of, batch, rows)
        count_E = expert_counts(here.expert_TK, E, tokens, per_sequence=False)[0]
        each.append(losses.load_balancing_loss(here.score_TE, count_E, K, tokens.counted_T).item())
    assert batch.totals().tolist() == [8, 2]
    actual = balance_loss(of, batch, batch.totals(), "sequence").item()
    assert actual == pytest.approx(sum(each) / 2, rel=1e-12)


@pytest.mark.parametrize("over", ["sequence", "global_batch"])
def test_parts_and_their_gradients_add_up_to_those_of_the_batch(over):
    batch = some_tokens()
    total = batch.totals()

    def losses_of(cuts):
        logits_TE = randn(T, E, dtype=torch.float64).requires_grad_()
        of = routed(logits_TE)
        whole = (
            expert_counts(of.expert_TK, E, batch, per_sequence=False)[0] if over == "global_batch" else None
        )
        pieces = [part(of, batch, rows) for rows in cuts]
        balance = sum(balance_loss(*piece, total, over, whole) for piece in pieces)
        z = sum(z_loss(*piece, total) for piece in pieces)
        (balance + 0.3 * z).backward()
        return torch.stack([balance.detach(), z.detach()]), logits_TE.grad

    # cut between sequences
    for actual, expected in zip(
        losses_of([slice(0, 8), slice(8, 12)]), losses_of([slice(0, 12)]), strict=True
    ):
        assert_equal_up_to_rounding("value or gradient", actual, expected)


def test_over_micro_batches_the_parts_are_means_of_other_losses():
    of, batch = routed(randn(T, E, dtype=torch.float64)), some_tokens()
    pieces = [part(of, batch, rows) for rows in (slice(0, 8), slice(8, 12))]
    apart = sum(balance_loss(*piece, batch.totals(), "micro_batch") for piece in pieces)
    assert abs(apart - balance_loss(of, batch, batch.totals(), "micro_batch")) > 1e-3


def test_tokens_are_told_by_mask_and_by_packed_documents():
    ids_BL = tokens(2, 4)
    mask_BL = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    padded = tokens_of({"input_ids": ids_BL, "attention_mask": mask_BL})
    assert padded.sequence_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert padded.totals().tolist() == [4, 2]
    packed = tokens_of({"input_ids": ids_BL.view(1, 8), "cu_seq_lens_q": torch.tensor([0, 3, 4, 8]).int()})
    assert packed.sequence_T.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert packed.totals().tolist() == [8, 3]


def test_counts_leave_padding_out():
    of, batch = routed(randn(T, E)), some_tokens()
    by_hand = torch.zeros(3, E, dtype=torch.int64)
    for t in range(T):
        if batch.counted_T[t]:
            by_hand[batch.sequence_T[t], of.expert_TK[t]] += 1
    assert torch.equal(expert_counts(of.expert_TK, E, batch, per_sequence=True), by_hand)
    assert torch.equal(
        expert_counts(of.expert_TK, E, batch, per_sequence=False), by_hand.sum(0, keepdim=True)
    )


def test_certainty_is_summed_over_counted_tokens():
    of, batch = routed(randn(T, E, dtype=torch.float64)), some_tokens()
    entropy = margin = 0.0
    for t in batch.counted_T.nonzero()[:, 0].tolist():
        score_E = of.score_TE[t].sort(descending=True).values
        entropy -= (score_E * score_E.log()).sum().item()
        margin += (score_E[K - 1] - score_E[K]).item()
    assert certainty(of, batch).tolist() == pytest.approx([entropy, margin], rel=1e-12)


def test_nothing_counted_gives_zeros():
    of = routed(randn(T, E))
    batch = Tokens(torch.zeros(T, dtype=torch.bool), torch.zeros(T, dtype=torch.int64), 1)
    for over in ("micro_batch", "sequence"):
        assert balance_loss(of, batch, batch.totals(), over).item() == 0.0
    assert z_loss(of, batch, batch.totals()).item() == 0.0
