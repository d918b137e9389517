"""Which stored tensors of a dense checkpoint are its feed-forwards, and which module's input a router reads.

Names are those of the checkpoint, which the transformers model of its family shares.
"""

from moe_runtime.config import ModelConfig
from moe_runtime.families import model_config
from upcycle import names
from upcycle.checkpoint import Checkpoint
from upcycle.stored import stored_rows


def dense_config(base: Checkpoint) -> ModelConfig:
    return model_config(base.config_json)


def feed_forward_tensors(base: Checkpoint) -> tuple[tuple[str, ...], ...]:
    """Of every layer, the tensors that hold its feed-forward; a family may fuse several in one."""
    config = dense_config(base)
    rows = stored_rows(base, config)
    layers = []
    for number in range(config.num_hidden_layers):
        ours = [name for name in names.dense_shapes(config) if name.startswith(f"{names.layer(number)}.mlp.")]
        layers.append(tuple(dict.fromkeys(rows[name].tensor for name in ours)))
    return tuple(layers)


def down_projections(base: Checkpoint) -> frozenset[str]:
    """The stored weights with the hidden neurons as columns, of all layers; the others have them as rows."""
    config = dense_config(base)
    rows = stored_rows(base, config)
    return frozenset(
        rows[f"{names.layer(number)}.mlp.down_proj.weight"].tensor
        for number in range(config.num_hidden_layers)
    )


def router_inputs(base: Checkpoint) -> tuple[str, ...]:
    """Of every layer, the module whose input is the feed-forward's, which a router reads too."""
    config = dense_config(base)
    rows = stored_rows(base, config)
    return tuple(
        rows[f"{names.layer(number)}.mlp.up_proj.weight"].tensor.removesuffix(".weight")
        for number in range(config.num_hidden_layers)
    )
