"""Mixtures of attention: one call equals a loop over attention experts, in both key-value variants."""

import copy
import math

import pytest
import torch
from attention_layers import (
    EVERYTHING,
    KV_VARIANTS,
    A,
    B,
    D,
    H,
    L,
    P,
    by_head,
    gates,
    kv_heads,
    mixture,
    query_heads,
)
from tiny_models import assert_equal_up_to_rounding, assert_same_function, randn
from torch import Tensor, nn

from moe_runtime.attention import MixtureOfAttention, rotary_tables, rotate


def dense_like(layer: MixtureOfAttention, **options) -> MixtureOfAttention:
    c = layer.config
    names = ("bias", "output_bias", "qk_norm", "scale", "logit_cap")
    same = {name: getattr(c, name) for name in names}
    return mixture(kv_heads=c.num_kv_heads, num_experts=1, **(same | options))


def rotary(dtype=torch.float32, width=P):
    return tuple(table.to(dtype) for table in rotary_tables(torch.arange(L)[None], width))


def call(layer: MixtureOfAttention, x_BLD: Tensor) -> Tensor:
    return layer(x_BLD, rotary(torch.promote_types(x_BLD.dtype, torch.float32)))


def expert_parameters(layer: MixtureOfAttention, expert: int) -> dict[str, Tensor]:
    """The parameters of one attention expert, cut from the stack, for a plain attention layer."""
    cut = {}
    for name, parameter in layer.named_parameters():
        if name == "o_proj.bias":
            cut[name] = parameter[expert]
        elif name != "router.weight":
            which = kv_heads if name[0] in "kv" else query_heads
            heads = by_head(name, parameter)[which(layer.config, expert)]
            cut[name] = heads.movedim(0, 1).flatten(1) if name == "o_proj.weight" else heads
            if not name.endswith("norm.weight") and name != "o_proj.weight":
                cut[name] = heads.flatten(0, 1)
    return cut


def single_expert(layer: MixtureOfAttention, expert: int, x_BLD: Tensor) -> Tensor:
    dense = dense_like(layer).to(x_BLD.dtype)
    inputs = (x_BLD, rotary(torch.promote_types(x_BLD.dtype, torch.float32)))
    return torch.func.functional_call(dense, expert_parameters(layer, expert), inputs)


def loop(layer: MixtureOfAttention, x_BLD: Tensor) -> Tensor:
    """The definition: every attention expert by itself, weighted and summed."""
    c = layer.config
    gate_TA = gates(layer.router, x_BLD.flatten(0, 1), c.top_k, c.renormalise_top_k)
    gate_BLA = gate_TA.view(*x_BLD.shape[:2], A)
    return sum(gate_BLA[..., [a]].to(x_BLD.dtype) * single_expert(layer, a, x_BLD) for a in range(A))


def copy_to_all_experts(dense: MixtureOfAttention, layer: MixtureOfAttention) -> None:
    given = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "o_proj.bias":
                parameter.copy_(given[name].expand_as(parameter))
            elif name != "router.weight":
                which = kv_heads if name[0] in "kv" else query_heads
                for expert in range(A):
                    by_head(name, parameter)[which(layer.config, expert)] = by_head(name, given[name])


class TestPlainAttention:
    """One attention expert is ordinary attention, written out head by head."""

    @staticmethod
    def written_out(layer: MixtureOfAttention, x_BLD: Tensor) -> Tensor:
        c = layer.config
        sides = {}
        for name in "qkv":
            x = getattr(layer, f"{name}_proj")(x_BLD).unflatten(-1, (-1, P))
            if c.qk_norm is not None and name in "qk":
                x = x - x.mean(-1, keepdim=True) if c.qk_norm == "layer_norm" else x
                over = (-2, -1) if c.qk_norm == "joint_rms_norm" else -1
                rms = (x.square().mean(over, keepdim=True) + c.norm_eps).sqrt()
                weight = getattr(layer, f"{name}_norm").weight
                x = x / rms * (1 + weight if c.qk_norm == "offset_rms_norm" else weight)
            sides[name] = x if name == "v" else rotate(x, rotary(torch.promote_types(x.dtype, torch.float32)))
        age_LL = torch.arange(L)[:, None] - torch.arange(L)
        hidden_LL = (age_LL < 0) | (age_LL >= (c.sliding_window or L))
        outputs = []
        for head in range(H):
            kv_head = head * c.num_kv_heads // H
            scale = 1 / math.sqrt(P) if c.scale is None else c.scale
            score_BLL = sides["q"][:, :, head] @ sides["k"][:, :, kv_head].transpose(1, 2) * scale
            if c.logit_cap is not None:
                score_BLL = (score_BLL / c.logit_cap).tanh() * c.logit_cap
            weight_BLL = score_BLL.masked_fill(hidden_LL, -math.inf).softmax(-1)
            outputs.append(weight_BLL @ sides["v"][:, :, kv_head])
        return layer.o_proj(torch.cat(outputs, -1))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"kv_heads": 1, "bias": True, "output_bias": True},
            {"qk_norm": "rms_norm"},
            {"qk_norm": "layer_norm"},
            {"qk_norm": "offset_rms_norm", "scale": 0.9},
            {"qk_norm": "joint_rms_norm"},
            {"logit_cap": 0.4, "kv_heads": 1},
            {"logit_cap": 0.4, "sliding_window": 3, "scale": 0.9},
            {"sliding_window": 3},
            {"sliding_window": 3 * L},
        ],
        ids=str,
    )
    def test_equals_the_definition(self, options):
        layer = mixture(num_experts=1, **options)
        assert_same_function(call, self.written_out, layer, randn(B, L, D))

    def test_has_no_router(self):
        assert not any("router" in name for name, _ in mixture(num_experts=1).named_parameters())


class TestRotary:
    def test_tables_are_angles_of_positions(self):
        cos, sin = rotary_tables(torch.tensor([[0, 1, 5]]), 4, theta=100.0)
        angle = torch.tensor([[[0.0, 0.0], [1.0, 0.1], [5.0, 0.5]]])
        torch.testing.assert_close(cos, angle.cos())
        torch.testing.assert_close(sin, angle.sin())
        with pytest.raises(ValueError, match="rotated_width must be even, got 5"):
            rotary_tables(torch.arange(3), 5)

    @pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
    @pytest.mark.parametrize("width", [P, 4], ids=["full", "partial"])
    def test_pairs_turn_by_the_angle(self, width, interleaved):
        x, (cos, sin) = randn(B, L, H, P), rotary(width=width)
        first = list(range(0, width, 2)) if interleaved else list(range(width // 2))
        second = [r + 1 for r in first] if interleaved else [r + width // 2 for r in first]
        expected = x.clone()
        for pair, (r, s) in enumerate(zip(first, second, strict=True)):
            turn = torch.complex(cos[..., pair], sin[..., pair])[:, :, None]
            turned = torch.complex(x[..., r], x[..., s]) * turn
            expected[..., r], expected[..., s] = turned.real, turned.imag
        torch.testing.assert_close(rotate(x, (cos, sin), interleaved), expected)

    @pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
    def test_low_precision_heads_turn_in_float32(self, interleaved):
        x = randn(B, L, H, P, dtype=torch.bfloat16)
        exact = rotate(x.float(), rotary(), interleaved)
        assert torch.equal(rotate(x, rotary(), interleaved), exact.bfloat16())

    # raised inside torch, where Dynamo makes an instance of every autograd.Function it meets
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
    def test_the_gradient_turns_back(self, interleaved):
        x, tables = randn(B, L, H, P, dtype=torch.float64), rotary(torch.float64, width=4)
        x.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: rotate(x, tables, interleaved), x)
        assert torch.autograd.gradgradcheck(lambda x: rotate(x, tables, interleaved), x)
        compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")(x, tables, interleaved)
        torch.testing.assert_close(compiled, rotate(x, tables, interleaved))
        compiled.sum().backward()
        torch.testing.assert_close(x.grad, torch.autograd.grad(rotate(x, tables, interleaved).sum(), x)[0])

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("width", [4, P])
    def test_without_autograd_heads_turn_the_same_way(self, width):
        x, tables = randn(B, L, H, P, dtype=torch.bfloat16), rotary(width=width)
        expected = rotate(x, tables)
        with torch.no_grad():
            actual = rotate(x, tables)
            compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")(x, tables)
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
        assert torch.equal(compiled, expected)

    def test_scores_depend_on_distance_only(self):
        layer, x_BLD = mixture(num_experts=1), randn(B, L, D)
        shifted = rotary_tables(torch.arange(100, 100 + L)[None], P)
        torch.testing.assert_close(layer(x_BLD, shifted), call(layer, x_BLD), rtol=1e-4, atol=1e-4)
        assert (layer(x_BLD) - call(layer, x_BLD)).abs().max() > 0.01


JOINT = {"qk_norm": "joint_rms_norm", "scale": 0.9, "logit_cap": 0.7}


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {"top_k": 2}, JOINT], ids=["plain", "biases-norms", "top-2", "joint-norms"]
)
@pytest.mark.parametrize(("kv", "heads"), KV_VARIANTS)
def test_one_call_equals_the_loop_over_experts(kv, heads, options):
    assert_same_function(call, loop, mixture(kv, heads, **options), randn(B, L, D))


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "biases-norms"])
@pytest.mark.parametrize(("kv", "heads"), KV_VARIANTS)
def test_equal_experts_are_dense_attention(kv, heads, options):
    layer, x_BLD = mixture(kv, heads, **options), randn(B, L, D)
    dense = dense_like(layer)
    copy_to_all_experts(dense, layer)
    with torch.no_grad():
        assert_equal_up_to_rounding("y", call(layer, x_BLD), call(dense, x_BLD))


@pytest.mark.parametrize(("kv", "heads"), KV_VARIANTS)
@pytest.mark.parametrize("expert", range(A))
def test_one_hot_gate_is_that_expert_alone(expert, kv, heads, monkeypatch):
    layer, x_BLD = mixture(kv, heads), randn(B, L, D)
    logits_TA = torch.full((B * L, A), -math.inf)
    logits_TA[:, expert] = 0.0
    monkeypatch.setattr(layer.router, "forward", lambda x: logits_TA.softmax(-1))
    with torch.no_grad():
        assert_equal_up_to_rounding("y", call(layer, x_BLD), single_expert(layer, expert, x_BLD))


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_identical_own_keys_and_values_equal_shared_ones(heads):
    shared, own = mixture("shared", heads, bias=True), mixture("expert", heads, bias=True)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            given = shared.get_parameter(name)
            if name == "router.weight":
                parameter.copy_(given)
                continue
            which = kv_heads if name[0] in "kv" else query_heads
            for expert in range(A):
                mine, theirs = (which(layer.config, expert) for layer in (own, shared))
                by_head(name, parameter)[mine] = by_head(name, given)[theirs]
        x_BLD = randn(B, L, D)
        assert_equal_up_to_rounding("y", call(own, x_BLD), call(shared, x_BLD))


def test_naive_head_order_would_read_other_keys():
    """With fewer key-value heads than heads, [expert][head] is wrong by as much as the output itself."""
    layer, x_BLD = mixture("shared", 2), randn(B, L, D)
    expected = call(layer, x_BLD)
    naive = copy.deepcopy(layer)
    with torch.no_grad():
        for name in ("q_proj.weight", "o_proj.weight"):
            for expert in range(A):
                stored = by_head(name, layer.get_parameter(name))[query_heads(layer.config, expert)]
                by_head(name, naive.get_parameter(name))[expert * H : (expert + 1) * H] = stored
    assert (call(naive, x_BLD) - expected).square().mean() > 0.1 * expected.square().mean()


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_gradients_by_finite_differences(kv):
    layer, x_BLD = mixture(kv).double(), randn(1, 4, D, dtype=torch.float64).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def of(x_BLD, *values):
        tables = tuple(table[:, :4].double() for table in rotary())
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x_BLD, tables))

    assert torch.autograd.gradcheck(of, (x_BLD, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    ("kv", "stored"), [("expert", (A * H, A * 2)), ("shared", (A * H, 2))], ids=["expert-kv", "shared-kv"]
)
def test_attention_itself_can_be_replaced(kv, stored):
    seen = {}

    class Recording(nn.Module):
        def forward(self, query, key, value, **arguments):
            seen.update(query=query.shape, key=key.shape, value=value.shape, **arguments)
            return query.transpose(1, 2), None

    layer = MixtureOfAttention(mixture(kv).config, attend=Recording())
    layer(randn(B, L, D), layer_cache="mine")
    heads, kv_heads_stored = stored
    assert seen["query"] == (B, heads, L, P)
    assert seen["key"] == seen["value"] == (B, kv_heads_stored, L, P)
    assert seen["layer_cache"] == "mine"


def test_bfloat16_autocast():
    layer, x_BLD = mixture("shared", **EVERYTHING), randn(B, L, D)
    with torch.autocast("cpu"):
        y_BLD = call(layer, x_BLD)
    plain = call(layer, x_BLD)
    assert 0 < (y_BLD - plain).abs().max() / plain.abs().max() < 3e-2
    y_BLD.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
