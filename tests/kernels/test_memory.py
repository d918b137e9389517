"""plan_memory against what the launchers allocate, on tensors without memory, and the saved tensors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import Routing, choose, normal
from interpreter import needs_interpreter
from moe_runtime_kernels import MemoryPlan, expert_ffn, make_plan, plan_memory
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QWEN = {"T": 8192, "D": 2048, "F": 768, "E": 128, "K": 8}
# (T, D, F, E, K): of a model, few tokens, odd widths, more experts than choices, and which stage has the peak
SIZES = [
    pytest.param((8192, 2048, 768, 128, 8), id="qwen3-30b-a3b"),
    pytest.param((65536, 2048, 768, 16, 8), id="large-experts"),
    pytest.param((512, 64, 4096, 2, 2), id="narrow-model"),
    pytest.param((1000, 4096, 64, 4, 4), id="narrow-experts"),
    pytest.param((1, 2048, 768, 128, 8), id="one-token"),
    pytest.param((33, 100, 33, 5, 3), id="odd"),
    pytest.param((0, 64, 32, 4, 2), id="no-tokens"),
]
OPTIONS = [
    {},
    {"recompute": True},
    {"main_grad": True},
    {"recompute": True, "main_grad": True},
    {"frozen_experts": True},
    {"frozen_experts": True, "recompute": True},
    {"training": False},
]


class Allocations(TorchDispatchMode):
    """Bytes of storages made inside that are alive, and the most at once; not of those there before.

    A buffer of 0 bytes takes no memory, and a storage dies with its last tensor, as on a GPU.
    """

    def __init__(self, *before):
        super().__init__()
        self.before = [x.untyped_storage() for x in before if isinstance(x, torch.Tensor)]
        self.known = {storage._cdata for storage in self.before}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.most_buffers = 0

    def now(self) -> int:
        self.alive = {key: made for key, made in self.alive.items() if not made[0].expired()}
        return sum(nbytes for _, nbytes in self.alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.now()
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known and storage.nbytes() > 0:
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.now())
        self.most_buffers = max(self.most_buffers, len(self.alive))
        return out


class NoKernel:
    """A kernel that is not launched."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def _no_kernels(monkeypatch):
    from moe_runtime_kernels._triton import combine, expert_ffn, grouped_gemm, grouped_wgrad, permute, plan

    for module in (combine, expert_ffn, grouped_gemm, grouped_wgrad, permute, plan):
        for name in vars(module):
            if name.startswith("_") and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NoKernel())


def launched(T, D, F, E, K, dtype, gated, bias, options):
    """(forward's peak, what stays of it, backward's peak, what stays of it) as the launchers allocate."""
    from moe_runtime_kernels._triton.expert_ffn import launch_expert_ffn, launch_expert_ffn_backward
    from moe_runtime_kernels._triton.plan import launch_make_plan

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    G, training = 2 * F if gated else F, options.get("training", True)
    x, grad, gate_up, down = empty(T, D), empty(T, D), empty(E, G, D), empty(E, D, F)
    biases = (empty(E, G), empty(E, D)) if bias else (None, None)
    gates, expert = empty(T, K, dtype=torch.float32), empty(T, K, dtype=torch.int32)
    keep_h = training and not options.get("recompute", False)
    with Allocations(x, gate_up, down, *biases, gates, expert) as forward:
        plan = launch_make_plan(expert, E)
        results = launch_expert_ffn(x, gate_up, down, *biases, gates, None, *plan, "silu", keep_h)
    stays = forward.now()
    if not training:
        return forward, stays, None, 0
    frozen = options.get("frozen_experts", False)
    needs = [True, not frozen, not frozen, bias and not frozen, bias and not frozen, True]
    sums = [
        empty(*w.shape, dtype=torch.float32) if options.get("main_grad") else None for w in (gate_up, down)
    ]
    h = results[1] if keep_h else None
    inputs = (grad, x, gate_up, down, *biases, gates, *plan, h, "silu", needs, *sums)
    with Allocations(*inputs) as backward:
        grads = launch_expert_ffn_backward(*inputs)
    returned = backward.now()
    assert sum(dx.nbytes for dx in grads) == returned
    return forward, stays, backward, returned


@needs_interpreter
@pytest.mark.usefixtures("_no_kernels")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "all-kept")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_what_the_launchers_allocate(sizes, gated, bias, options):
    T, D, *_, K = sizes
    for dtype in DTYPES:
        planned = plan_memory(*sizes, dtype=dtype, gated=gated, bias=bias, **options)
        forward, stays, backward, returned = launched(*sizes, dtype, gated, bias, options)
        output = dtype.itemsize * T * D
        assert planned.forward_peak_bytes == forward.peak
        assert planned.forward_workspace_bytes == forward.peak - stays
        assert planned.gradient_bytes == returned
        # the buffers that the allocator rounds up
        assert forward.most_buffers <= 16
        if backward is None:
            assert planned.saved_bytes == planned.backward_peak_bytes == 0
            continue
        assert planned.backward_peak_bytes == backward.peak
        assert planned.backward_workspace_bytes == backward.peak - returned
        assert planned.saved_bytes == stays - output + dtype.itemsize * T * D + 4 * T * K
        assert backward.most_buffers <= 16


@needs_interpreter
def test_blocks_of_hidden_columns_are_those_of_the_launch():
    from moe_runtime_kernels._triton.expert_ffn import choose_dh_launch
    from moe_runtime_kernels.memory import _hidden_block

    for N in (0, 1, 16, 17, 63, 64, 1000, 2**20):
        for E in (1, 3, 4, 128):
            for itemsize, aligned in ((2, True), (2, False), (4, True), (4, False)):
                for family in ("cuda80", "cuda90", "cuda100", "hip"):
                    launch = choose_dh_launch(itemsize, N, E, aligned=aligned, family=family)
                    assert _hidden_block(itemsize, N, E, aligned=aligned) == launch.block_f, (N, E, itemsize)


def layer_on_this_device(dtype, recompute, frozen, main_grad):
    """The sizes, the layer as a function of x and gates, its leaves, and an upstream gradient."""
    T, D, F, E, K = 96, 64, 48, 6, 2
    expert_TK = choose(Routing(T, K, E))
    gate_up = normal(E, 2 * F, D, dtype=dtype).requires_grad_(not frozen)
    down = normal(E, D, F, dtype=dtype).requires_grad_(not frozen)
    x, gates = normal(T, D, dtype=dtype).requires_grad_(), normal(T, K).requires_grad_()
    sums = {
        f"{name}_main_grad": torch.zeros_like(weight, dtype=torch.float32)
        for name, weight in (("gate_up", gate_up), ("down", down))
        if main_grad
    }

    def fn():
        return expert_ffn(x, gate_up, down, gates, make_plan(expert_TK, E), recompute=recompute, **sums)

    weights = () if frozen else (gate_up, down)
    return (T, D, F, E, K), fn, (x, gates, *weights), normal(T, D, dtype=dtype)


CHOICES = [
    pytest.param(recompute, frozen, main_grad, id="-".join(("recompute",) * recompute + (name,)))
    for recompute in (False, True)
    for name, frozen, main_grad in (("trained", 0, 0), ("frozen", 1, 0), ("main-grad", 0, 1))
]


@pytest.mark.parametrize(("recompute", "frozen", "main_grad"), CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_bytes_are_those_of_the_saved_tensors(dtype, recompute, frozen, main_grad):
    sizes, fn, *_ = layer_on_this_device(dtype, recompute, frozen, main_grad)
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = (x.nbytes, x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fn()
    _, D, F, E, _ = sizes
    parameters = ((E, 2 * F, D), (E, D, F))
    assert sum(shape in parameters for _, shape in saved.values()) == 2
    planned = plan_memory(
        *sizes, dtype=dtype, recompute=recompute, frozen_experts=bool(frozen), main_grad=bool(main_grad)
    )
    assert planned.saved_bytes == sum(n for n, shape in saved.values() if shape not in parameters)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("recompute", "frozen", "main_grad"), CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_a_gpu_says(dtype, recompute, frozen, main_grad):
    sizes, fn, leaves, grad = layer_on_this_device(dtype, recompute, frozen, main_grad)
    leaves = leaves[:2] if main_grad else leaves
    planned = plan_memory(
        *sizes, dtype=dtype, recompute=recompute, frozen_experts=bool(frozen), main_grad=bool(main_grad)
    )
    rounding = 16 * 512
    for _ in range(2):  # the first run compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = fn()
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(y, leaves, grad)
        backward = torch.cuda.max_memory_allocated() - before
        del y, grads
    assert planned.forward_peak_bytes <= forward <= planned.forward_peak_bytes + rounding
    assert planned.backward_peak_bytes <= backward <= planned.backward_peak_bytes + rounding


def mebibytes(planned: MemoryPlan) -> str:
    numbers = (
        planned.saved_bytes,
        planned.forward_peak_bytes,
        planned.backward_peak_bytes,
        planned.gradient_bytes,
        planned.main_grad_bytes,
    )
    return " | ".join(f"{number / 2**20:.0f}" for number in numbers)


def test_the_table_in_the_documentation_is_what_it_says():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| options | saved | forward | backward | gradients | main gradients |\n")
    rows = table.partition("\n\n")[0].splitlines()[1:]
    expected = [
        f"| {', '.join(f'`{name}={value}`' for name, value in options.items()) or 'none'} "
        f"| {mebibytes(plan_memory(**QWEN, **options))} |"
        for options in OPTIONS
    ]
    assert rows == expected, "\n".join(expected)


def test_triton_is_not_imported():
    code = (
        "import sys; from moe_runtime_kernels import plan_memory; plan_memory(8, 16, 16, 4, 2); "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"T": -1}, "plan_memory: T must be at least 0, got -1"),
        ({"F": 0}, "plan_memory: F must be at least 1, got 0"),
        ({"E": 1025}, "plan_memory: E must be at most 1024, got 1025"),
        ({"K": 129}, "plan_memory: K must be at most E, 128, got 129"),
        ({"T": 2**28}, r"plan_memory: T \* K must be less than 2\*\*31, got 2147483648"),
        ({"T": 8192.0}, r"plan_memory: T must be an int, got 8192\.0"),
        ({"E": "128"}, "plan_memory: E must be an int, got '128'"),
        ({"dtype": torch.float64}, "plan_memory: dtype must be one of 'bfloat16', .*, got 'float64'"),
        (
            {"recompute": True, "training": False},
            "plan_memory: recompute must be False without training, got True",
        ),
        (
            {"main_grad": True, "frozen_experts": True},
            "plan_memory: main_grad must be False with frozen_experts, got True",
        ),
    ],
)
def test_bad_sizes_and_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(**QWEN | options)
