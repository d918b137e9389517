"""Weight gradients that are added to a main gradient in float32."""

import functools

import pytest
import torch
from expert_layers import NAMES, dense_experts, make_inputs
from inputs import DEVICE, DTYPES, SMALL, Routing, choose, normal, run
from interpreter import interpreted, needs_interpreter
from moe_runtime_kernels import expert_ffn, gathered_grouped_gemm, grouped_gemm, make_plan
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

ROUTING = Routing(33, 2, 5, "sentinels")
EMPTY = Routing(40, 2, 6, "empty")
SIZES = [pytest.param(24, 16, id="even"), pytest.param(17, 9, id="odd")]
KERNELS = [
    pytest.param(False, id="reference"),
    pytest.param(True, id="kernels", marks=needs_interpreter),
]


def kernels_if(wanted):
    """The Triton kernels of everything that adds to a main gradient, or the references."""
    names = ("expert_ffn", "expert_ffn_backward", "expert_ffn_add_backward", "grouped_gemm")
    names += ("grouped_gemm_weight_grad", "grouped_gemm_add_weight_grad")
    names += ("gathered_grouped_gemm", "gathered_grouped_gemm_add_weight_grad")
    names += ("gathered_grouped_gemm_weight_grad",)
    return interpreted(*(names if wanted else ("make_plan",)))


def layer(plan, **main_grads):
    def fn(x, gate_up, down, weight, gate_up_bias=None, down_bias=None, residual=None, recompute=False):
        return expert_ffn(
            x,
            gate_up,
            down,
            weight,
            plan,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            residual_TD=residual,
            recompute=recompute,
            **main_grads,
        )

    return fn


def zeros_like(inputs, *names):
    return {f"{name}_main_grad": torch.zeros_like(inputs[name], dtype=torch.float32) for name in names}


def gradients(fn, inputs, grad):
    """Of every input that has one."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    fn(**leaves).backward(grad)
    return {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize(
    ("names", "recompute"),
    [
        pytest.param(("gate_up", "down"), False, id="both"),
        pytest.param(("gate_up", "down"), True, id="both-recomputed"),
        pytest.param(("gate_up",), False, id="gate_up"),
        pytest.param(("down",), False, id="down"),
    ],
)
@pytest.mark.parametrize(("D", "F"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_what_is_added_is_the_gradient_and_the_weight_gets_none(kernels, dtype, D, F, names, recompute):
    plan = make_plan(choose(EMPTY), EMPTY.E)
    inputs, grad = make_inputs(EMPTY, dtype, optional=NAMES[4:], D=D, F=F)
    main_grads = zeros_like(inputs, *names)
    with kernels_if(kernels):
        expected = gradients(layer(plan), inputs, grad)
        fn = functools.partial(layer(plan, **main_grads), recompute=recompute)
        actual = gradients(fn, inputs, grad)
    for name, value in expected.items():
        if name in names:
            assert actual[name] is None
            # rounded to the weight's dtype, what was added to zero is the gradient that is returned otherwise
            added = main_grads[f"{name}_main_grad"].to(dtype)
            if kernels or dtype != torch.float32:
                assert torch.equal(added, value), name
            else:  # PyTorch's float32 products depend on where in memory their result lies
                torch.testing.assert_close(added, value)
        else:
            assert torch.equal(actual[name], value), name


def accumulated(fns, draws):
    """The gradients of the weights after the backward of one micro-batch after the other."""
    weights = None
    for fn, (inputs, grad) in zip(fns, draws, strict=True):
        if weights is None:
            weights = {name: inputs[name].detach().requires_grad_() for name in ("gate_up", "down")}
        fn(**{name: x.detach().requires_grad_() for name, x in inputs.items()} | weights).backward(grad)
    return {name: weight.grad for name, weight in weights.items()}


# bfloat16 products are wrong in the interpreter
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        pytest.param(False, torch.bfloat16, id="reference-bf16"),
        pytest.param(False, torch.float16, id="reference-fp16"),
        pytest.param(True, torch.float16, id="kernels-fp16", marks=needs_interpreter),
    ],
)
def test_micro_batches_add_up_in_float32(kernels, dtype):
    routings = [Routing(T, 2, 5, "sentinels") for T in (33, 40)]
    experts = [choose(routing) for routing in routings]
    plans = [make_plan(expert_TK, 5) for expert_TK in experts]
    draws = [make_inputs(routing, dtype, D=24, F=16, draw=i) for i, routing in enumerate(routings)]
    # one set of weights for all micro-batches
    shared = {name: draws[0][0][name] for name in ("gate_up", "down")}
    draws = [(inputs | shared, grad) for inputs, grad in draws]
    main_grads = zeros_like(shared, "gate_up", "down")
    with kernels_if(kernels):
        assert accumulated([layer(plan, **main_grads) for plan in plans], draws) == {
            "gate_up": None,
            "down": None,
        }
        rounded = accumulated([layer(plan) for plan in plans], draws)
        # the same products without any rounding of their sums; h, a and dh are rounded as ever
        once = [zeros_like(shared, "gate_up", "down") for _ in plans]
        accumulated([layer(plan, **sums) for plan, sums in zip(plans, once, strict=True)], draws)
    exact = accumulated(
        [functools.partial(dense_experts, expert_TK, "silu") for expert_TK in experts],
        [({name: x.double() for name, x in inputs.items()}, grad.double()) for inputs, grad in draws],
    )
    for name, value in exact.items():
        total = main_grads[f"{name}_main_grad"]
        in_float64 = sum(sums[f"{name}_main_grad"].double() for sums in once)
        rms = in_float64.square().mean().sqrt()
        assert (total.double() - in_float64).abs().max() / rms <= 16 * torch.finfo(torch.float32).eps, name
        assert (rounded[name].double() - in_float64).abs().max() / rms >= torch.finfo(dtype).eps, name
        error, rounded_error = ((x.double() - value).square().mean().sqrt() for x in (total, rounded[name]))
        assert error < rounded_error, name


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_an_expert_without_tokens_has_stays(kernels):
    plan = make_plan(choose(EMPTY), EMPTY.E)
    inputs, grad = make_inputs(EMPTY, torch.float32, D=24, F=16)
    main_grads = {name: normal(*x.shape) for name, x in zeros_like(inputs, "gate_up", "down").items()}
    for x in main_grads.values():
        x[0, 0], x[0, 1] = torch.nan, -0.0  # neither is what it is when zeros are added
    before = {name: x.clone() for name, x in main_grads.items()}
    with kernels_if(kernels):
        gradients(layer(plan, **main_grads), inputs, grad)
    for name, x in main_grads.items():
        assert torch.equal(x[0].view(torch.int32), before[name][0].view(torch.int32)), name
        assert (x[1:] != before[name][1:]).any(), name


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_tokens_and_every_choice_dropped_add_nothing(kernels):
    for T in (0, 3):
        plan = make_plan(torch.full((T, 2), 4, dtype=torch.int32, device=DEVICE), 4)
        inputs, grad = make_inputs(Routing(T, 2, 4), torch.float32, D=24, F=16)
        main_grads = {name: normal(*x.shape) for name, x in zeros_like(inputs, "gate_up", "down").items()}
        before = {name: x.clone() for name, x in main_grads.items()}
        with kernels_if(kernels):
            gradients(layer(plan, **main_grads), inputs, grad)
        for name, x in main_grads.items():
            assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_add_equal_bits(dtype):
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, dtype)
    runs = []
    for _ in range(2):
        main_grads = zeros_like(inputs, "gate_up", "down")
        for _ in range(3):
            gradients(layer(plan, **main_grads), inputs, grad)
        runs.append(main_grads)
    for name, x in runs[0].items():
        assert x.any()
        assert torch.equal(x, runs[1][name]), name


def test_a_frozen_weight_leaves_its_main_gradient_alone():
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, torch.float32)
    main_grads = zeros_like(inputs, "gate_up", "down")
    leaves = {name: x.requires_grad_(name != "down") for name, x in inputs.items()}
    layer(plan, **main_grads)(**leaves).backward(grad)
    assert main_grads["gate_up_main_grad"].any()
    assert not main_grads["down_main_grad"].any()


OPS = ["expert_ffn", "grouped_gemm", "gathered_grouped_gemm"]


def adding(op):
    """(function that adds to main gradients, its inputs, upstream gradient, main gradients)."""
    plan = make_plan(choose(ROUTING), ROUTING.E)
    if op == "expert_ffn":
        inputs, grad = make_inputs(ROUTING, torch.float32)
        main_grads = zeros_like(inputs, "gate_up", "down")
        return layer(plan, **main_grads), inputs, grad, list(main_grads.values())
    T, K, E, _ = ROUTING
    fn, rows = (grouped_gemm, T * K) if op == "grouped_gemm" else (gathered_grouped_gemm, T)
    inputs = {"x": normal(rows, 24), "weight": normal(E, 16, 24)}
    main_grad = torch.zeros(E, 16, 24, device=DEVICE)
    call = functools.partial(fn, plan=plan, main_grad_EOI=main_grad)
    return lambda x, weight: call(x, weight), inputs, normal(T * K, 16), [main_grad]


@pytest.mark.parametrize("op", OPS)
def test_every_backward_pass_adds_whatever_it_is_asked_for(op):
    fn, inputs, grad, main_grads = adding(op)
    gradients(fn, inputs, grad)
    once = [x.clone() for x in main_grads]
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    for x in main_grads:
        x.zero_()
    out = fn(**leaves)
    for times in (1, 2):
        torch.autograd.grad(out, leaves["x"], grad, retain_graph=True)
        for x, added in zip(main_grads, once, strict=True):
            assert added.any()
            torch.testing.assert_close(x, times * added)


@pytest.mark.parametrize("op", OPS)
def test_hooks_of_a_weight_are_called_without_a_gradient(op):
    fn, inputs, grad, _ = adding(op)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    weights = [leaf for leaf in leaves.values() if leaf.dim() == 3]
    seen = []
    for weight in weights:
        weight.register_hook(seen.append)
        weight.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad))
    fn(**leaves).backward(grad)
    assert seen == [None] * 2 * len(weights)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_adds_once(use_reentrant):
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, torch.float32)
    plain, again = (zeros_like(inputs, "gate_up", "down") for _ in range(2))
    gradients(layer(plan, **plain), inputs, grad)

    def checkpointed(x, gate_up, down, weight):
        return checkpoint(layer(plan, **again), x, gate_up, down, weight, use_reentrant=use_reentrant)

    gradients(checkpointed, inputs, grad)
    for name, x in plain.items():
        assert torch.equal(x, again[name]), name


def test_a_layer_that_is_used_twice_adds_both():
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, torch.float32)
    main_grads = zeros_like(inputs, "gate_up", "down")

    def twice(fn):
        return lambda x, **rest: fn(fn(x, **rest), **rest)

    expected = gradients(twice(layer(plan)), inputs, grad)
    gradients(twice(layer(plan, **main_grads)), inputs, grad)
    for name in ("gate_up", "down"):
        torch.testing.assert_close(main_grads[f"{name}_main_grad"], expected[name])


def test_autocast_adds_the_sums_of_its_products_unrounded(autocast_rounds):
    plan = make_plan(choose(ROUTING), ROUTING.E)
    inputs, grad = make_inputs(ROUTING, torch.float32)
    main_grads, expected = (zeros_like(inputs, "gate_up", "down") for _ in range(2))
    low = {name: x if name == "weight" else x.bfloat16() for name, x in inputs.items()}
    gradients(layer(plan, **expected), low, grad.bfloat16())

    def under_autocast(**leaves):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return layer(plan, **main_grads)(**leaves)

    actual = gradients(under_autocast, inputs, grad.bfloat16())
    assert actual["gate_up"] is actual["down"] is None
    for name, x in expected.items():
        assert torch.equal(main_grads[name], x), name


@pytest.mark.parametrize("kernels", KERNELS)  # of which only a reference writes through PyTorch, which counts
@pytest.mark.parametrize("op", OPS)
def test_whoever_kept_the_main_gradient_for_backward_is_told(op, kernels):
    fn, inputs, grad, main_grads = adding(op)
    scale = torch.ones((), device=DEVICE, requires_grad=True)
    kept = [scale * x for x in main_grads]
    with kernels_if(kernels):
        gradients(fn, inputs, grad)
    for y in kept:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gathered"])
@pytest.mark.parametrize(("I", "O"), [(48, 80), (33, 65)], ids=["even", "odd"])
def test_grouped_gemm_adds_its_weight_gradient(I, O, gathered, dtype, kernels):
    plan, fn = make_plan(choose(EMPTY), EMPTY.E), gathered_grouped_gemm if gathered else grouped_gemm
    N = EMPTY.T * EMPTY.K
    inputs = {"x": normal(EMPTY.T if gathered else N, I, dtype=dtype)}
    inputs |= {"weight": normal(EMPTY.E, O, I, dtype=dtype, scale=I**-0.5, seed=1)}
    grad = normal(N, O, dtype=dtype, seed=2)
    main_grad = torch.zeros(EMPTY.E, O, I, device=DEVICE)
    with kernels_if(kernels):
        expected = gradients(lambda x, weight: fn(x, weight, plan), inputs, grad)
        for times in (1, 2):
            actual = gradients(lambda x, weight: fn(x, weight, plan, main_grad_EOI=main_grad), inputs, grad)
            assert actual["weight"] is None
            assert torch.equal(actual["x"], expected["x"])
            assert torch.equal((main_grad / times).to(dtype), expected["weight"]), times


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gathered"])
def test_the_sum_of_half_precision_products_is_not_rounded_to_half_precision(gathered, kernels):
    experts, I, O = choose(EMPTY), 48, 80
    plan, fn = make_plan(experts, EMPTY.E), gathered_grouped_gemm if gathered else grouped_gemm
    inputs = {"x": normal(EMPTY.T if gathered else EMPTY.T * EMPTY.K, I, dtype=torch.float16)}
    inputs |= {"weight": normal(EMPTY.E, O, I, dtype=torch.float16, scale=I**-0.5, seed=1)}
    grad = normal(EMPTY.T * EMPTY.K, O, dtype=torch.float16, seed=2)
    main_grad = normal(EMPTY.E, O, I, seed=3)
    expected = main_grad.double()
    x_NI = inputs["x"][plan.token_N.long()] if gathered else inputs["x"]
    expert_N = experts.flatten()[plan.slot_N.long()]
    for e in range(EMPTY.E):
        rows = expert_N == e
        expected[e] += grad[rows].double().T @ x_NI[rows].double()
    with kernels_if(kernels):
        gradients(lambda x, weight: fn(x, weight, plan, main_grad_EOI=main_grad), inputs, grad)
    error = (main_grad.double() - expected).abs().max() / expected.square().mean().sqrt()
    assert error <= 16 * torch.finfo(torch.float32).eps


def test_float64_adds_in_float64():
    plan = make_plan(choose(SMALL), SMALL.E)
    inputs, grad = make_inputs(SMALL, torch.float64, D=5, F=3)
    main_grads = {name: x.double() for name, x in zeros_like(inputs, "gate_up", "down").items()}
    expected = run(layer(plan), inputs, grad)
    gradients(layer(plan, **main_grads), inputs, grad)
    for name in ("gate_up", "down"):
        torch.testing.assert_close(main_grads[f"{name}_main_grad"], expected[f"d{name}"])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_it_compiles_in_one_graph(recompute):
    inputs, grad = make_inputs(ROUTING, torch.float32)
    expert_TK, (plain, main_grads) = (
        choose(ROUTING),
        (zeros_like(inputs, "gate_up", "down") for _ in range(2)),
    )

    def fn(x, gate_up, down, weight, gate_up_main_grad, down_main_grad):
        sums = {"gate_up_main_grad": gate_up_main_grad, "down_main_grad": down_main_grad}
        return layer(make_plan(expert_TK, 5), **sums)(x, gate_up, down, weight, recompute=recompute)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected = gradients(functools.partial(fn, **plain), inputs, grad)
        actual = gradients(functools.partial(compiled, **main_grads), inputs, grad)
        assert actual["gate_up"] is actual["down"] is None
        assert torch.equal(actual["x"], expected["x"])
        for name, x in plain.items():
            assert x.any()
            assert torch.equal(main_grads[name], x), name


def test_registration():
    plan = make_plan(choose(SMALL, "cpu"), SMALL.E)
    inputs, grad = make_inputs(SMALL, torch.float32, optional=NAMES[4:])
    x, up, down, weight, up_bias, down_bias, _ = (value.cpu() for value in inputs.values())
    operands = (grad.cpu(), x, up, down, up_bias, down_bias, weight, *plan, None, "silu", [True] * 6)
    backward = torch.ops.moe_runtime.expert_ffn_add_backward.default
    for sums in ((up.clone(), down.clone()), (None, down.clone()), (up.clone(), None), (None, None)):
        torch.library.opcheck(backward, (*operands, *sums))
    grads = backward(*operands, up.clone(), None)
    assert [dx.numel() for dx in grads] == [
        dx.numel() for dx in (x, up[:0], down, up_bias, down_bias, weight)
    ]
    ops, rows, grad_NO = torch.ops.moe_runtime, torch.randn(14, 4), torch.randn(14, 5)
    main_grad = torch.randn(3, 5, 4)
    torch.library.opcheck(ops.grouped_gemm_add_weight_grad.default, (grad_NO, rows, main_grad, plan.offset_E))
    torch.library.opcheck(
        ops.gathered_grouped_gemm_add_weight_grad.default,
        (grad_NO, rows[:7], plan.token_N, main_grad, plan.offset_E),
    )


def test_bad_main_gradients_are_refused():
    plan = make_plan(torch.zeros(4, 2, dtype=torch.int32, device=DEVICE), 3)
    x, up, down, weight = normal(4, 8), normal(3, 10, 8), normal(3, 8, 5), normal(4, 2)

    def expect(error, name, main_grad):
        with pytest.raises(ValueError, match=f"expert_ffn: {name} must {error}"):
            expert_ffn(x, up, down, weight, plan, **{name: main_grad})

    expect(
        r"have the shape of gate_up_proj, \(3, 10, 8\), got \(3, 8, 5\)", "gate_up_main_grad", normal(3, 8, 5)
    )
    expect(r"have the shape of down_proj, \(3, 8, 5\), got \(8, 5\)", "down_main_grad", normal(8, 5))
    expect("be float32, got bfloat16", "gate_up_main_grad", normal(3, 10, 8).bfloat16())
    expect("be on .* like the first argument, got meta", "down_main_grad", normal(3, 8, 5).to("meta"))
    expect(
        r"be contiguous, because it is added to in place, got strides \(40, 1, 8\)",
        "down_main_grad",
        normal(3, 5, 8).mT,
    )
    expect(
        "not require a gradient, because it is added to in place, got one that does",
        "gate_up_main_grad",
        normal(3, 10, 8).requires_grad_(),
    )
    expect("be a tensor or None, got float", "gate_up_main_grad", 0.0)
    with torch.inference_mode():
        made_there = torch.zeros(3, 8, 5, device=DEVICE)
    expect(
        "not be made under torch.inference_mode, .* changes, got one that is", "down_main_grad", made_there
    )
    for fn, rows in ((grouped_gemm, 8), (gathered_grouped_gemm, 4)):
        with pytest.raises(
            ValueError,
            match=rf"^{fn.__name__}: main_grad must have the shape of weight, \(3, 10, 8\), got \(1",
        ):
            fn(normal(rows, 8), up, plan, main_grad_EOI=normal(1, 10, 8))


def test_a_main_gradient_in_the_memory_of_another_tensor_is_refused():
    plan = make_plan(torch.zeros(4, 2, dtype=torch.int32, device=DEVICE), 3)
    flat = torch.zeros(600, device=DEVICE)
    x, weight = normal(4, 8), normal(4, 2)
    up, down, up_sum, down_sum = flat[:240], flat[240:360], flat[360:], flat[480:]

    def call(up_sum, down_sum):
        sums = {
            "gate_up_main_grad": None if up_sum is None else up_sum.view(3, 10, 8),
            "down_main_grad": None if down_sum is None else down_sum.view(3, 8, 5),
        }
        expert_ffn(x, up.view(3, 10, 8), down.view(3, 8, 5), weight, plan, **sums)

    for name, other, sums in (
        ("gate_up_main_grad", "gate_up_proj", (flat[239:479], None)),
        ("gate_up_main_grad", "down_proj", (flat[359:599], None)),
        ("down_main_grad", "down_proj", (None, flat[359:479])),
        ("down_main_grad", "gate_up_main_grad", (up_sum, down_sum)),
    ):
        message = f"^expert_ffn: {name} must not share memory with {other}, because .*, got one that does$"
        with pytest.raises(ValueError, match=message):
            call(*sums)
    call(up_sum, None)  # one storage, from where the weights end
    call(None, flat[360:480])
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(ValueError, match="gate_up_proj"):
        call(up, None)  # where the products take a copy of the weight
    for fn, rows in ((grouped_gemm, 8), (gathered_grouped_gemm, 4)):
        with pytest.raises(
            ValueError, match=f"^{fn.__name__}: main_grad must not share memory with weight, "
        ):
            fn(normal(rows, 8), up.view(3, 10, 8), plan, main_grad_EOI=flat[1:241].view(3, 10, 8))
