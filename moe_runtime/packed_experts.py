"""pack_experts: a model's experts laid out once for inference on a CPU.

A packed layer keeps its parameters; what it reads without gradients is a second copy of them, which deepcopy,
pickle and state dicts do not see.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from moe_runtime_kernels import PackedExperts
from torch import Tensor, nn

from moe_runtime.config import FeedForwardConfig

_SAMPLED = 8  # rows and columns of every matrix that are compared before it is used


@dataclass(frozen=True)
class _Packed:
    experts: PackedExperts
    stamps: tuple[tuple[int, int], ...]  # of the parameters that were packed
    samples: tuple[Tensor, ...]

    def is_of(self, parameters: tuple[Tensor, ...]) -> bool:
        """Fused optimizers and writes to `.data` leave the stamps as they are, but not the samples."""
        return self.stamps == _stamps(parameters) and all(
            torch.equal(before, _sample(now)) for before, now in zip(self.samples, parameters, strict=True)
        )


_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def pack_experts(model: nn.Module) -> tuple[str, ...]:
    """Make every layer of experts in `model` run on packed weights where no gradient is asked for.

    Needs as much memory again as the experts have. A layer whose weights have changed since raises when it is
    called, which is seen from where they lie, how often PyTorch wrote to them, and some elements of each
    matrix; packing again replaces the copy. Compiled code, training and autocast to another dtype use the
    parameters as before.

    Args:
        model: a layer or model of this project, or of transformers with `experts_implementation=
            "moe_runtime"`; on the CPU, in float32 or, on a processor with AVX512_BF16 or AMX, bfloat16;
            on others unpacked experts are faster.

    Returns:
        Names of the packed modules.

    Raises:
        ValueError: there are no experts, or some that cannot be packed; then none are.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if holds_experts(module)}
    if not found:
        raise ValueError(
            f"model must have experts of this project or on transformers' experts interface; "
            f"{type(model).__name__} has none"
        )
    for name, module in found.items():
        if (reason := _obstacle(module)) is not None:
            raise ValueError(
                f"model must have experts that can be packed, but of {name or 'model'}, {reason}"
            )
    packed: dict[nn.Module, _Packed] = {}
    for name, module in found.items():
        weights, activation = _weights(module)
        first, down, first_bias, down_bias = weights
        try:
            experts = PackedExperts(
                first, down, activation=activation, gate_up_bias_EG=first_bias, down_bias_ED=down_bias
            )
        except ValueError as error:
            raise ValueError(
                f"model must have experts that can be packed, but of {name or 'model'}, {error}"
            ) from None
        parameters = tuple(weight for weight in weights if weight is not None)
        samples = tuple(_sample(parameter).clone() for parameter in parameters)
        packed[module] = _Packed(experts, _stamps(parameters), samples)
    _PACKED.update(packed)
    return tuple(found)


def unpack_experts(model: nn.Module) -> nn.Module:
    """Drop the copies of all packed layers in `model`; harmless where there are none. Returns the model."""
    for module in model.modules():
        _PACKED.pop(module, None)
    return model


def packed_forward(
    module: nn.Module,
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    residual_TD: Tensor | None = None,
) -> Tensor | None:
    """The layer on its packed weights; None where it has none or they do not serve this call.

    Raises:
        ValueError: the parameters are not those that were packed.
    """
    if torch.compiler.is_compiling() or (packed := _PACKED.get(module)) is None:
        return None
    weights, activation = _weights(module)
    parameters = tuple(weight for weight in weights if weight is not None)
    inputs = (x_TD, weight_TK, residual_TD, *parameters)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return None
    if x_TD.dtype != packed.experts.dtype or getattr(module, "expert_lora", None) is not None:
        return None
    if activation != packed.experts.activation or not packed.is_of(parameters):
        raise ValueError(
            f"weights of {type(module).__name__} must be those that pack_experts packed, but they have "
            "changed since; call pack_experts again, or unpack_experts"
        )
    return packed.experts(x_TD, expert_TK, weight_TK, residual_TD)


def _stamps(parameters: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """Where each lies, and how often it was written to; inference tensors do not count."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)


def _sample(parameter: Tensor) -> Tensor:
    """Elements of every expert, in a few rows and columns of its matrix."""
    steps = (slice(None, None, -(-size // _SAMPLED)) for size in parameter.shape[1:])
    return parameter.detach()[(slice(None), *steps)]


# --- the two kinds of modules -----------------------------------------------------------


def holds_experts(module: nn.Module) -> bool:
    # transformers' interface writes these attributes into its modules
    of_transformers = {"config", "has_gate", "has_bias", "is_transposed", "is_concatenated"}
    return _is_ours(module) or vars(module).keys() >= of_transformers


def _is_ours(module: Any) -> bool:
    """Whether it is an `Experts`, which imports this file."""
    return isinstance(getattr(module, "config", None), FeedForwardConfig) and hasattr(module, "gate_up_proj")


def _obstacle(module: Any) -> str | None:
    """Why the module does not run as `expert_ffn` of plain weights; None if it does."""
    if getattr(module, "expert_lora", None) is not None:
        return "expert_lora adapts them; merge the adapter first"
    if _is_ours(module):
        backend = module.config.experts_backend
        return None if backend == "moe_runtime" else f"experts_backend is {backend!r}"
    from moe_runtime.hf.experts_interface import NAME, served_by

    if module.config._experts_implementation != NAME:
        return f"experts_implementation is {module.config._experts_implementation!r} instead of {NAME!r}"
    served = served_by(module)
    return None if served == "expert_ffn" else f"they run on {served} instead of expert_ffn"


def _weights(module: Any) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], str]:
    """Both projections and their biases, and the activation."""
    if _is_ours(module):
        biases = (module.gate_up_bias, module.down_bias)
        return (module.gate_up_proj, module.down_proj, *biases), module.config.activation
    from moe_runtime.hf.experts_interface import first_product, fused_activation

    first, first_bias = first_product(module)
    activation = fused_activation(module)
    assert activation is not None
    return (
        first,
        module.down_proj,
        first_bias,
        module.down_proj_bias if module.has_bias else None,
    ), activation
