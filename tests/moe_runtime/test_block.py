"""Blocks: what is added to what, in both kinds, with one norm or two, dense or not."""

import pytest
import torch
from tiny_models import assert_equal_up_to_rounding, assert_same_function, perturb, randn

from moe_runtime.attention import rotary_tables
from moe_runtime.block import Block, ParallelBlock
from moe_runtime.config import AttentionConfig, BlockConfig, FeedForwardConfig, RouterConfig
from moe_runtime.norms import LayerNorm, RMSNorm, make_norm

B, L, D = 2, 7, 12
SHAPES = [
    pytest.param({"kind": "sequential"}, id="sequential"),
    pytest.param({"kind": "parallel", "num_norms": 1}, id="parallel-1-norm"),
    pytest.param({"kind": "parallel", "num_norms": 2}, id="parallel-2-norms"),
    pytest.param({"norm_placement": "after", "residual_multiplier": 0.3}, id="norms-after"),
    pytest.param({"norm_placement": "both"}, id="norms-on-both-sides"),
    pytest.param({"residual_multiplier": 0.3}, id="scaled"),
]
NORMS = [
    pytest.param({"norm": "rms_norm"}, id="rms"),
    pytest.param({"norm": "layer_norm"}, id="layer-norm"),
    pytest.param({"norm": "layer_norm", "norm_bias": True}, id="layer-norm-bias"),
    pytest.param({"norm": "offset_rms_norm"}, id="offset-rms"),
]


def block(experts: int = 0, attention_experts: int = 1, gate: str = "renorm", **options) -> Block:
    torch.manual_seed(0)
    k = 1 if gate == "straight_through" else 2
    router = (
        RouterConfig(hidden_size=D, num_experts=experts, experts_per_token=k, gate=gate) if experts else None
    )
    made = Block(
        BlockConfig(
            attention=AttentionConfig(
                hidden_size=D, num_heads=2, num_kv_heads=1, head_dim=6, num_experts=attention_experts
            ),
            feed_forward=FeedForwardConfig(hidden_size=D, intermediate_size=10, router=router),
            **options,
        )
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    perturb(made)
    return made


def rotary(x):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return tuple(table.to(dtype) for table in rotary_tables(torch.arange(L)[None], 6))


def written_out(layer: Block, x_BLD):
    def attention(x_BLD):
        return layer.self_attn(x_BLD, rotary(x_BLD))

    def feed_forward(x_BLD):
        y = layer.mlp(x_BLD)
        return y[0] if isinstance(y, tuple) else y

    first, second = layer.input_layernorm, layer.post_attention_layernorm
    third, fourth = layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
    m = layer.block_config.residual_multiplier
    if layer.block_config.norm_placement == "after":
        h_BLD = x_BLD + m * second(attention(x_BLD))
        return h_BLD + m * fourth(feed_forward(h_BLD))
    if layer.block_config.norm_placement == "both":
        h_BLD = x_BLD + m * second(attention(first(x_BLD)))
        return h_BLD + m * fourth(feed_forward(third(h_BLD)))
    n_BLD = first(x_BLD)
    attended = m * attention(n_BLD)
    if layer.block_config.kind == "sequential":
        h_BLD = x_BLD + attended
        return h_BLD + m * feed_forward(second(h_BLD))
    return x_BLD + attended + feed_forward(n_BLD if second is None else second(x_BLD))


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "moe"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_formula(shape, norm, experts):
    layer = block(experts, **shape, **norm)
    assert_same_function(lambda m, x: m(x, rotary(x)).x_BLD, written_out, layer, randn(B, L, D))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", ["renorm", "straight_through"])
def test_equal_experts_are_the_dense_block(gate, shape):
    dense, mixed = block(**shape), block(4, attention_experts=3, gate=gate, **shape)
    given = dense.state_dict()
    filled = {}
    for name, parameter in mixed.state_dict().items():
        part = name.split(".", 1)[1]
        if part == "experts.gate_up_proj":
            filled[name] = torch.cat([given["mlp.gate_proj.weight"], given["mlp.up_proj.weight"]])
        elif part == "experts.down_proj":
            filled[name] = given["mlp.down_proj.weight"]
        elif part == "o_proj.weight":
            filled[name] = given[name].repeat(1, 3)
        elif "router" in name:
            filled[name] = parameter
        else:  # projections stack their experts; norms are the same
            filled[name] = given[name].repeat(
                parameter.shape[0] // given[name].shape[0], *[1] * (parameter.dim() - 1)
            )
        filled[name] = filled[name].expand_as(parameter)
    mixed.load_state_dict(filled)
    x_BLD = randn(B, L, D)
    with torch.no_grad():
        expected = dense(x_BLD, rotary(x_BLD)).x_BLD
        assert_equal_up_to_rounding("y", mixed.eval()(x_BLD, rotary(x_BLD)).x_BLD, expected)


def test_losses_come_out_of_a_mixture_and_not_of_a_dense_block():
    x_BLD, mask_BL = randn(B, L, D), torch.ones(B, L, dtype=torch.bool)
    mask_BL[1, :3] = False
    assert block()(x_BLD)[1:] == (None, None, None)
    out = block(4, kind="sequential")(x_BLD, token_mask_BL=mask_BL)
    assert out.balance_loss.shape == out.z_loss.shape == ()
    assert out.count_E.sum() == 2 * mask_BL.sum()


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "offset_rms_norm"])
@pytest.mark.parametrize("shape", [(D,), (3, 4)], ids=["layer", "per-head"])
def test_norms_equal_their_formula_in_bfloat16_too(kind, shape):
    norm = make_norm(kind, *shape, eps=1e-3)
    perturb(norm)
    x = randn(B, L, *shape)
    centred = x.double() - (x.double().mean(-1, keepdim=True) if kind == "layer_norm" else 0)
    weight = norm.weight.double() + (kind == "offset_rms_norm")
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(norm(x), expected.float())
    low = norm.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - expected).abs().max() < 0.05


def test_norm_kinds():
    assert isinstance(make_norm("rms_norm", D, eps=1e-6), RMSNorm)
    assert make_norm("layer_norm", D, eps=1e-6).bias is None
    assert isinstance(make_norm("layer_norm", D, eps=1e-6, bias=True), LayerNorm)
    assert not make_norm("offset_rms_norm", D, eps=1e-6).weight.any()


def test_a_parallel_block_is_the_block_of_that_kind_and_no_other():
    plain = block(4, kind="parallel", num_norms=1)
    parallel = ParallelBlock(plain.block_config)
    parallel.load_state_dict(plain.state_dict())
    x_BLD = randn(B, L, D)
    assert torch.equal(parallel(x_BLD, rotary(x_BLD)).x_BLD, plain(x_BLD, rotary(x_BLD)).x_BLD)
    with pytest.raises(ValueError, match=r"kind must be 'parallel' for a ParallelBlock, got 'sequential'"):
        ParallelBlock(block().block_config)
