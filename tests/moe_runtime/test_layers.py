"""The public names, and that shape-suffixed names in the layers say the truth while they run."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from shape_names import checked_shape_names
from tiny_models import BAM, BAM_SHARED_KV, BAM_SHARED_KV_TOP_K, BAM_TOP_K, MOE, tiny_model, tokens

import moe_runtime
from moe_runtime import layers
from moe_runtime.experts import ACTIVATIONS


def test_every_public_name_exists():
    for name in moe_runtime.__all__:
        assert getattr(moe_runtime, name).__name__ == name
    assert set(moe_runtime.__all__) <= set(dir(moe_runtime))
    for name in layers.__all__:
        assert getattr(layers, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'moe_runtime' has no attribute 'Abacus'"):
        _ = moe_runtime.Abacus


def test_names_load_only_when_used():
    code = (
        "import json, sys, moe_runtime; before = 'torch' in sys.modules;"
        "moe_runtime.ModelConfig; config = 'torch' in sys.modules;"
        "moe_runtime.MoEFeedForward; print(json.dumps([before, config, 'torch' in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [False, False, True]


@pytest.mark.parametrize(
    "kind",
    [
        MOE | {"shared_expert_intermediate_size": 12, "sliding_window": 4, "expert_dropout": 0.1},
        BAM_TOP_K | {"attention_output_bias": True, "qk_norm": "rms_norm"},
        BAM_SHARED_KV_TOP_K | {"attention_output_bias": True},
        BAM_SHARED_KV | {"qk_norm": "layer_norm", "norm": "layer_norm", "norm_bias": True},
    ],
    ids=["moe", "bam-top-k", "bam-shared-kv-top-k", "bam-shared-kv"],
)
def test_shape_suffixes_hold(kind):
    model, ids = tiny_model(kind).train(), tokens(2, 9)
    with checked_shape_names("moe_runtime"):
        out = model(ids, attention_mask=torch.ones_like(ids), labels=ids)
    out.loss.backward()


@pytest.mark.parametrize("kind", [MOE, BAM, BAM_SHARED_KV], ids=["moe", "bam", "bam-shared-kv"])
@pytest.mark.parametrize(("batch", "length"), [(0, 7), (2, 0)])
def test_no_tokens_are_no_special_case(kind, batch, length):
    config = tiny_model(kind).config.model_config()
    block = layers.Block(config.block_config(0)).train()
    x_BLD = torch.randn(batch, length, config.hidden_size, requires_grad=True)
    out = block(x_BLD, layers.rotary_tables(torch.arange(length)[None], config.head_dim))
    assert out.x_BLD.shape == x_BLD.shape
    assert out.balance_loss == 0
    assert out.z_loss == 0
    (out.x_BLD.sum() + out.balance_loss + out.z_loss).backward()
    assert all(not parameter.grad.any() for parameter in block.parameters())


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_layers_can_be_sent_to_another_process(activation):
    """torch.save of a whole module and spawned workers pickle it."""
    config = tiny_model(MOE, hidden_act=activation, moe_layers=[0]).config.model_config()
    for layer in (0, 1):
        block = layers.Block(config.block_config(layer)).eval()
        again = pickle.loads(pickle.dumps(block))
        x_BLD = torch.randn(1, 3, config.hidden_size)
        assert torch.equal(again(x_BLD).x_BLD, block(x_BLD).x_BLD)


def test_layers_alone_keep_their_shape_names():
    config = tiny_model(BAM).config.model_config()
    block = layers.Block(config.block_config(0))
    with checked_shape_names("moe_runtime"):
        rotary = layers.rotary_tables(torch.arange(7)[None], config.head_dim)
        out = block(torch.randn(2, 7, config.hidden_size), rotary)
    assert out.x_BLD.shape == (2, 7, config.hidden_size)
