"""The linear layer is torch.nn.Linear where a compiler is at work, and unless its products can be faster."""

import warnings

import pytest
import torch
from close import assert_close_to_exact
from moe_runtime_kernels import _cpu
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_runtime.linear import Linear, precise_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


@pytest.fixture
def used(monkeypatch):
    """Shapes that went through oneDNN."""
    shapes = []

    def spy(x, weight, bias=None):
        if (len(weight), weight.shape[1]) == (16, 24):  # no product of a gradient
            shapes.append(tuple(x.shape))
        return through_onednn(x, weight, bias)

    through_onednn = _cpu.onednn_product
    monkeypatch.setattr(_cpu, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(_cpu, "MOST_NATIVE_ROWS", {})
    monkeypatch.setattr(_cpu, "onednn_product", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield shapes
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bias", [False, True])
def test_inference_goes_through_onednn(used, bias):
    layer, x = Linear(24, 16, bias=bias), torch.randn(2, 5, 24)
    with torch.no_grad():
        y = layer(x)
    assert used == [(10, 24)]
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
    assert used == [(10, 24)]
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
    assert used == [(1, 24)]
    torch.testing.assert_close(weight, x.expand(16, 24))
    torch.testing.assert_close(bias, torch.ones(16))


@pytest.fixture
def widened(monkeypatch):
    """Shapes of the rows of products in float32, as on a processor without instructions for bfloat16."""
    shapes = []

    def spy(x_MI, weight_OI, bias_O=None, out_MO=None):
        shapes.append(tuple(x_MI.shape))
        return in_float32(x_MI, weight_OI, bias_O, out_MO)

    in_float32 = _cpu.widened_product
    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", True)
    monkeypatch.setattr(_cpu, "MOST_NATIVE_ROWS", {})
    monkeypatch.setattr(_cpu, "widened_product", spy)
    return shapes


def exact_of(layer, x, grad):
    """The output and all gradients in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, *layer.parameters())]
    y = nn.functional.linear(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad.double())


@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_widened_where_it_has_no_instructions(bias, widened):
    """Several rows; one row and what is traced are PyTorch's."""
    layer, x = Linear(24, 16, bias=bias, dtype=torch.bfloat16), torch.randn(2, 5, 24).bfloat16()
    grad = torch.randn(2, 16, 5).transpose(1, 2).bfloat16()  # rows apart
    leaves = [x.requires_grad_(), *layer.parameters()]
    y, same = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    gradients, sames = (torch.autograd.grad(out, leaves, grad) for out in (y, same))
    assert widened == [(10, 24), (10, 16), (16, 10)]
    for actual, pytorchs, right in zip(
        (y, *gradients), (same, *sames), exact_of(layer, x, grad), strict=True
    ):
        assert_close_to_exact("", actual, pytorchs, right)
    widened.clear()
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        assert widened == [(10, 24)]
        layer(x[:1, :1])
        torch.vmap(layer)(x)
        with FlopCounterMode(display=False) as counter:
            layer(x)
    assert counter.get_total_flops() == 2 * 10 * 24 * 16
    assert widened == [(10, 24)]


def test_few_rows_are_widened_as_they_are_multiplied(widened, monkeypatch):
    monkeypatch.setattr(_cpu, "MOST_NATIVE_ROWS", {torch.bfloat16: 8})
    if not _cpu.native_takes(torch.ones(2, 24).bfloat16(), torch.ones(16, 24).bfloat16()):
        pytest.skip("no compiler")
    layer, x = Linear(24, 16, dtype=torch.bfloat16), torch.randn(8, 24).bfloat16()
    grad = torch.randn(8, 16).bfloat16()
    y, same = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert widened == []
    assert_close_to_exact("y", y, same, exact_of(layer, x, grad)[0])
    y.backward(grad)
    assert widened == [(16, 8)], "the gradient of the rows is not requested, that of the matrix has 16"


def test_autocast_rounds_nothing_that_is_widened(widened):
    """Float32 weights and their gradients; the output is bfloat16, as autocast has it."""
    torch.manual_seed(0)
    layer, x, grad = Linear(24, 16), torch.randn(3, 24, requires_grad=True), torch.randn(3, 16).bfloat16()
    leaves = [x, *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        y, same = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert y.dtype == torch.bfloat16
    actual, pytorchs = ((out, *torch.autograd.grad(out, leaves, grad)) for out in (y, same))
    exact = exact_of(layer, x.bfloat16(), grad)
    for ours, theirs, right in zip(actual, pytorchs, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - right).norm() <= (theirs - right).norm()
    assert not torch.equal(actual[2], actual[2].bfloat16().float())
    assert widened == [(3, 24), (3, 16), (16, 3)]


def autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 24), (2, 3, 24)])
def test_outputs_can_be_changed_in_place(dtype, shape, widened):
    layer, x = Linear(24, 16, dtype=dtype), torch.randn(shape, dtype=dtype)
    y = autocast(layer, x)
    kept = y.detach().clone()
    y += 1
    assert torch.equal(y, kept + 1)
    y.sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert len(widened) == 2


def test_outputs_through_onednn_can_be_changed_in_place(used):
    Linear(24, 16)(torch.randn(2, 3, 24)).add_(1).sum().backward()
    assert used == [(6, 24)]


def test_backward_under_a_counter_of_flops_alone(widened):
    layer, x = Linear(24, 16), torch.randn(4, 24, requires_grad=True)
    leaves = [x, *layer.parameters()]
    actual = torch.autograd.grad(autocast(layer, x).sum(), leaves)
    y = autocast(layer, x)
    with FlopCounterMode(display=False) as counter:
        counted = torch.autograd.grad(y.sum(), leaves)
    assert counter.get_total_flops() == 2 * 2 * 4 * 24 * 16
    for one, other in zip(actual, counted, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    flipped = torch.autograd.grad(autocast(layer, x), leaves, torch._neg_view(torch.ones(4, 16).bfloat16()))
    for one, other in zip(actual, flipped, strict=True):
        assert torch.equal(one, -other)


def test_backward_under_autocast_has_the_same_bits(widened):
    layer, x = Linear(24, 16), torch.randn(4, 24, requires_grad=True)
    leaves = [x, *layer.parameters()]
    outside = torch.autograd.grad(autocast(layer, x).sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(layer(x).sum(), leaves)
    assert all(map(torch.equal, outside, inside))


@pytest.mark.parametrize(
    ("trained", "expected"),
    [("x", [(16, 24)]), ("weight", [(4, 24)]), ("bias", []), ("all", [(4, 24), (16, 24)])],
)
def test_only_what_gradients_need_is_kept(trained, expected, widened):
    layer, x = Linear(24, 16), torch.randn(4, 24)
    for name, leaf in {"x": x, "weight": layer.weight, "bias": layer.bias}.items():
        leaf.requires_grad_(trained in (name, "all"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = autocast(layer, x)
    assert kept == expected
    y.sum().backward()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("wide", ["weight", "bias"])
def test_other_dtypes_are_refused_without_autocast(rows, wide, widened):
    layer = Linear(24, 16, dtype=torch.bfloat16)
    setattr(layer, wide, nn.Parameter(getattr(layer, wide).float()))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(rows, 24).bfloat16())


def test_batches_of_gradients_are_pytorchs(widened):
    layer, x = Linear(24, 16), torch.randn(4, 24)
    y, grads = autocast(layer, x), torch.randn(3, 4, 16).bfloat16()
    batched = torch.autograd.grad(y, layer.weight, grads, is_grads_batched=True, retain_graph=True)[0]
    for one, grad in zip(batched, grads, strict=True):
        alone = torch.autograd.grad(y, layer.weight, grad, retain_graph=True)[0]
        torch.testing.assert_close(one, alone, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 6), (8, 0)])
def test_layers_without_width(inputs, outputs, widened):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is nothing to initialise
        layer = Linear(inputs, outputs)
    y = autocast(layer, torch.randn(5, inputs))
    y.sum().backward()
    assert y.shape == (5, outputs)
    assert widened == []


def test_one_row_under_autocast_is_that_of_several(widened):
    layer, x = Linear(24, 16), torch.randn(3, 24)
    torch.testing.assert_close(autocast(layer, x[:1]), autocast(layer, x)[:1], rtol=2**-7, atol=0)
    assert widened == [(1, 24), (3, 24)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_that_nothing_widens_is_pytorchs(dtype, widened):
    """Of float16, and of a function that is mapped."""
    layer, x = Linear(24, 16), torch.randn(2, 3, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        mapped = (lambda fn: fn) if dtype == torch.float16 else torch.vmap
        pytorchs = mapped(lambda x: nn.functional.linear(x, layer.weight, layer.bias))(x)
        assert torch.equal(mapped(layer)(x), pytorchs)
    assert widened == []


def test_autocast_is_pytorchs(used, monkeypatch):
    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", False)
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
