import pytest
import torch
import torch.nn.functional as functional
from inputs import Routing, choose
from moe_runtime_kernels import (
    attention_mix,
    combine,
    expert_ffn,
    gathered_grouped_gemm,
    grouped_gemm,
    make_plan,
    route_topk,
)
from moe_runtime_kernels.flop_formulas import register_flop_formulas
from torch.utils.flop_counter import FlopCounterMode

T, K, E, D, F = 13, 2, 5, 8, 6
N = T * K


@pytest.fixture(autouse=True)
def _formulas():
    register_flop_formulas()


def count(fn, *tensors, backward=True):
    """FLOPs of the forward and of the backward pass."""
    counter = FlopCounterMode(display=False)
    with counter:
        y = fn(*tensors)
        forward = counter.get_total_flops()
        if backward:
            y.backward(torch.randn_like(y))
    return forward, counter.get_total_flops() - forward


def leaf(*shape, trained=True):
    return torch.randn(shape, requires_grad=trained)


@pytest.fixture
def plan():
    return make_plan(choose(Routing(T, K, E), "cpu"), E)


@pytest.mark.parametrize("gated", [True, False])
def test_expert_ffn_counts_k_dense_ffns_per_token(plan, gated):
    G = 2 * F if gated else F
    weight_TK = torch.rand(T, K)
    actual = count(
        lambda x, up, down: expert_ffn(x, up, down, weight_TK, plan),
        leaf(T, D),
        leaf(E, G, D),
        leaf(E, D, F),
    )

    def dense(x, up, down):
        h = x @ up.t()
        return (functional.silu(h[:, :F]) * h[:, F:] if gated else h.relu()) @ down.t()

    assert actual == count(dense, leaf(N, D), leaf(G, D), leaf(D, F))
    assert actual[1] == 2 * actual[0]


def test_frozen_experts_count_half_the_backward(plan):
    gate_up, down = leaf(E, 2 * F, D, trained=False), leaf(E, D, F, trained=False)
    forward, backward = count(lambda x: expert_ffn(x, gate_up, down, torch.rand(T, K), plan), leaf(T, D))
    assert backward == forward == 6 * N * D * F


def test_the_gates_gradient_alone_costs_one_product(plan):
    gate_up, down = leaf(E, 2 * F, D, trained=False), leaf(E, D, F, trained=False)
    weight_TK = leaf(T, K)
    _, backward = count(lambda w: expert_ffn(torch.randn(T, D), gate_up, down, w, plan), weight_TK)
    assert backward == 2 * N * D * F


def test_grouped_gemms_count_like_a_dense_product(plan):
    dense = count(lambda x, w: x @ w.t(), leaf(N, D), leaf(F, D))
    assert count(lambda x, w: grouped_gemm(x, w, plan), leaf(N, D), leaf(E, F, D)) == dense
    assert count(lambda x, w: gathered_grouped_gemm(x, w, plan), leaf(T, D), leaf(E, F, D)) == dense


def test_attention_mix_counts_like_a_dense_product():
    dense = count(lambda x, w: x @ w.t(), leaf(T, 24), leaf(D, 24))
    assert count(attention_mix, leaf(T, 2, 3, 4), leaf(T, 3), leaf(D, 24)) == dense
    assert count(attention_mix, leaf(T, 2, 3, 4), leaf(T, 3), leaf(D, 24, trained=False))[1] == dense[0]


def test_routing_and_row_movement_are_free(plan):
    def fn(logits, y):
        routing = route_topk(logits, K)
        return combine(y, routing.weight_TK, plan)

    assert count(fn, leaf(T, E), leaf(N, D)) == (0, 0)


def test_every_operation_has_a_formula():
    from torch.utils.flop_counter import flop_registry

    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe_runtime::")]
    assert len(names) >= 17
    for name in names:
        assert getattr(torch.ops.moe_runtime, name.split("::")[1].split(".")[0]) in flop_registry, name


def test_registering_twice_keeps_the_first():
    from torch.utils.flop_counter import flop_registry

    before = dict(flop_registry)
    register_flop_formulas()
    assert flop_registry == before


def test_pytorchs_grouped_mm_is_counted(plan):
    x, up = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((N, 16), (E, 16, 32)))
    product = 2 * N * 16 * 32

    # forward: groups of rows; backward: groups of rows, and for the weights groups of the summed axis
    assert count(lambda x, up: functional.grouped_mm(x, up, offs=plan.offset_E), x, up) == (
        product,
        2 * product,
    )
    # groups of columns, and a plain batch
    up_E32_16, x_16N = up.detach().mT.contiguous(), x.detach().t()
    columns = count(
        lambda a, b: functional.grouped_mm(a, b, offs=plan.offset_E), up_E32_16, x_16N, backward=False
    )
    assert columns == (product, 0)
    batch = torch.randn(E, 8, 16, dtype=torch.bfloat16)
    assert count(functional.grouped_mm, batch, up.detach(), backward=False) == (2 * E * 8 * 16 * 32, 0)


def test_attention_on_the_cpu_is_counted():
    B, H, L, P = 2, 4, 5, 8

    def attention(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    product = 2 * B * H * L * L * P
    assert count(attention, *(leaf(B, H, L, P) for _ in range(3))) == (2 * product, 5 * product)
