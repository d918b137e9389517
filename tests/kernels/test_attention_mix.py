import pytest
import torch
from attention_mixes import make_inputs, mix, mix_by_hand
from inputs import DEVICE, DTYPES, assert_compiles_once, assert_matches, assert_same_bits, normal
from moe_runtime_kernels import attention_mix

SHAPES = [
    pytest.param(1, 1, 4, 16, 24, id="one-token"),
    pytest.param(37, 1, 3, 10, 19, id="own-keys-and-values"),
    pytest.param(33, 2, 4, 6, 17, id="shared-keys-and-values"),
    pytest.param(20, 1, 1, 8, 8, id="one-expert"),
]
# whole numbers of 16 elements, which no tile and no step divides; few tokens have tiles of their own
ALIGNED_SHAPES = [
    pytest.param(12, 1, 6, 144, 80, id="few-tokens"),
    pytest.param(31, 2, 3, 16, 48, id="narrow"),
    pytest.param(150, 2, 3, 144, 80, id="many-tokens"),
    pytest.param(150, 1, 4, 48, 144, id="wide"),
]


def assert_mix_matches(T, S, A, Q, D, dtype):
    def make(draw):
        return make_inputs(T, S, A, Q, D, dtype, draw), normal(T, D, dtype=dtype, seed=300 + draw)

    assert_matches(mix, mix_by_hand, make, T * A)
    assert_same_bits(mix, *make(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "S", "A", "Q", "D"), SHAPES)
def test_attention_mix_matches_the_definition(T, S, A, Q, D, dtype):
    assert_mix_matches(T, S, A, Q, D, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("T", "S", "A", "Q", "D"), ALIGNED_SHAPES)
def test_aligned_rows_in_16_bits(T, S, A, Q, D, dtype):
    assert_mix_matches(T, S, A, Q, D, dtype)


def test_a_one_hot_gate_is_that_expert_alone():
    inputs = make_inputs(9, 2, 3, 4, 5, torch.float32)
    inputs = {name: x.mul(4).round() for name, x in inputs.items()}  # whole numbers, so that sums are exact
    inputs["gate"] = torch.tensor([[0.0, 1.0, 0.0]], device=DEVICE).expand(9, 3)
    alone = inputs["o"][:, :, 1].flatten(1) @ inputs["weight"].view(5, 2, 3, 4)[:, :, 1].flatten(1).t()
    assert torch.equal(mix(**inputs), alone)


def test_gates_are_multiplied_in_float32():
    """Rounded to bfloat16 before the product, this gate would be 1."""
    gate = torch.tensor([[1.0035]], device=DEVICE)
    o = torch.full((1, 1, 1, 1), 200.0, dtype=torch.bfloat16, device=DEVICE)
    assert attention_mix(o, gate, torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE)).item() == 201


def test_no_tokens():
    inputs = make_inputs(0, 1, 2, 4, 5, torch.float32)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    mix(**inputs).sum().backward()
    assert inputs["o"].grad.shape == (0, 1, 2, 4)
    assert torch.equal(inputs["weight"].grad, torch.zeros(5, 8))


def test_attention_mix_gradients_in_double_precision():
    inputs = make_inputs(5, 2, 3, 2, 4, torch.float64) | {"gate": normal(5, 3, dtype=torch.float64)}
    torch.autograd.gradcheck(attention_mix, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_nobody_wants_are_empty(wanted):
    inputs, grad = tuple(make_inputs(5, 2, 3, 4, 6, torch.float32).values()), normal(5, 6)
    grads = torch.ops.moe_runtime.attention_mix_backward(grad, *inputs, list(wanted))
    full = torch.ops.moe_runtime.attention_mix_backward(grad, *inputs, [True] * 3)
    for is_wanted, actual, expected in zip(wanted, grads, full, strict=True):
        assert torch.equal(actual, expected) if is_wanted else actual.numel() == 0


def test_attention_mix_refuses_bad_input():
    o, gate, weight = make_inputs(4, 2, 3, 4, 5, torch.float32).values()
    with pytest.raises(
        ValueError, match=r"attention_mix: o must have 4 axes \(T, S, A, Q\), got shape \(4, 24\)"
    ):
        attention_mix(o.flatten(1), gate, weight)
    with pytest.raises(ValueError, match=r"gate must have shape \(T, A\) = \(4, 3\), got \(4, 2\)"):
        attention_mix(o, gate[:, :2], weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(D, S\*A\*Q\) = \(5, 24\), got \(5, 23\)"):
        attention_mix(o, gate, weight[:, :23])
    with pytest.raises(ValueError, match="weight must have the dtype of o, float32, got float16"):
        attention_mix(o, gate, weight.half())
    with pytest.raises(ValueError, match=r"gate must be .* or float64, got bool"):
        attention_mix(o, gate > 0, weight)
    with pytest.raises(ValueError, match=r"o must be .* or float64, got int32"):
        attention_mix(o.int(), gate, weight.int())


def test_attention_mix_registration():
    inputs = tuple(x.cpu() for x in make_inputs(5, 2, 3, 4, 6, torch.float32).values())
    ops = torch.ops.moe_runtime
    torch.library.opcheck(ops.attention_mix.default, inputs)
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(ops.attention_mix_backward.default, (torch.randn(5, 6), *inputs, needs))


def test_attention_mix_compiles_in_one_graph():
    weight = torch.randn(6, 24)

    def make(T):
        o, gate = torch.randn(T, 2, 3, 4), torch.rand(T, 3)
        return {"o": o, "gate": gate, "weight": weight}, torch.randn(T, 6)

    assert_compiles_once(mix, make)
