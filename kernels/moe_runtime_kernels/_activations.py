"""The experts' activations and their gradients: a = act(h[:, :F]) * h[:, F:] with a gate, act(h) without."""

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

_aten = torch.ops.aten
# name: (value of h, gradient in h of <grad, value>)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, _aten.silu_backward.default),
    "gelu": (functional.gelu, _aten.gelu_backward.default),
    "gelu_tanh": (
        lambda h: functional.gelu(h, approximate="tanh"),
        lambda grad, h: _aten.gelu_backward.default(grad, h, approximate="tanh"),
    ),
    "relu": (functional.relu, lambda grad, h: grad * (h > 0)),
    "relu2": (lambda h: functional.relu(h).square(), lambda grad, h: grad * 2 * functional.relu(h)),
}


def activate(h_NG: Tensor, F: int, activation: str) -> Tensor:
    """a_NF of h_NG: the activation of h, or with G = 2F of its first half, times its second half."""
    act, _ = ACTIVATIONS[activation]
    return act(h_NG) if h_NG.shape[1] == F else act(h_NG[:, :F]) * h_NG[:, F:]


def activate_backward(da_NF: Tensor, h_NG: Tensor, activation: str) -> Tensor:
    """dh_NG of the gradient of a_NF."""
    act, act_grad = ACTIVATIONS[activation]
    F = da_NF.shape[1]
    if h_NG.shape[1] == F:
        return act_grad(da_NF, h_NG)
    gate_NF, up_NF = h_NG[:, :F], h_NG[:, F:]
    return torch.cat([act_grad(da_NF * up_NF, gate_NF), da_NF * act(gate_NF)], dim=1)
