"""Mixtures of attention that compute each token's K experts only: equal to all experts with gates of zero."""

import copy

import pytest
import torch
from attention_layers import EVERYTHING, KV_VARIANTS, A, B, D, H, L, P, by_head, gates, mixture, query_heads
from inputs import assert_compiles_once, assert_matches
from interpreter import interpreted, needs_interpreter
from moe_runtime_kernels import make_plan
from tiny_models import assert_equal_up_to_rounding, assert_same_function, outcome, randn
from torch import Tensor, nn

from moe_runtime import attention
from moe_runtime.attention import MixtureOfAttention, MixtureProjection, rotary_tables
from moe_runtime.config import AttentionConfig
from moe_runtime.linear import Linear
from moe_runtime.norms import make_norm
from moe_runtime.routers import SoftRouter

OPTIONS = {
    "top-1": {"top_k": 1},
    "top-2": {"top_k": 2},
    "renormalised": {"top_k": 2, "renormalise_top_k": True},
    "biases-norms": {"top_k": 2, **EVERYTHING},
    "layer-norms": {"top_k": 1, "qk_norm": "layer_norm"},
    "joint-norms": {"top_k": 2, "qk_norm": "joint_rms_norm"},
    "interleaved": {"top_k": 2, "rope_interleaved": True},
    "window": {"top_k": 2, "sliding_window": 3},
}
ROTATED = {"rotated": P, "partly-rotated": 4, "not-rotated": 0}


def tables(x_BLD: Tensor, width: int = P) -> tuple[Tensor, Tensor] | None:
    dtype = torch.promote_types(x_BLD.dtype, torch.float32)
    position_BL = torch.arange(x_BLD.shape[1])[None]
    return tuple(table.to(dtype) for table in rotary_tables(position_BL, width)) if width else None


class ZeroedGates(nn.Module):
    """The router of the reference: gates of all experts, zero for those that a token did not choose."""

    def __init__(self, config: AttentionConfig, weight: Tensor) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(weight.detach())

    def forward(self, x_TD: Tensor) -> Tensor:
        return gates(self, x_TD, self.config.top_k, self.config.renormalise_top_k)


def all_experts(layer: MixtureOfAttention, x_BLD: Tensor, width: int = P) -> Tensor:
    """The definition: the soft mixture of the same parameters, all experts computed, with zeroed gates."""
    options = {name: getattr(layer.config, name) for name in ("bias", "output_bias", "qk_norm")}
    options |= {name: getattr(layer.config, name) for name in ("rope_interleaved", "sliding_window")}
    soft = mixture(layer.config.kv, layer.config.num_kv_heads, **options).to(x_BLD.dtype)
    soft.router = ZeroedGates(layer.config, layer.router.weight)
    given = dict(layer.named_parameters())
    return torch.func.functional_call(soft, given, (x_BLD, tables(x_BLD, width)))


def chosen_experts(layer: MixtureOfAttention, x_BLD: Tensor, width: int = P) -> Tensor:
    return layer(x_BLD, tables(x_BLD, width))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("kv", "heads"), KV_VARIANTS)
def test_equals_all_experts_with_gates_of_zero(kv, heads, options):
    assert_same_function(chosen_experts, all_experts, mixture(kv, heads, **options), randn(B, L, D))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("kv", "heads"), KV_VARIANTS)
def test_a_few_tokens_without_a_gradient_pass_all_experts(kv, heads, options, monkeypatch):
    layer, x_BLD = mixture(kv, heads, **options), randn(1, L, D)
    expected = all_experts(layer, x_BLD)
    planned = []
    monkeypatch.setattr(attention, "make_plan", lambda *inputs: planned.append(inputs) or make_plan(*inputs))
    with torch.no_grad():
        assert_equal_up_to_rounding("y", chosen_experts(layer, x_BLD), expected)
        assert not planned
        monkeypatch.setattr(attention, "FEW_TOKENS", L - 1)
        assert_equal_up_to_rounding("y", chosen_experts(layer, x_BLD), expected)
        assert planned


@pytest.mark.parametrize("width", ROTATED.values(), ids=ROTATED)
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_queries_turn_by_their_token_s_position(kv, width):
    layer = mixture(kv, top_k=2, rope_interleaved=width == 4)
    assert_same_function(
        lambda layer, x: chosen_experts(layer, x, width),
        lambda layer, x: all_experts(layer, x, width),
        layer,
        randn(B, L, D),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_rounds_no_worse_than_all_experts_do(kv, dtype):
    layer = mixture(kv, top_k=2, **EVERYTHING)
    names = [name for name, _ in layer.named_parameters()]

    def through(call):
        def fn(x, **parameters):
            module = mixture(kv, top_k=2, **EVERYTHING).to(x.dtype)
            values = {name: parameters[name.replace(".", "__")] for name in names}
            return torch.func.functional_call(
                Call(module, call), {f"layer.{n}": v for n, v in values.items()}, x
            )

        return fn

    def make(draw):
        parameters = {
            name.replace(".", "__"): randn(*value.shape, seed=10 * draw + number).mul(0.5).to(dtype)
            for number, (name, value) in enumerate(layer.named_parameters())
        }
        x_BLD = randn(B, L, D, seed=1000 + draw).to(dtype)
        return parameters | {"x": x_BLD}, randn(B, L, D, seed=2000 + draw).to(dtype)

    assert_matches(through(chosen_experts), through(all_experts), make, B)


class Call(nn.Module):
    """A function of a module and an input as a module, for `functional_call`."""

    def __init__(self, layer: nn.Module, call) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norms_of_many_tokens_sum_their_gradients_in_float32(kind):
    """In bfloat16 the sum of so many would stop at a tenth of it."""
    norm, which = make_norm(kind, 8, P, eps=1e-6, bias=kind == "layer_norm"), torch.arange(40_000) % 8
    x, grad = randn(40_000, P), randn(40_000, P, seed=1).abs()

    def gradients(dtype):
        made = copy.deepcopy(norm).to(dtype)
        made(x.bfloat16().to(dtype), which).backward(grad.bfloat16().to(dtype))
        return [parameter.grad for parameter in made.parameters()]

    for rounded, exact in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradients_by_finite_differences(kv, renormalise):
    layer = mixture(kv, top_k=2, renormalise_top_k=renormalise, **EVERYTHING).double()
    x_BLD = randn(1, 4, D, dtype=torch.float64).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def of(x_BLD, *values):
        inputs = (x_BLD, tables(x_BLD))
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), inputs)

    assert torch.autograd.gradcheck(of, (x_BLD, *parameters), fast_mode=True)


@pytest.mark.parametrize(("kv", "heads"), KV_VARIANTS)
def test_experts_that_nobody_chose_get_gradients_of_exactly_zero(kv, heads, monkeypatch):
    layer = mixture(kv, heads, top_k=2, **EVERYTHING)
    expert_TK = torch.tensor([[2, 0], [0, 2]], dtype=torch.int32).repeat(B * L // 2, 1)
    monkeypatch.setattr(layer.router, "forward", lambda x: (torch.rand(B * L, 2), expert_TK))
    layer(randn(B, L, D), tables(randn(B, L, D))).square().sum().backward()
    for name in ("q_proj.weight", "q_proj.bias", "q_norm.weight", "o_proj.weight"):
        grad = by_head(name, layer.get_parameter(name).grad)
        assert not grad[query_heads(layer.config, 1)].any(), name
        for expert in (0, 2):
            assert grad[query_heads(layer.config, expert)].any(), name
    assert layer.o_proj.bias.grad.any(1).tolist() == [True, False, True]


def test_checkpoints_are_those_of_the_soft_mixture():
    for kv in ("expert", "shared"):
        sparse, soft = mixture(kv, top_k=1, **EVERYTHING), mixture(kv, **EVERYTHING)
        shapes = {name: value.shape for name, value in sparse.state_dict().items()}
        assert shapes == {name: value.shape for name, value in soft.state_dict().items()}


@pytest.mark.parametrize("renormalise", [False, True])
def test_all_experts_stay_one_soft_call(renormalise):
    layer, soft = mixture(top_k=A, renormalise_top_k=renormalise), mixture()
    assert (type(layer.q_proj), type(layer.router), type(layer.o_proj)) == (
        Linear,
        SoftRouter,
        MixtureProjection,
    )
    assert torch.equal(layer(randn(B, L, D)), soft(randn(B, L, D)))


@pytest.mark.parametrize(("kv", "heads"), [("expert", A * H), ("shared", 2 * H)])
def test_heads_of_the_attention_call(kv, heads):
    layer, seen = mixture(kv, top_k=2), []
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append([x.shape for x in inputs]))
    layer(randn(B, L, D))
    kv_heads = layer.config.total_kv_heads
    assert seen == [[(B, heads, L, P), (B, kv_heads, L, P), (B, kv_heads, L, P)]]
    assert layer.config.attended_heads == heads


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_a_token_s_other_experts_do_not_matter(kv, monkeypatch):
    layer, x_BLD = mixture(kv, top_k=1, **EVERYTHING), randn(B, L, D)
    expert_TK = torch.tensor([[0], [2]], dtype=torch.int32).repeat(B * L // 2, 1)
    monkeypatch.setattr(layer.router, "forward", lambda x: (torch.ones(B * L, 1), expert_TK))
    expected = layer(x_BLD)
    with torch.no_grad():
        for name in ("q_proj.weight", "q_proj.bias", "q_norm.weight", "o_proj.weight"):
            by_head(name, layer.get_parameter(name))[query_heads(layer.config, 1)] = torch.nan
        layer.o_proj.bias[1] = torch.nan
    assert torch.equal(layer(x_BLD), expected)


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize(("batch", "length"), [(0, 7), (2, 0), (3, 1)])
def test_no_tokens_and_one_token(batch, length, kv):
    layer, x_BLD = mixture(kv, top_k=2, **EVERYTHING), randn(batch, length, D).requires_grad_()
    y_BLD = chosen_experts(layer, x_BLD)
    assert y_BLD.shape == x_BLD.shape
    y_BLD.sum().backward()
    if batch * length == 0:
        assert all(not parameter.grad.any() for parameter in layer.parameters())
    else:
        assert_equal_up_to_rounding("y", y_BLD, all_experts(layer, x_BLD))


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_equal_input_gives_equal_bits(kv):
    layer, x_BLD = mixture(kv, top_k=2, **EVERYTHING), randn(B, L, D)
    first, second = (outcome(chosen_experts, layer, x_BLD) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@needs_interpreter
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_runs_on_the_kernels(kv):
    layer, x_BLD = mixture(kv, top_k=2, **EVERYTHING), randn(B, L, D)
    with interpreted():
        on_kernels = outcome(chosen_experts, layer, x_BLD)
    for name, value in outcome(all_experts, layer, x_BLD).items():
        assert_equal_up_to_rounding(name, on_kernels[name], value)


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_compiles_in_one_graph(kv):
    layer = mixture(kv, top_k=2, **EVERYTHING)

    def make(T):
        return {"x": randn(1, T, D, seed=T)}, randn(1, T, D, seed=100 + T)

    assert_compiles_once(lambda x: layer(x, tables(x)), make, assert_equal_up_to_rounding)


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_bfloat16_autocast(kv):
    layer, x_BLD = mixture(kv, top_k=2, **EVERYTHING), randn(B, L, D)
    with torch.autocast("cpu"):
        y_BLD = chosen_experts(layer, x_BLD)
    assert y_BLD.dtype == torch.bfloat16
    plain = chosen_experts(layer, x_BLD)
    assert 0 < (y_BLD - plain).abs().max() / plain.abs().max() < 3e-2
    y_BLD.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
