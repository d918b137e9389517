"""The expert layer and its products: definitions, inputs, and the operation as a function of them."""

import torch
import torch.nn.functional as functional
from inputs import normal
from moe_runtime_kernels import expert_ffn

D, F = 72, 50
# whole numbers of 16 elements, which have kernels of their own; no tile and no step divides them
ALIGNED = [(80, 144), (48, 16)]
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda h: functional.relu(h).square(),
}
NAMES = ("x", "gate_up", "down", "weight", "gate_up_bias", "down_bias", "residual")


def gemm_by_hand(plan, x, weight, bias=None):
    """Every row times every matrix; each row keeps its own expert's product."""
    ends = plan.offset_E.tolist()
    owner = torch.tensor([sum(n >= end for end in ends) for n in range(x.shape[0])], device=x.device)
    y = torch.zeros_like(x[:, :1])
    for e, matrix in enumerate(weight.unbind(0)):
        product = x @ matrix.t()
        y = torch.where(owner[:, None] == e, product if bias is None else product + bias[e], y)
    return y


def dense_experts(expert_TK, activation, x, gate_up, down, weight, *, adapted=None, **optional):
    """Every token through every expert, an ordinary FFN; each token sums the K outputs it chose, weighted.

    `adapted(product, rows, name, expert)` may add to a product of the weights `name`.
    """
    F, dtype = down.shape[2], x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    residual = optional.get("residual")

    def product(rows, name, matrix, e):
        bias = optional.get(f"{name}_bias")
        y = functional.linear(rows, matrix, None if bias is None else bias[e])
        return adapted(y, rows, name, e) if adapted else y

    total = torch.zeros_like(x, dtype=wide)
    for e, (up_matrix, down_matrix) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        h = product(x, "gate_up", up_matrix, e).to(wide)
        gate = ACTIVATIONS[activation](h[:, :F])
        a = (gate if h.shape[1] == F else gate * h[:, F:]).to(dtype)
        y = product(a, "down", down_matrix, e)
        total = total + (weight.to(wide) * (expert_TK == e)).sum(1, keepdim=True) * y.to(wide)
    return total.to(dtype) if residual is None else (total + residual.to(wide)).to(residual.dtype)


def make_inputs(routing, dtype, gated=True, optional=(), draw=0, D=D, F=F):
    """Inputs and upstream gradient; `optional` are NAMES from gate_up_bias on."""
    T, K, E, _ = routing
    G = 2 * F if gated else F
    inputs = {
        "x": normal(T, D, dtype=dtype, seed=draw),
        "gate_up": normal(E, G, D, dtype=dtype, scale=D**-0.5, seed=100 + draw),
        "down": normal(E, D, F, dtype=dtype, scale=F**-0.5, seed=200 + draw),
        "weight": normal(T, K, seed=300 + draw).softmax(1),
    }
    more = {
        "gate_up_bias": normal(E, G, dtype=dtype, seed=400 + draw),
        "down_bias": normal(E, D, dtype=dtype, seed=500 + draw),
        "residual": normal(T, D, dtype=dtype, seed=600 + draw),
    }
    return inputs | {name: more[name] for name in optional}, normal(T, D, dtype=dtype, seed=700 + draw)


def layer(plan, activation="silu"):
    def fn(x, gate_up, down, weight, gate_up_bias=None, down_bias=None, residual=None):
        return expert_ffn(
            x,
            gate_up,
            down,
            weight,
            plan,
            activation=activation,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            residual_TD=residual,
        )

    return fn
