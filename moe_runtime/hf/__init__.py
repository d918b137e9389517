"""The causal LM for transformers. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moe_runtime.hf.configuration import MoeRuntimeConfig
from moe_runtime.hf.modeling import MoeRuntimeForCausalLM, MoeRuntimeModel

AutoConfig.register(MoeRuntimeConfig.model_type, MoeRuntimeConfig)
AutoModel.register(MoeRuntimeConfig, MoeRuntimeModel)
AutoModelForCausalLM.register(MoeRuntimeConfig, MoeRuntimeForCausalLM)

__all__ = ["MoeRuntimeConfig", "MoeRuntimeForCausalLM", "MoeRuntimeModel"]
