"""Models for a profile: with random weights, dense of equal width, and on the experts interface."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_runtime.config import ModelConfig
from moe_runtime.families import model_config
from moe_runtime.hf import MoeRuntimeConfig
from moe_runtime.hf.experts_interface import register, served_by
from moe_runtime.hf.loading import json_object

# The dense family of a MoE family: the same attention and norms. Others get a dense model of this project's.
_DENSE_FAMILY = {
    "mixtral": "mistral",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "flex_olmo": "olmo2",
    "granitemoe": "granite",
}
_NOT_OF_THE_DENSE = ("model_type", "architectures", "auto_map", "transformers_version", "dtype")


def described(config: PreTrainedConfig) -> ModelConfig:
    """The model as FLOPs are counted. Raises ValueError for a family that `moe_runtime.families` lacks."""
    return model_config(config.to_dict())


def read_config(file: Path) -> PreTrainedConfig:
    """The configuration in a config.json.

    Raises:
        ValueError: the file is no JSON object, or of a model type that transformers does not know.
    """
    model_type = json_object(file).get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type in {file} must be one that transformers knows, got {model_type!r}")
    return AutoConfig.from_pretrained(file, local_files_only=True)


def shape_config(shape: ModelConfig) -> MoeRuntimeConfig:
    """The configuration of a named shape, as this project's model."""
    return MoeRuntimeConfig.from_model_config(shape)


def dense_twin(config: PreTrainedConfig, dense: ModelConfig) -> PreTrainedConfig:
    """The configuration of the dense model `dense`, in the dense family of `config` where there is one."""
    family = _DENSE_FAMILY.get(config.model_type)
    if family is None:
        return MoeRuntimeConfig.from_model_config(dense)
    values = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_DENSE}
    return AutoConfig.for_model(family, **values | {"intermediate_size": dense.intermediate_size})


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the model, without allocating one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def random_causal_lm(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """The model with freshly drawn weights, in eval mode. The caller's random state is left as it was."""
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def experts_implementations(model: PreTrainedModel) -> list[str]:
    """The names that `set_experts_implementation` takes, ours first; none without the experts interface."""
    if not model._can_set_experts_implementation():
        return []
    register()
    return ["moe_runtime", "eager", *sorted(set(ALL_EXPERTS_FUNCTIONS.valid_keys()) - {"moe_runtime"})]


def experts_run_on(model: PreTrainedModel) -> list[str]:
    """What the kernels are that "moe_runtime" gives to the experts of this model, over all layers."""
    experts: list[Any] = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    return sorted({served_by(module) for module in experts})
