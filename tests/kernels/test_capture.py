"""Nothing on the way to a kernel waits for the device: launchers read no value, and graphs hold layers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from inputs import DEVICE
from interpreter import needs_interpreter
from moe_runtime_kernels import expert_ffn, gathered_grouped_gemm, grouped_gemm, make_plan
from moe_runtime_kernels._dispatch import KERNELS, load_launcher
from tiny_models import BAM, BAM_SHARED_KV_TOP_K, BAM_TOP_K, MOE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_runtime.block import Block
from moe_runtime.config import BlockConfig
from moe_runtime.hf import MoeRuntimeConfig

WIDE = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 48}
LAYERS = {
    "moe": MOE | {"mlp_bias": True},
    "moe-dropout": MOE | {"expert_dropout": 0.5, "mlp_bias": True},
    "soft-attention": BAM | {"attention_output_bias": True},
    "top-k-attention": BAM_TOP_K | {"qk_norm": "rms_norm", "attention_bias": True},
    "top-k-attention-shared-kv": BAM_SHARED_KV_TOP_K | {"attention_output_bias": True},
}


def needs_gpu(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def block_config(kind: dict) -> BlockConfig:
    return MoeRuntimeConfig(**(kind | WIDE)).model_config().block_config(0)


# --- without a GPU: tensors without values ---


class Launchers(TorchDispatchMode):
    """Operations on meta tensors are their launchers, which give what the fake implementations promise."""

    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in tree_leaves((args, kwargs)):
            on_host = isinstance(x, Tensor) and x.device.type != "meta" and x.dim() > 0
            assert not on_host, f"{func.name()} takes a tensor from the host, which a copy would wait for"
        if func.namespace != "moe_runtime":
            return func(*args, **kwargs)
        self.ran.add(func.name())
        actual, promised = load_launcher(func.name())(*args, **kwargs), func(*args, **kwargs)
        for x, y in zip(tree_leaves(actual), tree_leaves(promised), strict=True):
            if x is y is None:
                continue
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), func.name()
        return actual


@pytest.fixture
def kernels_do_nothing(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    launched = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: launched.append(self.fn))
    return launched


@needs_interpreter
@pytest.mark.parametrize(("batch", "length"), [(2, 9), (3, 200), (1, 1), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layers_need_no_value_of_a_tensor(dtype, batch, length, kernels_do_nothing):
    """A meta tensor has none, so that .item(), .tolist(), .cpu(), nonzero() or a condition on it raises."""
    ran = set()
    for kind in LAYERS.values():
        with torch.device("meta"):
            block = Block(block_config(kind)).train().to(dtype)
            x_BLD = torch.empty(batch, length, WIDE["hidden_size"], dtype=dtype, requires_grad=True)
        with Launchers() as launchers:
            out = block(x_BLD)
            (out.x_BLD.float().sum() + out.balance_loss + out.z_loss).backward()
        assert x_BLD.grad.shape == x_BLD.shape
        ran |= launchers.ran
    # main gradients are given to operations, not to layers
    assert {name for name in KERNELS if "_add_" not in name} == ran, "a layer is missing here"
    assert kernels_do_nothing


@needs_interpreter
@pytest.mark.parametrize("T", [0, 1, 18, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_main_gradients_need_no_value_of_a_tensor(dtype, T, kernels_do_nothing):
    step = adding_step(dtype, 0, "meta")
    with Launchers() as launchers:
        step(torch.empty(1, T, 64, dtype=dtype, device="meta"))
    adding = {name for name in KERNELS if "_add_" in name}
    assert adding <= launchers.ran, "an operation is missing here"
    assert kernels_do_nothing


@needs_interpreter
def test_reading_a_value_would_be_noticed(monkeypatch, kernels_do_nothing):
    from moe_runtime_kernels._triton import combine

    original = combine.launch_combine
    for read in (
        lambda row: row.max().item(),
        lambda row: row.tolist(),
        lambda row: row.cpu(),
        lambda row: row.nonzero(),
        lambda row: bool((row > 0).any()),
    ):

        def launch(y, weight, row, *rest, read=read):
            read(row)
            return original(y, weight, row, *rest)

        monkeypatch.setattr(combine, "launch_combine", launch)
        load_launcher.cache_clear()
        y, weight = torch.empty(4, 8, device="meta"), torch.empty(2, 2, device="meta")
        row = torch.empty(2, 2, dtype=torch.int32, device="meta")
        with Launchers(), pytest.raises((RuntimeError, NotImplementedError)):
            torch.ops.moe_runtime.combine(y, weight, row, None, None)
    load_launcher.cache_clear()


# --- with a GPU: capture and replay ---


class Passing(nn.Module):
    """In the place of attention, which is PyTorch's and of which not every kernel is deterministic."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        mixed = (key + value).mean(1, keepdim=True)
        return (query * mixed).transpose(1, 2), None


def forward_and_backward(kind: dict, dtype: torch.dtype, seed: int) -> Callable[[Tensor], list[Tensor]]:
    """x_BLD -> the layer's output and the gradients of x and of all parameters."""
    torch.manual_seed(seed)
    block = Block(block_config(kind), attend=Passing()).to(DEVICE, dtype)
    parameters = list(block.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.2)

    def step(x_BLD: Tensor) -> list[Tensor]:
        x_BLD = x_BLD.detach().requires_grad_()
        out = block(x_BLD)
        loss = out.x_BLD.float().square().sum() + out.balance_loss + out.z_loss
        return [out.x_BLD.detach(), *torch.autograd.grad(loss, [x_BLD, *parameters])]

    return step


def adding_step(dtype: torch.dtype, seed: int, device: str = DEVICE) -> Callable[[Tensor], list[Tensor]]:
    """x_BLD -> the output of operations one after the other, the gradient of x and all main gradients."""
    E, D, F, K = 5, 64, 48, 2
    torch.manual_seed(seed)
    shapes = ((E, 2 * F, D), (E, D, F), (E, D, D), (E, F, D))
    weights = [0.2 * torch.randn(shape, device=device) for shape in shapes]
    gate_up, down, first, second = (weight.to(dtype).requires_grad_() for weight in weights)
    up_sum, down_sum, first_sum, second_sum = sums = [torch.zeros_like(weight) for weight in weights]

    def step(x_BLD: Tensor) -> list[Tensor]:
        x_TD = x_BLD.detach().flatten(0, 1).requires_grad_()
        for x in sums:
            x.zero_()
        logits_TE = x_TD.detach()[:, :E].float()
        plan = make_plan(logits_TE.argsort(dim=1, stable=True)[:, :K].int(), E)
        gates_TK = torch.full((x_TD.shape[0], K), 0.5, device=x_TD.device)
        main_grads = {"gate_up_main_grad": up_sum, "down_main_grad": down_sum}
        y_TD = expert_ffn(x_TD, gate_up, down, gates_TK, plan, **main_grads)
        y_ND = gathered_grouped_gemm(y_TD, first, plan, main_grad_EOI=first_sum)
        y_NF = grouped_gemm(y_ND, second, plan, main_grad_EOI=second_sum)
        (dx_TD,) = torch.autograd.grad(y_NF.float().square().sum(), x_TD)
        return [y_NF.detach(), dx_TD, *(x.clone() for x in sums)]

    return step


STEPS = {name: partial(forward_and_backward, kind) for name, kind in LAYERS.items()}
STEPS["main-gradients"] = adding_step
DETERMINISTIC = {name: make for name, make in STEPS.items() if name != "moe-dropout"}


@pytest.mark.parametrize("make", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_a_step_gives_equal_bits(make):
    """What the replay is compared with."""
    step, x_BLD = make(torch.float32, 0), torch.randn(2, 9, 64, device=DEVICE)
    for first, second in zip(step(x_BLD), step(x_BLD.clone()), strict=True):
        assert torch.equal(first, second)
        assert first.isfinite().all()
        assert first.any()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_a_graph_of_forward_and_backward_replays_for_other_tokens(make, dtype):
    from benchmarks.alternate import captured

    step, shape = make(dtype, 0), (2, 260, 64)
    static_BLD, results = torch.randn(shape, device=DEVICE, dtype=dtype), []

    def once():
        results[:] = step(static_BLD)

    replay = captured(once, 1)
    for seed in (1, 2):  # other tokens choose other experts
        generator = torch.Generator(DEVICE).manual_seed(seed)
        static_BLD.copy_(torch.randn(shape, generator=generator, device=DEVICE))
        replay()
        for replayed, eager in zip(results, step(static_BLD), strict=True):
            assert torch.equal(replayed, eager)


@needs_gpu
@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_no_step_waits_for_the_device(make):
    step, x_BLD = make(torch.bfloat16, 0), torch.randn(2, 260, 64, device=DEVICE)
    step(x_BLD.bfloat16())  # compiles, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x_BLD.bfloat16())
    finally:
        torch.cuda.set_sync_debug_mode("default")
