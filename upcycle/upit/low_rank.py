"""LoRA on linear layers of a dense model, without PEFT: W x + scaling · B A x."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class LowRank(nn.Module):
    """The adapter of one linear layer, under PEFT's names, so that a recorder reads either."""

    def __init__(self, A_RI: Tensor, B_OR: Tensor, scaling: float) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": _linear(A_RI)})
        self.lora_B = nn.ModuleDict({"default": _linear(B_OR)})
        self.scaling = {"default": scaling}

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x_TI))


def _linear(weight_OI: Tensor) -> nn.Linear:
    O, I = weight_OI.shape
    layer = nn.Linear(I, O, bias=False)
    layer.weight = nn.Parameter(weight_OI.detach().clone())
    return layer


class LowRankModel:
    """A model with an adapter `lora` on some of its linear layers, until `remove` is called.

    Args:
        model: its own parameters are frozen.
        factors: lora_A and lora_B by the name of the weight that they adapt.
        scaling: of every product.
    """

    def __init__(
        self, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float
    ) -> None:
        model.requires_grad_(False)
        self.parts: dict[str, tuple[nn.Module, LowRank, Any]] = {}
        for weight, (A_RI, B_OR) in factors.items():
            layer = model.get_submodule(weight.removesuffix(".weight"))
            lora = LowRank(A_RI, B_OR, scaling).to(A_RI.device)
            layer.lora = lora
            self.parts[weight] = (layer, lora, layer.register_forward_hook(_add_low_rank))

    def parameters(self) -> dict[str, nn.Parameter]:
        named: dict[str, Any] = {}
        for weight, (_, lora, _) in self.parts.items():
            named[f"{weight}.lora_A"] = lora.lora_A["default"].weight
            named[f"{weight}.lora_B"] = lora.lora_B["default"].weight
        return named

    def remove(self) -> None:
        for layer, _, hook in self.parts.values():
            hook.remove()
            del layer.lora


def _add_low_rank(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + layer.lora(inputs[0])
