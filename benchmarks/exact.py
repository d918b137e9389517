"""What an expert layer gives in float64: for some tokens, and for the matrices of one expert.

A token's output and gradients need its own experts only, and a matrix's gradient its own expert's tokens; so
an exact answer of a sample is cheap whatever the size of the layer.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

RESULTS = ("y", "dx", "dgate_up", "ddown", "dweight")


@dataclass(frozen=True)
class Layer:
    """A gated expert layer with SiLU, its routing and the upstream gradient."""

    x_TD: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    grad_TD: Tensor

    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What gradients are taken of, in the order of RESULTS."""
        return self.x_TD, self.gate_up_EGD, self.down_EDF, self.weight_TK


@dataclass(frozen=True)
class Sample:
    """Exact results of the tokens `token_S`; the gradients of matrices are those of one `expert`."""

    token_S: Tensor
    expert: int
    exact: dict[str, Tensor]

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """Rms error of each result, in units of the exact one's rms."""
        errors = {}
        for name, value in results.items():
            of_expert = name in ("dgate_up", "ddown")
            part = (value[self.expert] if of_expert else value[self.token_S]).detach()
            exact = self.exact[name]
            error = (part.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            errors[name] = error.item()
        return errors


def choose_experts(T: int, E: int, K: int, routing: str, g: torch.Generator) -> Tensor:
    """K distinct experts of each token, int32 [T, K].

    uniform: all alike; zipf: drawn with odds 1 / (1 + e), so that expert 0 is the busiest; one_hot: the same
    K experts for every token.
    """
    if routing == "one_hot":
        return torch.arange(K, dtype=torch.int32, device=g.device).repeat(T, 1)
    uniform_TE = torch.rand(T, E, generator=g, device=g.device)
    if routing == "uniform":
        return uniform_TE.topk(K, dim=1).indices.int()
    # the K largest of log odds and Gumbel noise are a draw without replacement
    odds_E = 1 / torch.arange(1, E + 1, device=g.device)
    return (odds_E.log() - (-uniform_TE.log()).log()).topk(K, dim=1).indices.int()


def make_layer(
    T: int, D: int, F: int, E: int, K: int, device: str, seed: int = 0, routing: str = "uniform"
) -> Layer:
    """Random numbers of the sizes they have in a model, and a routing; bfloat16."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, device=device)).to(torch.bfloat16)

    gate_up_EGD, down_EDF = normal(E, 2 * F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5)
    expert_TK = choose_experts(T, E, K, routing, g)
    weight_TK = torch.randn(T, K, generator=g, device=device).softmax(1)
    return Layer(normal(T, D), gate_up_EGD, down_EDF, weight_TK, expert_TK, normal(T, D))


def exact_sample(layer: Layer, num_tokens: int = 64) -> Sample:
    """Of so many tokens, at even distances, and of the first one's first expert. Loops over experts."""
    T, D = layer.x_TD.shape
    token_S = torch.arange(0, T, max(T // num_tokens, 1), device=layer.x_TD.device)
    expert = int(layer.expert_TK[0, 0])
    sampled_T = torch.zeros(T, dtype=torch.bool, device=layer.x_TD.device).index_fill(0, token_S, True)
    y_TD, dx_TD = (torch.zeros(T, D, dtype=torch.float64, device=layer.x_TD.device) for _ in range(2))
    dweight_TK = torch.zeros_like(layer.weight_TK, dtype=torch.float64)
    exact: dict[str, Tensor] = {}
    for e in layer.expert_TK[token_S].unique().tolist():
        chosen_TK = layer.expert_TK == e
        token_R, choice_R = (chosen_TK if e == expert else chosen_TK & sampled_T[:, None]).nonzero().unbind(1)
        tensors = (
            layer.x_TD[token_R],
            layer.gate_up_EGD[e],
            layer.down_EDF[e],
            layer.weight_TK[token_R, choice_R],
        )
        leaves = [tensor.double().requires_grad_() for tensor in tensors]
        x_RD, gate_up_GD, down_DF, weight_R = leaves
        gate_RF, up_RF = (x_RD @ gate_up_GD.t()).chunk(2, dim=1)
        y_RD = weight_R[:, None] * (functional.silu(gate_RF) * up_RF @ down_DF.t())
        grads = torch.autograd.grad(y_RD, leaves, layer.grad_TD[token_R].double())
        y_TD.index_add_(0, token_R, y_RD.detach())
        dx_TD.index_add_(0, token_R, grads[0])
        dweight_TK[token_R, choice_R] = grads[3]
        if e == expert:
            exact = {"dgate_up": grads[1], "ddown": grads[2]}
    of_tokens = {"y": y_TD[token_S], "dx": dx_TD[token_S], "dweight": dweight_TK[token_S]}
    return Sample(token_S, expert, of_tokens | exact)
