"""A key-value cache of fixed size, for decoding with fixed shapes."""

from transformers import PreTrainedModel, StaticCache


def static_cache(model: PreTrainedModel, max_length: int) -> StaticCache:
    """An empty cache with room for `max_length` tokens; each layer takes its shape when first written."""
    return StaticCache(config=model.config, max_cache_len=max_length)
