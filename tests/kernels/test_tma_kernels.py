"""Matrices loaded through TMA descriptors, on a GPU that has them or in Triton's interpreter.

Results are as exact as the definition's, and in the interpreter every bit is that of pointer loads.
"""

from dataclasses import replace

import pytest
import torch
from close import assert_close_to_exact
from expert_layers import dense_experts, gemm_by_hand, layer, make_inputs
from inputs import DEVICE, Routing, choose, normal, run
from interpreter import as_kernels, needs_kernels
from moe_runtime_kernels import gathered_grouped_gemm, grouped_gemm, make_plan
from moe_runtime_kernels.plan import TILE_HEIGHTS

pytestmark = [
    needs_kernels,
    # raised by Triton 3.6, whose interpreter takes a loop's bound out of an array
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

# expert 0 has no rows, and rows are left over; the widths take more than one block, and no block divides them
ROUTING = Routing(40, 2, 3, "sentinels")
I, O = 80, 144


@pytest.fixture(autouse=True)
def _kernels():
    names = ("grouped_gemm", "gathered_grouped_gemm", "grouped_gemm_input_grad", "grouped_gemm_weight_grad")
    with as_kernels(*names, "gathered_grouped_gemm_weight_grad", "expert_ffn", "expert_ffn_backward"):
        yield


def family_with_descriptors():
    """This device's, or the one that the interpreter counts as."""
    from moe_runtime_kernels._triton.launch import SINCE_HOPPER, device_family

    family = device_family(torch.device(DEVICE))
    if family not in SINCE_HOPPER:
        pytest.skip(f"{family} has no descriptors")
    return family


def make_routing():
    expert_TK = choose(ROUTING)
    return expert_TK.where(expert_TK != 0, ROUTING.E)


def pin(monkeypatch, module, name, **fields):
    """Make a launch choice give these fields; a list of the choices made, which must not be empty."""
    choose_launch, made = getattr(module, name), []

    def pinned(*sizes, **more):
        made.append(replace(choose_launch(*sizes, **more), **fields))
        return made[-1]

    monkeypatch.setattr(module, name, pinned)
    return made


def by_descriptors_and_by_pointers(monkeypatch, choices, compute):
    """Results of `compute` with tma, which the choices must make on their own, and without."""
    results = []
    for fields in ({}, {"tma": False}):
        with monkeypatch.context() as patch:
            made = [pin(patch, *choice, **fields) for choice in choices]
            results.append(compute())
        assert all(launches for launches in made)
        assert {launch.tma for launches in made for launch in launches} == {not fields}
    return results


def assert_agree(descriptors, pointers, definition, inputs, grad):
    """With `definition`; its first expert, which has no rows, has finite numbers."""
    expected, exact = (run(definition, inputs, grad, dtype) for dtype in (None, torch.float64))
    for name, value in pointers.items():
        assert_close_to_exact(name, descriptors[name], expected[name], exact[name])
        assert_close_to_exact(name, value, expected[name], exact[name])
        if DEVICE == "cpu":
            assert torch.equal(descriptors[name], value), name


@pytest.mark.parametrize("height", TILE_HEIGHTS)
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gathered"])
def test_grouped_products(gathered, height, monkeypatch):
    from moe_runtime_kernels._triton import grouped_gemm as kernels

    chosen = kernels.choose_launch(2, height, 1, aligned=True, family=family_with_descriptors())
    monkeypatch.setattr(kernels, "choose_launch", lambda *sizes, **more: chosen)
    plan, fn = make_plan(make_routing(), ROUTING.E), gathered_grouped_gemm if gathered else grouped_gemm
    N = ROUTING.T * ROUTING.K
    inputs = {
        "x": normal(ROUTING.T if gathered else N, I, dtype=torch.float16),
        "weight": normal(ROUTING.E, O, I, dtype=torch.float16, scale=I**-0.5),
        "bias": normal(ROUTING.E, O, dtype=torch.float16),
    }
    finite = inputs | {"weight": inputs["weight"].clone()}
    inputs["weight"][0] = torch.nan  # next to the first expert with rows, and in nobody's product
    grad = normal(N, O, dtype=torch.float16)

    def compute():
        return run(lambda x, weight, bias: fn(x, weight, plan, bias), inputs, grad)

    def definition(x, weight, bias):
        return gemm_by_hand(plan, x[plan.token_N.clamp(min=0).long()] if gathered else x, weight, bias)

    choices = [(kernels, "choose_launch")]
    results = by_descriptors_and_by_pointers(monkeypatch, choices, compute)
    assert_agree(*results, definition, finite, grad)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("height", TILE_HEIGHTS)
def test_expert_layers(height, gated, monkeypatch):
    from moe_runtime_kernels._triton import expert_ffn as kernels

    family, expert_TK = family_with_descriptors(), make_routing()
    up = kernels.choose_up_launch(2, height, 1, gated=gated, aligned=True, family=family)
    dh = kernels.choose_dh_launch(2, height, 1, aligned=True, family=family)
    monkeypatch.setattr(kernels, "choose_up_launch", lambda *sizes, **more: up)
    monkeypatch.setattr(kernels, "choose_dh_launch", lambda *sizes, **more: dh)
    inputs, grad = make_inputs(ROUTING, torch.float16, gated=gated, D=I, F=O)
    finite = {name: x.clone() for name, x in inputs.items()}
    inputs["gate_up"][0] = inputs["down"][0] = torch.nan
    fn = layer(make_plan(expert_TK, ROUTING.E))
    choices = [(kernels, "choose_up_launch"), (kernels, "choose_dh_launch")]
    results = by_descriptors_and_by_pointers(monkeypatch, choices, lambda: run(fn, inputs, grad))
    assert_agree(*results, lambda **i: dense_experts(expert_TK, "silu", **i), finite, grad)


def test_a_single_expert_whose_stride_says_nothing():
    plan = make_plan(torch.zeros(20, 1, dtype=torch.int32, device=DEVICE), 1)
    weight = normal(1, O, I, dtype=torch.float16)
    strange = weight.as_strided(weight.shape, (3, I, 1))
    assert strange.is_contiguous()
    x = normal(20, I, dtype=torch.float16)
    assert torch.equal(grouped_gemm(x, strange, plan), grouped_gemm(x, weight, plan))


def test_no_inner_width():
    plan = make_plan(torch.zeros(20, 1, dtype=torch.int32, device=DEVICE), 1)
    x, weight = normal(20, 0, dtype=torch.float16), normal(1, O, 0, dtype=torch.float16)
    assert not grouped_gemm(x, weight, plan).any()


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((128, 4096, 4096), True),
        ((0, 16, 16), False),
        ((4, 16, 0), False),
        ((2, 2**31 - 16, 16), True),
        ((2, 2**31, 16), False),
        ((2, 16, 2**31), False),
        ((2**31, 16, 16), False),
        ((2, 2**20, 2**18), True),
        ((2, 2**20, 2**19), False),
    ],
)
def test_what_a_descriptor_can_hold(shape, fits):
    from moe_runtime_kernels._triton.tiles import describable

    assert describable(torch.empty(shape, dtype=torch.bfloat16, device="meta")) == fits


@pytest.mark.parametrize("family", ["cuda80", "cuda90", "cuda100", "hip"])
@pytest.mark.parametrize("height", TILE_HEIGHTS)
def test_who_loads_through_descriptors(height, family):
    from moe_runtime_kernels._triton.expert_ffn import choose_dh_launch, choose_up_launch
    from moe_runtime_kernels._triton.grouped_gemm import choose_launch

    for itemsize, aligned in ((2, True), (2, False), (4, True), (4, False)):
        sizes, more = (itemsize, height, 1), {"aligned": aligned, "family": family}
        wanted = family in ("cuda90", "cuda100") and itemsize == 2 and aligned
        assert choose_launch(*sizes, **more).tma == wanted
        assert choose_dh_launch(*sizes, **more).tma == wanted
        assert choose_up_launch(*sizes, gated=True, **more).tma == wanted
        assert choose_up_launch(*sizes, gated=False, **more).tma == wanted


def test_matrices_that_no_descriptor_holds_are_loaded_by_pointers(monkeypatch):
    from moe_runtime_kernels._triton import expert_ffn, grouped_gemm

    choices = [(expert_ffn, "choose_up_launch"), (expert_ffn, "choose_dh_launch")]
    made = [pin(monkeypatch, *choice) for choice in (*choices, (grouped_gemm, "choose_launch"))]
    for module in (expert_ffn, grouped_gemm):
        monkeypatch.setattr(module, "describable", lambda weight: False)
    inputs, grad = make_inputs(ROUTING, torch.float16, D=16, F=16)
    run(layer(make_plan(make_routing(), ROUTING.E)), inputs, grad)
    assert [len(launches) for launches in made] == [1, 1, 2]
    assert not any(launch.tma for launches in made for launch in launches)
