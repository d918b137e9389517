"""Experts by megablocks: a fake of its product, with the real signature and demands, gives the same layer.

The demands are those of grouped_gemm's CUDA code, but for the device: it takes bfloat16 in one piece, and the
rows of each expert on the host as int64. megablocks 0.10.0 hands the function on.
"""

import copy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import expert_layers
import pytest
import torch
from inputs import Routing, assert_matches, choose
from tiny_models import tiny_model, tokens

from moe_runtime import megablocks_backend
from moe_runtime.config import FeedForwardConfig, RouterConfig
from moe_runtime.experts import Experts
from moe_runtime.feed_forward import MoEFeedForward
from moe_runtime.hf import MoeRuntimeForCausalLM

D, F_ = expert_layers.D, expert_layers.F
LAYERS = Path(__file__).parents[2] / "docs" / "layers.md"


class GroupedGemm(torch.autograd.Function):
    """As grouped_gemm.ops has it: both gradients are grouped products too."""

    @staticmethod
    def forward(ctx, a, b, batch_sizes, trans_b):
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_b = trans_b
        return product(a, b, batch_sizes, trans_b)

    @staticmethod
    def backward(ctx, grad):
        a, b, batch_sizes = ctx.saved_tensors
        grad = grad.contiguous()
        left, right = (grad, a) if ctx.trans_b else (a, grad)
        pairs = zip(left.split(batch_sizes.tolist()), right.split(batch_sizes.tolist()), strict=True)
        dw = torch.stack([one.t() @ other for one, other in pairs])
        return product(grad, b, batch_sizes, not ctx.trans_b), dw, None, None


def product(a, b, batch_sizes, trans_b):
    assert a.dtype == b.dtype == torch.bfloat16
    assert (a.dim(), b.dim()) == (2, 3)
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.device.type == "cpu"
    assert batch_sizes.shape == b.shape[:1]
    assert batch_sizes.sum() == len(a)
    rows = a.split(batch_sizes.tolist())
    return torch.cat([x @ (w.t() if trans_b else w) for x, w in zip(rows, b.unbind(0), strict=True)])


def gmm(a, b, batch_sizes, trans_b=False):
    return GroupedGemm.apply(a, b, batch_sizes, trans_b)


def install(monkeypatch, ops):
    for name in ("megablocks", "megablocks.grouped_gemm_util"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.ops = ops
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(megablocks_backend, "DEVICES", ("cpu", "cuda"))


@pytest.fixture
def megablocks(monkeypatch):
    install(monkeypatch, SimpleNamespace(gmm=gmm))


def config(num_experts=4, K=2, **options) -> FeedForwardConfig:
    router = RouterConfig(hidden_size=D, num_experts=num_experts, experts_per_token=K)
    options = {"intermediate_size": F_, "router": router, "experts_backend": "megablocks"} | options
    return FeedForwardConfig(hidden_size=D, **options)


def layer_of(routing, expert_TK, **options):
    """The layer as a function of its inputs and weights."""

    def fn(x, gate_up, down, weight, residual=None):
        with torch.device("meta"):
            layer = Experts(config(routing.E, routing.K, **options)).eval()
        weights = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(layer, weights, (x, expert_TK, weight, residual))

    return fn


def assert_is_the_layer(routing, gated=True, activation="silu", optional=()):
    expert_TK = choose(routing)

    def make(draw):
        return expert_layers.make_inputs(routing, torch.bfloat16, gated, optional, draw)

    def definition(x, gate_up, down, weight, residual=None):
        return expert_layers.dense_experts(expert_TK, activation, x, gate_up, down, weight, residual=residual)

    fn = layer_of(routing, expert_TK, gated=gated, activation=activation)
    assert_matches(fn, definition, make, routing.T)


@pytest.mark.parametrize(
    "routing",
    [
        pytest.param(Routing(40, 2, 6, "empty"), id="an-empty-expert"),
        pytest.param(Routing(33, 1, 4, "one"), id="all-tokens-on-one-expert"),
        pytest.param(Routing(41, 3, 6, "sentinels"), id="dropped-choices"),
    ],
)
def test_equals_the_definition_with_all_gradients(routing, megablocks):
    assert_is_the_layer(routing)


@pytest.mark.parametrize(("gated", "activation"), [(True, "gelu"), (False, "relu2")])
def test_other_activations_and_the_residual(gated, activation, megablocks):
    assert_is_the_layer(Routing(40, 2, 6, "empty"), gated, activation, ("residual",))


def test_no_tokens(megablocks):
    layer = MoEFeedForward(config()).bfloat16()
    y, routing = layer(torch.zeros(0, D, dtype=torch.bfloat16))
    assert y.shape == (0, D)
    assert routing.count_E.tolist() == [0] * 4


def test_dropout_falls_on_hidden_activations_in_training_only(megablocks):
    torch.manual_seed(0)
    layer = Experts(
        config(gated=False, activation="relu", intermediate_size=D, expert_dropout=0.25)
    ).bfloat16()
    eye = torch.eye(D, dtype=torch.bfloat16).expand(4, D, D)
    layer.load_state_dict({"gate_up_proj": eye, "down_proj": eye})
    x_TD = torch.ones(200, D, dtype=torch.bfloat16)
    inputs = x_TD, torch.arange(200, dtype=torch.int32)[:, None] % 4, torch.ones(200, 1)
    assert torch.equal(layer.eval()(*inputs), x_TD)
    dropped_TD = layer.train()(*inputs) == 0
    assert dropped_TD.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_a_checkpoint_is_read_with_either_backend(megablocks, tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    models = [
        MoeRuntimeForCausalLM.from_pretrained(tmp_path, experts_backend=backend)
        for backend in ("megablocks", "moe_runtime")
    ]
    assert [layer.mlp.experts.config.experts_backend for layer in models[0].model.layers] == [
        "megablocks"
    ] * 2
    exact = copy.deepcopy(models[1]).double()(tokens(2, 9)).logits
    error, allowed = ((model(tokens(2, 9)).logits - exact).square().mean().sqrt() for model in models)
    assert error <= 2 * allowed


# --- what cannot run is refused ---


@pytest.mark.parametrize("found", [None, ModuleType("megablocks")], ids=["nothing", "stub"])
def test_megablocks_that_is_not_installed(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "megablocks", found)
    message = (
        "experts_backend 'megablocks' needs megablocks, which is not installed; as it pins torch 2.7.0, .*: "
        "pip install --no-build-isolation --no-deps megablocks=="
    )
    with pytest.raises(ModuleNotFoundError, match=message):
        Experts(config())
    install(monkeypatch, None)
    with pytest.raises(
        ModuleNotFoundError, match="needs the grouped GEMM of megablocks, which is not installed"
    ):
        Experts(config())


def test_the_page_on_layers_says_how_it_is_installed():
    """No extra does: pip finds no megablocks for the torch of this project."""
    assert f"`{megablocks_backend.INSTALL}`" in LAYERS.read_text(encoding="utf-8")


def test_tensors_that_megablocks_does_not_take(megablocks, monkeypatch):
    layer, inputs = Experts(config()), (torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2))
    with pytest.raises(ValueError, match="x must be bfloat16 with experts_backend 'megablocks', got float32"):
        layer(torch.ones(3, D), *inputs)
    with pytest.raises(ValueError, match=r"gate_up_proj must be bfloat16 .*, got float32"):
        layer(torch.ones(3, D, dtype=torch.bfloat16), *inputs)
    monkeypatch.setattr(megablocks_backend, "DEVICES", ("cuda",))
    with pytest.raises(ValueError, match=r"x must be on a CUDA device with .* 'megablocks', got cpu; use"):
        layer.bfloat16()(torch.ones(3, D, dtype=torch.bfloat16), *inputs)


def test_adapters_are_refused(megablocks):
    layer = Experts(config()).bfloat16()
    layer.expert_lora = torch.nn.Identity()
    x_TD = torch.ones(3, D, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="experts_backend must be 'moe_runtime' with expert_lora"):
        layer(x_TD, torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": True}, "bias must be False with experts_backend 'megablocks', .*, got True"),
        ({"recompute_experts": True}, "recompute_experts must be False with experts_backend 'megablocks'"),
        (
            {"experts_backend": "megablock"},
            "experts_backend must be one of 'moe_runtime', 'megablocks', got 'megablock'",
        ),
    ],
)
def test_options_that_megablocks_has_not(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
