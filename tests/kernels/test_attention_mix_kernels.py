"""attention_mix's kernels, in Triton's interpreter: result and gradients as exact as plain PyTorch's."""

import pytest
import torch
from attention_mixes import make_inputs, mix, mix_by_hand
from inputs import assert_matches, assert_same_bits, normal
from interpreter import DTYPES, interpreted, needs_interpreter
from moe_runtime_kernels import attention_mix

# NumPy on how the interpreter reads the bounds of a loop
pytestmark = [
    needs_interpreter,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

FLOAT32, FLOAT16 = torch.float32, torch.float16
SHAPES = [
    pytest.param(37, 1, 3, 10, 19, id="own-keys-and-values"),
    pytest.param(33, 2, 4, 6, 17, id="shared-keys-and-values"),
    pytest.param(20, 1, 1, 8, 8, id="one-expert"),
    pytest.param(19, 1, 2, 1, 1, id="columns-of-one"),
    pytest.param(35, 1, 2, 128, 64, id="aligned-rows"),
]


@pytest.fixture(autouse=True)
def _kernels():
    with interpreted("attention_mix", "attention_mix_backward"):
        yield


def assert_kernels_match(T, S, A, Q, D, dtype, rows=None):
    def make(draw):
        return make_inputs(T, S, A, Q, D, dtype, draw), normal(T, D, dtype=dtype, seed=300 + draw)

    assert_matches(mix, mix_by_hand, make, rows or T * A)
    assert_same_bits(mix, *make(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "S", "A", "Q", "D"), SHAPES)
def test_attention_mix_matches_the_definition(T, S, A, Q, D, dtype):
    assert_kernels_match(T, S, A, Q, D, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token(dtype):
    assert_kernels_match(1, 2, 2, 24, 64, dtype, rows=16)


@pytest.mark.parametrize(
    ("T", "Q", "D", "dtype"),
    [
        pytest.param(70, 70, 70, FLOAT32, id="fp32"),
        pytest.param(70, 70, 70, FLOAT16, id="fp16"),
        pytest.param(130, 144, 144, FLOAT16, id="aligned-fp16"),
        pytest.param(17, 144, 80, FLOAT16, id="few-tokens-in-fp16"),
    ],
)
def test_every_loop_runs_twice(T, Q, D, dtype):
    assert_kernels_match(T, 1, 2, Q, D, dtype)


def test_the_gate_may_have_another_dtype():
    inputs, grad = make_inputs(9, 1, 2, 4, 5, FLOAT32), normal(9, 5)
    inputs["gate"] = inputs["gate"].double().requires_grad_()
    mix(**inputs).backward(grad)
    exact = inputs["gate"].detach().clone().requires_grad_()
    mix_by_hand(inputs["o"].double(), exact, inputs["weight"].double()).backward(grad.double())
    torch.testing.assert_close(inputs["gate"].grad, exact.grad, rtol=0, atol=1e-5)


def test_gates_are_multiplied_in_float32():
    """Rounded to float16 before the product, this gate would be 1."""
    gate, o = torch.tensor([[1.0004]]), torch.full((1, 1, 1, 1), 2000.0, dtype=FLOAT16)
    assert attention_mix(o, gate, torch.ones(1, 1, dtype=FLOAT16)).item() == 2001


def test_no_tokens():
    inputs = {name: x.requires_grad_() for name, x in make_inputs(0, 1, 2, 4, 5, FLOAT32).items()}
    mix(**inputs).sum().backward()
    assert inputs["o"].grad.shape == (0, 1, 2, 4)
    assert inputs["gate"].grad.shape == (0, 2)
    assert torch.equal(inputs["weight"].grad, torch.zeros(5, 8))


@pytest.mark.parametrize(("Q", "D"), [(0, 3), (4, 0)])
def test_no_columns_and_no_width(Q, D):
    o, gate, weight = torch.ones(6, 1, 2, Q), torch.ones(6, 2), torch.ones(D, 2 * Q)
    assert torch.equal(attention_mix(o, gate, weight), torch.zeros(6, D))
    grads = torch.ops.moe_runtime.attention_mix_backward(torch.ones(6, D), o, gate, weight, [True] * 3)
    for x, dx in zip((o, gate, weight), grads, strict=True):
        assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_nobody_wants_are_empty(wanted):
    inputs, grad = tuple(make_inputs(5, 2, 3, 4, 6, FLOAT32).values()), normal(5, 6)
    grads = torch.ops.moe_runtime.attention_mix_backward(grad, *inputs, list(wanted))
    full = torch.ops.moe_runtime.attention_mix_backward(grad, *inputs, [True] * 3)
    for is_wanted, actual, expected in zip(wanted, grads, full, strict=True):
        assert torch.equal(actual, expected) if is_wanted else actual.numel() == 0


def test_kernels_that_nobody_needs_are_not_launched(monkeypatch):
    from moe_runtime_kernels._triton import attention_mix as kernels

    def refuse(*arguments):
        raise AssertionError("launched")

    inputs, grad = tuple(make_inputs(5, 2, 3, 4, 6, FLOAT32).values()), normal(5, 6)
    monkeypatch.setattr(kernels, "_launch_weight_grad", refuse)
    torch.ops.moe_runtime.attention_mix_backward(grad, *inputs, [True, True, False])
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "_launch_input_grad", refuse)
    torch.ops.moe_runtime.attention_mix_backward(grad, *inputs, [False, False, True])


def test_double_precision_is_refused():
    inputs = make_inputs(3, 1, 2, 4, 5, torch.float64)
    message = "attention_mix on a GPU: o must be bfloat16 or float16 or float32, got float64"
    with pytest.raises(ValueError, match=message):
        mix(**inputs)
    with pytest.raises(ValueError, match=message):
        torch.ops.moe_runtime.attention_mix_backward(
            normal(3, 5, dtype=torch.float64), *inputs.values(), [True] * 3
        )


def test_registration():
    inputs = tuple(make_inputs(5, 2, 3, 4, 6, FLOAT32).values())
    ops = torch.ops.moe_runtime
    torch.library.opcheck(ops.attention_mix.default, inputs)
    backward = (torch.randn(5, 6), *inputs, [False, True, True])
    torch.library.opcheck(ops.attention_mix_backward.default, backward)


FAMILIES = ["cuda80", "cuda90", "cuda100", "hip"]


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_launch_choice(family):
    from moe_runtime_kernels._triton.attention_mix import choose_forward_launch

    def choose(T, D=4096, itemsize=2, aligned=True):
        return choose_forward_launch(itemsize, T, D, aligned=aligned, family=family)

    assert [(choose(T).swapped, choose(T).block_m) for T in (1, 32, 33)] == [
        (True, 16),
        (True, 32),
        (False, 64),
    ]
    assert choose(8192).block_n == (256 if family in ("cuda90", "cuda100") else 128)
    assert choose(8192, 4095 + 129).block_n == 128  # the last wide tile would be half empty
    assert choose(256).block_n == 128  # wide tiles would be too few
    # float32 has one size of tiles, and so have rows that are not aligned
    assert choose(1, itemsize=4) == choose(8192, itemsize=4)
    assert choose(1, aligned=False) == choose(8192, aligned=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_launch_choice(family):
    from moe_runtime_kernels._triton.attention_mix import choose_launch, choose_weight_grad_launch

    keywords = {"aligned": True, "family": family}
    assert choose_launch(2, 8192, 64, **keywords).block_n == 64  # no wider than a slot
    assert choose_launch(2, 8192, 1024, **keywords).block_n == 128
    assert choose_weight_grad_launch(2, 64, 4096, 32, **keywords).block_m == 64
    wide = choose_weight_grad_launch(2, 1024, 4096, 4, **keywords).block_n
    assert wide == (256 if family in ("cuda90", "cuda100") else 128)


def test_what_is_not_aligned():
    from moe_runtime_kernels._triton.attention_mix import _aligned

    def tensors(Q=32, D=48, first=0, first_weight=0):
        o = torch.zeros(4 * 2 * Q + first, dtype=FLOAT16)[first:].view(4, 1, 2, Q)
        weight = torch.zeros(D * 2 * Q + first_weight, dtype=FLOAT16)[first_weight:].view(D, 2 * Q)
        return o, weight, None

    assert _aligned(*tensors())
    assert not _aligned(*tensors(Q=24))
    assert not _aligned(*tensors(D=40))
    for first in (1, 4):
        assert not _aligned(*tensors(first=first))
        assert not _aligned(*tensors(first_weight=first))
