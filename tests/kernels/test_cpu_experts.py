"""The expert layer of the CPU is the reference's, whatever groups and chunks its experts fall into."""

import pytest
import torch
import torch.nn.functional as functional
from close import assert_close_to_exact
from expert_layers import NAMES, dense_experts, layer, make_inputs
from inputs import PATTERNS, Routing, choose, run
from moe_runtime_kernels import _cpu, _cpu_experts, make_plan
from moe_runtime_kernels._cpu import padded_height
from moe_runtime_kernels._cpu_experts import MOST_EXPERTS, Scratch, chunks, make_blocks, make_groups
from moe_runtime_kernels.combine import TOKENS, combine_blocks, combine_reference
from moe_runtime_kernels.expert_ffn import expert_ffn_backward_reference, expert_ffn_reference

DTYPES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float32, id="fp32")]


@pytest.fixture
def libraries_multiply(monkeypatch):
    """As on a processor with instructions for bfloat16, and without a compiler."""
    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", False)
    for dtype in list(_cpu.MOST_NATIVE_ROWS):
        monkeypatch.delitem(_cpu.MOST_NATIVE_ROWS, dtype)


@pytest.fixture
def bf16_is_widened(libraries_multiply, monkeypatch):
    """As on a processor without them, and without a compiler."""
    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", True)


NEEDS = [True] * 6


def by_reference(plan, inputs, grad, dtype):
    """Output and gradients of the references, in `dtype`."""
    x, gate_up, down, weight, gate_up_bias, down_bias, residual = (inputs[name].to(dtype) for name in NAMES)
    operands = (x, gate_up, down, gate_up_bias, down_bias, weight)
    y, h = expert_ffn_reference(*operands, residual, *plan, "silu", True)
    dx, dgate_up, ddown, dgate_up_bias, ddown_bias, dweight = expert_ffn_backward_reference(
        grad.to(dtype), *operands, *plan, h, "silu", NEEDS
    )
    grads = {"x": dx, "gate_up": dgate_up, "down": ddown, "weight": dweight}
    grads |= {"gate_up_bias": dgate_up_bias, "down_bias": ddown_bias}
    return {"out": y} | {f"d{name}": value for name, value in grads.items()}


def assert_is_the_reference(routing, dtype):
    plan = make_plan(choose(routing, "cpu"), routing.E)
    inputs, grad = make_inputs(routing, dtype, optional=NAMES[4:])
    inputs, grad = {name: value.cpu() for name, value in inputs.items()}, grad.cpu()
    inputs["weight"] = inputs["weight"].to(dtype)  # so that a reference in dtype gets the same gates
    actual = run(layer(plan), inputs, grad)
    plain, exact = (by_reference(plan, inputs, grad, wanted) for wanted in (dtype, torch.float64))
    for name in plain:
        assert_close_to_exact(name, actual[name], plain[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "routing",
    [
        Routing(70, 3, 40, "sentinels"),  # groups of several experts, padded, some of their choices dropped
        Routing(20, 2, 33),  # many experts with a row or two and some with none
        Routing(300, 4, 5),  # no groups
    ],
    ids=["groups", "few-rows", "single"],
)
@pytest.mark.parametrize("products", [None, "libraries_multiply", "bf16_is_widened"])
def test_the_cpu_layer_is_the_reference(routing, dtype, products, request):
    if products is not None:
        request.getfixturevalue(products)
    assert_is_the_reference(routing, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("D", "F", "calls"), [(16, 24, 3), (8, 1, 1), (1, 8, 0), (1, 1, 0), (13, 7, 0)], ids=str
)
def test_experts_are_one_call_where_pytorch_takes_it(D, F, calls, dtype, monkeypatch, libraries_multiply):
    seen = []

    def spy(x_MI, *weights, **options):
        seen.append(x_MI.shape[0])
        return grouped_mm(x_MI, *weights, **options)

    grouped_mm = functional.grouped_mm
    monkeypatch.setattr(functional, "grouped_mm", spy)
    expert_TK = choose(Routing(300, 2, 4), "cpu")
    inputs, grad = make_inputs(Routing(300, 2, 4), dtype, D=D, F=F)
    inputs, grad = {name: value.cpu() for name, value in inputs.items()}, grad.cpu()
    actual = run(layer(make_plan(expert_TK, 4)), inputs, grad)
    assert len(seen) == calls  # both products, and the gradient of the activations
    exact = {name: value.double() for name, value in inputs.items()}

    def plain(**leaves):
        return dense_experts(expert_TK, "silu", **leaves)

    reference, exact = run(plain, inputs, grad), run(plain, exact, grad.double())
    for name in actual:
        assert_close_to_exact(name, actual[name], reference[name], exact[name])


def test_scratch_rounds_matrices_of_any_layout(libraries_multiply):
    weight_nOI = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    scratch, x_RI = Scratch(torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
    strided = torch.empty(1, 12, 8)[:, ::2, ::2].copy_(weight_nOI)
    for weight in (weight_nOI, weight_nOI.mT, strided, strided.mT):
        assert torch.equal(scratch.rounded(x_RI, weight), weight.bfloat16())
    assert scratch.rounded(x_RI, weight_nOI.mT).stride() == weight_nOI.mT.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_chunks_and_caches_are_the_reference(dtype, monkeypatch):
    monkeypatch.setattr(_cpu_experts, "MOST_HIDDEN", 2000)
    monkeypatch.setattr(_cpu_experts, "CACHED", 700)
    assert_is_the_reference(Routing(70, 3, 20), dtype)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
def test_products_through_onednn_are_the_reference(monkeypatch):
    calls = []

    def spy(x_MI, weight_OI, bias_O=None):
        assert _cpu.onednn_takes(x_MI, weight_OI)
        calls.append(len(x_MI))
        return _cpu.product(x_MI, weight_OI, bias_O)

    monkeypatch.setattr(_cpu, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(_cpu_experts, "product", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert_is_the_reference(Routing(300, 4, 5), torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    counts = torch.bincount(choose(Routing(300, 4, 5), "cpu").flatten(), minlength=5).tolist()
    assert sum(calls) == 4 * sum(map(padded_height, counts))  # with both matrices, forward and backward


AUTOCAST = pytest.mark.parametrize(
    "routing", [Routing(70, 3, 40, "sentinels"), Routing(300, 4, 5)], ids=["few-rows", "many-rows"]
)


def run_under_autocast(routing):
    """Results under autocast, those of operands that were rounded before, and the exact ones."""
    plan = make_plan(choose(routing, "cpu"), routing.E)
    inputs, grad = make_inputs(routing, torch.float32, optional=NAMES[4:])
    inputs, grad = {name: value.cpu() for name, value in inputs.items()}, grad.cpu()
    fn = layer(plan)

    def under_autocast(**leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return fn(**leaves)

    actual = run(under_autocast, inputs, grad)
    kept = ("weight", "residual")
    low = {name: value if name in kept else value.bfloat16() for name, value in inputs.items()}
    exact = run(fn, {name: value.double() for name, value in inputs.items()}, grad.double())
    for name in ("gate_up", "down"):
        assert actual[f"d{name}"].dtype == torch.float32
    return actual, run(fn, low, grad), exact


@AUTOCAST
def test_weights_rounded_under_autocast_have_the_bits_of_rounded_weights(routing, libraries_multiply):
    actual, expected, _ = run_under_autocast(routing)
    for name, value in expected.items():
        assert torch.equal(actual[name], value.to(actual[name].dtype)), name


@AUTOCAST
@pytest.mark.parametrize("few", [False, True])
def test_weights_that_are_widened_anyway_are_not_rounded(routing, few, monkeypatch, bf16_is_widened):
    """Nearer to the exact results than those of rounded weights."""
    if few:
        monkeypatch.setitem(_cpu.MOST_NATIVE_ROWS, torch.float32, 32)
    actual, rounded, exact = run_under_autocast(routing)
    for name, value in actual.items():
        wanted = exact[name]
        error, most = ((result - wanted).norm().item() for result in (value.double(), rounded[name].double()))
        assert error <= most, name
    gradients = actual["dgate_up"], actual["ddown"]
    assert all(not torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients)
    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", False)
    assert not torch.equal(run_under_autocast(routing)[0]["out"], actual["out"])


def test_autocast_keeps_no_copy_of_float32_weights():
    routing = Routing(20, 2, 4)
    plan = make_plan(choose(routing, "cpu"), routing.E)
    inputs, _ = make_inputs(routing, torch.float32)
    leaves = {name: value.cpu().requires_grad_() for name, value in inputs.items()}
    saved = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        layer(plan)(**leaves)
    weights = [leaves["gate_up"], leaves["down"]]
    for weight in weights:
        kept = [t for t in saved if t.shape == weight.shape]
        assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_groups_are_neighbours_with_about_as_many_rows():
    experts = [
        (g.experts.start, g.experts.stop, g.height) for g in make_groups([2, 5, 5, 7, 9, 109, 111], 16, False)
    ]
    assert experts == [(0, 2, 3), (3, 5, 2), (5, 6, 100), (6, 7, 2)]
    assert [g.experts for g in make_groups([1, 2, 3], 1, False)] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert make_groups([0, 0], 16, True) == []


def test_heights_are_few_and_little_above_the_rows():
    heights = [padded_height(rows) for rows in range(1, 2049)]
    assert heights[:16] == [1, 2, 3, 4, 5, 6, 7, 8, 12, 12, 12, 12, 16, 16, 16, 16]
    assert all(0 <= height - rows <= max(3, rows // 16) for rows, height in enumerate(heights, start=1))
    assert all(height == padded_height(height) for height in heights)
    # oneDNN keeps 1024 kernels, and a gated layer has six kinds of products in a training step
    assert 6 * len(set(heights)) < 1024


@pytest.mark.parametrize(("dtype", "few"), [(torch.bfloat16, True), (torch.float32, False)])
def test_experts_have_few_heights_where_onednn_multiplies(dtype, few, monkeypatch, libraries_multiply):
    monkeypatch.setattr(_cpu, "onednn_has_bf16", lambda: True)
    ends = torch.tensor([50, 50, 183, 183 + 341], dtype=torch.int32)
    blocks = make_blocks(torch.empty(600, 4, dtype=dtype), torch.empty(4, 4, 4, dtype=dtype), ends)
    assert [group.height for group in blocks.groups] == ([52, 136, 352] if few else [50, 133, 341])


@pytest.mark.parametrize("routing", PATTERNS)
def test_every_row_has_a_place_among_the_padded(routing):
    plan = make_plan(choose(routing, "cpu"), routing.E)
    x_TD = torch.empty(routing.T, 4)
    blocks = make_blocks(x_TD, torch.empty(routing.E, 4, 4), plan.offset_E)
    used = int(plan.offset_E[-1])
    rows_N = torch.arange(used)
    padded_R = blocks.pad(rows_N)
    assert torch.equal(blocks.unpad(padded_R), rows_N)
    owner_R = torch.searchsorted(plan.offset_E, padded_R, right=True)
    for group in blocks.groups:
        n = group.experts.stop - group.experts.start
        assert n <= MOST_EXPERTS
        expected = torch.arange(group.experts.start, group.experts.stop).repeat_interleave(group.height)
        assert torch.equal(owner_R[group.padded], expected)
    places = blocks.places(plan.row_TK)
    kept = plan.row_TK >= 0
    assert torch.equal(places >= 0, kept)
    assert torch.equal(padded_R[places[kept].long()], plan.row_TK[kept].long())


def test_chunks_keep_order_and_size():
    groups = make_groups(list(range(10, 110, 10)), 1, False)
    assert [len(part) for part in chunks(groups, 30)] == [3, 3, 3, 1]
    assert [len(part) for part in chunks(groups, 1)] == [1] * 10
    assert [group for part in chunks(groups, 30) for group in part] == groups


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_in_blocks_of_tokens_is_the_reference(dtype):
    T, K, D = TOKENS + 7, 3, 40
    plan = make_plan(choose(Routing(T, K, 6, "sentinels"), "cpu"), 6)
    g = torch.Generator().manual_seed(0)
    y_ND, residual_TD, addend_TD = (torch.randn(n, D, generator=g).to(dtype) for n in (T * K, T, T))
    y_ND[int(plan.offset_E[-1]) :] = torch.nan  # what nobody wrote is not read
    weight_TK = torch.rand(T, K, generator=g)
    operands = (y_ND, weight_TK, plan.row_TK, residual_TD, addend_TD)
    exact = combine_reference(
        *(o if o is None or not o.is_floating_point() else o.double() for o in operands)
    )
    assert_close_to_exact("combine", combine_blocks(*operands), combine_reference(*operands), exact)
