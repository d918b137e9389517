"""What autocast, autograd and graph capture see of the operations."""

import pytest
import torch
from inputs import DEVICE, Routing, choose, normal, run
from moe_runtime_kernels import attention_mix, expert_ffn, grouped_gemm, make_plan, route_topk

T, K, E, D, F = 12, 2, 4, 16, 8


def make_layer():
    plan = make_plan(choose(Routing(T, K, E)), E)
    inputs = {
        "x": normal(T, D),
        "gate_up": normal(E, 2 * F, D, scale=D**-0.5, seed=1),
        "down": normal(E, D, F, scale=F**-0.5, seed=2),
        "weight": normal(T, K, seed=3).softmax(1),
    }
    return lambda x, gate_up, down, weight: expert_ffn(x, gate_up, down, weight, plan), inputs


def under_autocast(fn, backward_too):
    """`fn` under autocast; its backward inside the context or, as usual, outside of it."""

    def wrapped(**inputs):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = fn(**inputs)
            if not backward_too:
                return y
            leaves = tuple(inputs.values())
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
            return torch.cat([g.flatten().float() for g in grads])

    return wrapped


def test_autocast_computes_in_its_dtype_and_keeps_the_gates_float32(autocast_rounds):
    fn, inputs = make_layer()
    grad = torch.ones(T, D, dtype=torch.bfloat16, device=DEVICE)
    actual = run(under_autocast(fn, False), inputs, grad)
    low = {name: x if name == "weight" else x.bfloat16() for name, x in inputs.items()}
    expected = run(fn, low, grad)
    assert actual["out"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert torch.equal(actual[name].to(value.dtype), value), name
        assert name == "out" or actual[name].dtype == torch.float32


def test_backward_inside_autocast_gives_the_same_bits():
    fn, inputs = make_layer()
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    inside = under_autocast(fn, True)(**leaves)
    outside = run(under_autocast(fn, False), inputs, torch.ones(T, D, device=DEVICE))
    assert torch.equal(inside, torch.cat([outside[f"d{name}"].flatten() for name in inputs]))


def test_backward_inside_autocast_of_a_forward_outside_stays_float32():
    fn, inputs = make_layer()
    grad = torch.ones(T, D, device=DEVICE)
    outside = run(fn, inputs, grad)
    y = fn(**{name: x.requires_grad_() for name, x in inputs.items()})
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, tuple(inputs.values()), grad)
    for name, value in zip(inputs, inside, strict=True):
        assert torch.equal(value, outside[f"d{name}"]), name


def test_autocast_leaves_routing_and_double_precision_alone():
    logits = normal(T, E)
    plain = route_topk(logits, K)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for under, outside in zip(route_topk(logits, K), plain, strict=True):
            assert under.dtype == outside.dtype
            assert torch.equal(under, outside)
        plan = make_plan(plain.expert_TK, E)
        double = grouped_gemm(normal(T * K, D).double(), normal(E, F, D).double(), plan)
        mixed = attention_mix(normal(T, 1, 2, 8), normal(T, 2), normal(D, 16))
    assert double.dtype == torch.float64
    assert mixed.dtype == torch.bfloat16


def test_autocast_adds_a_float32_residual_in_float32(autocast_rounds):
    _, inputs = make_layer()
    plan = make_plan(choose(Routing(T, K, E)), E)
    x, gate_up, down, weight = inputs.values()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = expert_ffn(x, gate_up, down, weight, plan, residual_TD=x)
    low = (tensor.bfloat16() for tensor in (x, gate_up, down))
    assert y.dtype == torch.float32
    assert torch.equal(y, expert_ffn(*low, weight, plan, residual_TD=x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_autocast_inside_a_compiled_function():
    fn, inputs = make_layer()
    torch._dynamo.reset()
    compiled = torch.compile(under_autocast(fn, False), fullgraph=True, backend="aot_eager")
    grad = torch.ones(T, D, dtype=torch.bfloat16, device=DEVICE)
    expected = run(under_autocast(fn, False), inputs, grad)
    for name, value in run(compiled, inputs, grad).items():
        assert torch.equal(value, expected[name]), name


def test_an_operation_called_directly_takes_tensors_that_require_gradients():
    _, inputs = make_layer()
    plan, grad = make_plan(choose(Routing(T, K, E)), E), normal(T * K, 2 * F)
    weight_grad = torch.ops.moe_runtime.gathered_grouped_gemm_weight_grad
    expected = weight_grad(grad, inputs["x"], plan.token_N, plan.offset_E)
    actual = weight_grad(grad, inputs["x"].requires_grad_(), plan.token_N, plan.offset_E)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_an_operation_called_directly_is_deaf_to_autocast(mode):
    gate, heads, weight = normal(T, 2), normal(T, 1, 2, 8), normal(D, 16)
    mix = torch.ops.moe_runtime.attention_mix
    expected = mix(heads, gate, weight)
    with mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = mix(heads, gate, weight)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_shapes_flow_through_meta_tensors():
    x, gate_up, down = torch.randn(T, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    x, gate_up, down, logits = (t.to("meta").requires_grad_() for t in (x, gate_up, down, torch.randn(T, E)))
    routing = route_topk(logits, K)
    y = expert_ffn(x, gate_up, down, routing.weight_TK, make_plan(routing.expert_TK, E), residual_TD=x)
    grads = torch.autograd.grad(y.sum() + routing.balance_loss, (x, gate_up, down, logits))
    assert y.shape == (T, D)
    assert [g.shape for g in grads] == [x.shape, gate_up.shape, down.shape, logits.shape]
