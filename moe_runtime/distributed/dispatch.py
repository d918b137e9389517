"""Rows to the processes that hold their experts, and back.

Rows are in expert order, so those of one process are neighbours: one all-to-all with uneven parts brings them
there, the same with both sides exchanged brings results back, and each is the gradient of the other.

The counts travel between devices. Their sums are then read on the host, once per layer and forward pass,
because neither gloo nor NCCL takes the sizes of the parts from a device: under NCCL the host waits for the
router here. Backward uses the sizes again and waits for nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


class Route(NamedTuple):
    """Which rows come here: R of them, in the order of the process they come from, then of the expert."""

    sent: list[int]  # rows to each process
    received: list[int]  # rows from each process
    expert_R: Tensor  # the expert of each row, counted from this process's first; int64


def exchange_counts(count_E: Tensor, group: ProcessGroup) -> Route:
    """Tell every process how many rows it gets.

    Args:
        count_E: rows of each expert; process i of the group's X holds experts i · E/X to (i + 1) · E/X - 1.
        group: the processes that hold all experts together; each must call this.
    """
    X = group.size()
    count_XE = count_E.view(X, -1)
    received_XE = torch.empty_like(count_XE)
    distributed.all_to_all_single(received_XE, count_XE, group=group)
    sent, received = torch.stack([count_XE.sum(1), received_XE.sum(1)]).tolist()
    expert_XE = torch.arange(count_XE.shape[1], device=count_E.device).repeat(X)
    expert_R = expert_XE.repeat_interleave(received_XE.flatten(), output_size=sum(received))
    return Route(sent, received, expert_R)


def to_experts(x_ND: Tensor, route: Route, group: ProcessGroup) -> Tensor:
    """The rows of all processes that belong to experts of this one, [R, D]; `x_ND` is in expert order."""
    return _AllToAll.apply(x_ND, route.sent, route.received, group)


def to_tokens(y_RD: Tensor, route: Route, group: ProcessGroup) -> Tensor:
    """Rows as `to_experts` took them, from rows as it returned them."""
    return _AllToAll.apply(y_RD, route.received, route.sent, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad_out, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), x.shape[1])
    distributed.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
