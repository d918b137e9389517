"""attention_mix: its definition, its inputs, and the operation as a function of them."""

import torch
from inputs import normal
from moe_runtime_kernels import attention_mix


def mix_by_hand(o, gate, weight):
    """Each expert's own projection, then their weighted sum."""
    T, S, A, Q = o.shape
    wide = torch.promote_types(o.dtype, torch.float32)
    columns = weight.view(-1, S, A, Q)
    total = torch.zeros(T, weight.shape[0], dtype=wide, device=o.device)
    for a in range(A):
        projected = o[:, :, a].flatten(1) @ columns[:, :, a].flatten(1).t()
        total = total + gate[:, a, None].to(wide) * projected.to(wide)
    return total.to(o.dtype)


def mix(o, gate, weight):
    return attention_mix(o, gate, weight)


def make_inputs(T, S, A, Q, D, dtype, draw=0):
    C = S * A * Q
    return {
        "o": normal(T, S, A, Q, dtype=dtype, seed=draw),
        "gate": normal(T, A, seed=100 + draw).softmax(1),
        "weight": normal(D, C, dtype=dtype, scale=C**-0.5, seed=200 + draw),
    }
