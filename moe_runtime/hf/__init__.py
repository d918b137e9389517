"""For transformers: the causal LM, and the kernels for other models' experts.

Importing this package registers the one with the Auto classes, the other as
`experts_implementation="moe_runtime"`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moe_runtime.hf.configuration import MoeRuntimeConfig
from moe_runtime.hf.experts_interface import register
from moe_runtime.hf.modeling import MoeRuntimeForCausalLM, MoeRuntimeModel

AutoConfig.register(MoeRuntimeConfig.model_type, MoeRuntimeConfig)
AutoModel.register(MoeRuntimeConfig, MoeRuntimeModel)
AutoModelForCausalLM.register(MoeRuntimeConfig, MoeRuntimeForCausalLM)
register()

__all__ = ["MoeRuntimeConfig", "MoeRuntimeForCausalLM", "MoeRuntimeModel"]
