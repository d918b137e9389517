"""The configuration of the causal LM for transformers: the fields of `ModelConfig` in a config.json."""

from dataclasses import MISSING, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_runtime.config import LEFT_OUT_DEFAULTS, ModelConfig
from moe_runtime.publishing import MODEL_TYPE


class MoeRuntimeConfig(PreTrainedConfig):
    """Every field of `moe_runtime.config.ModelConfig`, under its name and with its default, plus
    transformers' own.

    The values are checked by building the `ModelConfig` they describe. `layer_types` is always a list here,
    because transformers chooses masks and caches by it. `output_router_logits` exists where there are
    experts: trainers take its presence as the sign of a Mixture of Experts.

    Raises:
        ValueError: naming the field, what it must be and what it was.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "aux_loss",
        "z_loss",
        "router_logits",
        "expert_count",
    ]
    has_no_defaults_at_init: ClassVar[bool] = True  # read by transformers before 5.18

    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # an empty one is filled by transformers, which knows the keys of older files, such as `rope_theta`
        kwargs["rope_parameters"] = kwargs.get("rope_parameters") or {}
        for field in fields(ModelConfig):
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            value = kwargs.pop(field.name, default)
            if value is MISSING:
                raise ValueError(f"{field.name} must be given in a {type(self).__name__}, it has no default")
            setattr(self, field.name, value)
        described = self.model_config()
        if described.layer_types is None:
            kind = "full_attention" if described.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * described.num_hidden_layers
        if described.num_experts > 0:
            self.output_router_logits = kwargs.pop("output_router_logits", False)
        super().__post_init__(**kwargs)
        rope_types = sorted({"default", *ROPE_INIT_FUNCTIONS})
        for name in ("rope_parameters", "sliding_rope_parameters"):
            rope = getattr(self, name)
            if rope is not None and rope.get("rope_type") not in rope_types:
                raise ValueError(
                    f"{name}['rope_type'] must be one of {', '.join(map(repr, rope_types))}, got "
                    f"{rope.get('rope_type')!r}"
                )
        self.model_config()  # again: transformers may have found a part to rotate among an older file's keys

    def to_dict(self) -> dict[str, Any]:
        """transformers' dictionary, without the fields that `ModelConfig.to_dict` leaves out."""
        values = super().to_dict()
        return {name: v for name, v in values.items() if v != LEFT_OUT_DEFAULTS.get(name, ...)}

    def model_config(self) -> ModelConfig:
        """The checked description that layers are built from. Raises ValueError where a field is wrong."""
        return ModelConfig.from_dict({field.name: getattr(self, field.name) for field in fields(ModelConfig)})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> "MoeRuntimeConfig":
        """The configuration of a description; `kwargs` are transformers' own fields, like `eos_token_id`."""
        return cls(**config.to_dict(), **kwargs)
