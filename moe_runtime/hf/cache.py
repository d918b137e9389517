"""Key-value caches: one of fixed size, for decoding with fixed shapes, and which hold nothing else."""

from typing import Any

from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def static_cache(model: PreTrainedModel, max_length: int) -> StaticCache:
    """An empty cache with room for `max_length` tokens; each layer takes its shape when first written."""
    return StaticCache(config=model.config, max_cache_len=max_length)


def holds_keys_and_values_only(cache: Any) -> bool:
    """Whether a cache grows by the keys and values of each token, of a whole sequence or a window of it."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )
