"""The linear layer is torch.nn.Linear where autocast or a compiler is at work, and unless asked otherwise."""

import pytest
import torch
from close import assert_close_to_exact
from moe_runtime_kernels import _cpu
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_runtime import linear
from moe_runtime.linear import Linear, precise_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


@pytest.fixture
def used(monkeypatch):
    """Shapes that went through oneDNN."""
    shapes = []

    def spy(x, weight, bias):
        shapes.append(tuple(x.shape))
        return _cpu.onednn_product(x, weight, bias)

    monkeypatch.setattr(_cpu, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(linear, "onednn_product", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield shapes
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bias", [False, True])
def test_inference_goes_through_onednn(used, bias):
    layer, x = Linear(24, 16, bias=bias), torch.randn(2, 5, 24)
    with torch.no_grad():
        y = layer(x)
    assert used == [(2, 5, 24)]
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias).detach())


@pytest.mark.parametrize("trained", ["weight", "bias", "x", "all"])
def test_gradients_are_those_of_pytorch(used, trained):
    layer, x = Linear(24, 16), torch.randn(2, 5, 24)
    leaves = {"weight": layer.weight, "bias": layer.bias, "x": x}
    for name, leaf in leaves.items():
        leaf.requires_grad_(trained in (name, "all"))
    grad = torch.randn(2, 16, 5).transpose(1, 2)  # rows apart
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    actual = torch.autograd.grad(layer(x), wanted, grad)
    assert used == [(2, 5, 24)]
    same = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias), wanted, grad)
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves.values()]
    weight, bias, x = exact
    y = nn.functional.linear(x, weight, bias)
    exact = torch.autograd.grad(y, [leaf for leaf in exact if leaf.requires_grad], grad.double())
    for ours, pytorchs, right in zip(actual, same, exact, strict=True):
        assert_close_to_exact("gradient", ours, pytorchs, right)


def test_a_vector_has_its_gradients(used):
    layer, x = Linear(24, 16), torch.randn(24)
    weight, bias = torch.autograd.grad(layer(x).sum(), [layer.weight, layer.bias])
    assert used == [(24,)]
    torch.testing.assert_close(weight, x.expand(16, 24))
    torch.testing.assert_close(bias, torch.ones(16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_bfloat16_is_widened_where_it_has_no_instructions(bias, few, monkeypatch):
    """Several rows of inference; one row, training and what is traced are PyTorch's."""
    shapes = []

    def spy(x_MI, weight_OI, bias_O):
        shapes.append(tuple(x_MI.shape))
        return _cpu.product(x_MI, weight_OI, bias_O)

    monkeypatch.setattr(linear, "product", spy)
    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", True)
    if not few:
        monkeypatch.setattr(_cpu, "MOST_NATIVE_ROWS", {})
    layer, x = Linear(24, 16, bias=bias, dtype=torch.bfloat16), torch.randn(2, 5, 24).bfloat16()
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad():
        assert_close_to_exact("y", layer(x), nn.functional.linear(x, layer.weight, layer.bias), exact)
        assert shapes == [(10, 24)]
        layer(x[:1, :1])
        torch.vmap(layer)(x)
        with FlopCounterMode(display=False) as counter:
            layer(x)
    assert counter.get_total_flops() == 2 * 10 * 24 * 16
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert shapes == [(10, 24)]


def test_autocast_is_pytorchs(used):
    layer, x = Linear(24, 16), torch.randn(3, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert used == []


def test_compiled_layers_leave_the_choice_to_the_compiler(used):
    layer, x = Linear(24, 16), torch.randn(3, 24)
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert used == []


def test_comparisons_can_ask_for_the_precise_product(used):
    layer, x = Linear(24, 16), torch.randn(3, 24)
    with torch.no_grad():
        with precise_products():
            layer(x)
        assert used == []
        layer(x)
    assert used == [(3, 24)]


def test_inference_is_pytorchs_unless_asked_otherwise(used):
    torch.set_float32_matmul_precision("highest")  # PyTorch's default
    layer, x = Linear(24, 16), torch.randn(3, 24)
    with torch.no_grad():
        layer(x)
    assert used == []
