"""The float32 product through oneDNN equals PyTorch's own, and is left where it would be wrong or slow."""

import subprocess
import sys

import pytest
import torch
from close import assert_close_to_exact
from moe_runtime_kernels import _cpu

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


@pytest.fixture(autouse=True)
def _faster(monkeypatch):
    monkeypatch.setattr(_cpu, "ONEDNN_IS_FASTER", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@onednn
@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "transposed weight"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("M", "I", "O"), [(1, 7, 5), (16, 64, 96), (65, 130, 33)])
def test_the_product_is_that_of_pytorch(M, I, O, with_bias, transposed):
    torch.manual_seed(M)
    x_MI, weight_OI = torch.randn(M, I), torch.randn(O, I)
    if transposed:
        weight_OI = weight_OI.t().contiguous().t()
    bias_O = torch.randn(O) if with_bias else None
    assert _cpu.onednn_takes(x_MI, weight_OI)
    plain = torch.nn.functional.linear(x_MI, weight_OI, bias_O)
    exact = torch.nn.functional.linear(
        *(None if x is None else x.double() for x in (x_MI, weight_OI, bias_O))
    )
    assert_close_to_exact("product", _cpu.product(x_MI, weight_OI, bias_O), plain, exact)


@onednn
@pytest.mark.parametrize(("M", "I", "O"), [(1, 7, 5), (16, 64, 96), (65, 130, 33)])
def test_the_gradient_of_the_weight_is_that_of_pytorch(M, I, O):
    torch.manual_seed(M)
    grad_MO, x_MI = torch.randn(M, O), torch.randn(M, I)
    assert _cpu.onednn_takes(grad_MO, x_MI.t())
    exact = grad_MO.double().t() @ x_MI.double()
    assert_close_to_exact("gradient", _cpu.weight_grad(grad_MO, x_MI), grad_MO.t() @ x_MI, exact)


def test_what_onednn_would_do_wrong_or_slowly_stays_with_pytorch():
    x_MI, weight_OI = torch.randn(8, 16), torch.randn(4, 16)
    assert not _cpu.onednn_takes(torch.randn(8, 32)[:, :16], weight_OI)  # rows apart: a slow general path
    assert not _cpu.onednn_takes(x_MI, torch.randn(4, 32)[:, :16])
    assert not _cpu.onednn_takes(x_MI.bfloat16(), weight_OI.bfloat16())
    assert not _cpu.onednn_takes(x_MI, weight_OI.double())
    assert not _cpu.onednn_takes(x_MI[:0], weight_OI)
    assert _cpu.product(x_MI[:0], weight_OI).shape == (0, 4)


def test_the_most_precise_product_is_pytorchs():
    torch.set_float32_matmul_precision("highest")
    assert not _cpu.onednn_takes(torch.randn(8, 16), torch.randn(4, 16))


@pytest.mark.parametrize(
    ("switch", "through_onednn"),
    [
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", False),
        ("torch.backends.fp32_precision = 'ieee'", False),
    ],
)
def test_every_switch_of_pytorch_can_be_used_before(switch, through_onednn):
    """In a process of its own: PyTorch refuses its older switches once the newer were used."""
    script = f"""
import torch
from moe_runtime_kernels import _cpu
from moe_runtime.linear import Linear, precise_products
{switch}
_cpu.ONEDNN_IS_FASTER = True
x, layer = torch.randn(8, 16), Linear(16, 4)
before = torch.backends.cuda.matmul.fp32_precision
with torch.no_grad():
    layer(x), layer.bfloat16()(x.bfloat16())
    with precise_products():
        assert not _cpu.onednn_takes(x, torch.randn(4, 16))
    assert _cpu.onednn_takes(x, torch.randn(4, 16)) is {through_onednn}
assert torch.backends.cuda.matmul.fp32_precision == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_pytorchs_switch_for_onednn_is_obeyed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not _cpu.onednn_takes(torch.randn(8, 16), torch.randn(4, 16))


def test_another_processor_keeps_pytorchs_product(monkeypatch):
    monkeypatch.setattr(_cpu, "ONEDNN_IS_FASTER", False)
    assert not _cpu.onednn_takes(torch.randn(8, 16), torch.randn(4, 16))


def test_what_has_a_gradient_stays_with_pytorch():
    x_MI, weight_OI, bias_O = torch.randn(8, 16), torch.randn(4, 16), torch.randn(4)
    for leaf in (x_MI, weight_OI, bias_O):
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(_cpu.product(x_MI, weight_OI, bias_O).sum(), leaf)
        assert grad.shape == leaf.shape
        leaf.requires_grad_(False)
