"""At most five steps from a layer to a kernel: what docs/kernels.md shows, the source says and runs do."""

import sys
from pathlib import Path

import moe_runtime_kernels
import pytest
import torch
from interpreter import interpreted, needs_interpreter
from moe_runtime_kernels._dispatch import KERNELS
from tiny_models import BAM, BAM_SHARED_KV_TOP_K, BAM_TOP_K, MOE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.walk import PAGE, ROOT, public_functions, render_page, walks
from moe_runtime.block import Block

LAYERS = {
    "moe": (MOE, {"MoEFeedForward", "TopKRouter", "Experts"}),
    "moe-dropout": (MOE | {"expert_dropout": 0.5}, {"MoEFeedForward", "TopKRouter", "Experts"}),
    "soft-attention": (BAM, {"MixtureProjection"}),
    "top-k-attention": (BAM_TOP_K, {"MixtureOfAttention", "TopKSoftRouter"}),
    "top-k-attention-shared-kv": (BAM_SHARED_KV_TOP_K, {"RoutedQueryProjection", "RoutedMixtureProjection"}),
}
# frames of a launch by the folder their code is in; the dispatch mode below stands for the operation
STEPS = {
    ROOT / "moe_runtime": "module",
    ROOT / "kernels" / "moe_runtime_kernels": "function",
    Path(__file__): "operation",
    ROOT / "kernels" / "moe_runtime_kernels" / "_triton": "launcher",
}
IN_FORWARD = ["module", "function", "operation", "launcher"]


def test_the_page_shows_what_the_source_says():
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run: python -m benchmarks.walk"


def test_every_operation_and_function_is_shown():
    shown = walks()
    assert {walk.operation: tuple(walk.launcher.split(".")) for walk in shown} == KERNELS
    functions = {name for name in moe_runtime_kernels.__all__ if name in public_functions()}
    assert {name for name in moe_runtime_kernels.__all__ if name[0].islower()} == functions
    assert {walk.function for walk in shown} == functions - {"route_expert_choice", "plan_memory"}
    assert all(walk.kernels for walk in shown)


def step(frame) -> str | None:
    """Which step a frame belongs to: that of its file, or of the closest folder around it."""
    path = Path(frame.f_code.co_filename)
    if path == Path(__file__):
        return "operation" if frame.f_code.co_name == "__torch_dispatch__" else None
    return next((STEPS[folder] for folder in path.parents if folder in STEPS), None)


class Launches(TorchDispatchMode):
    """Every launch as (operation, kernel, its steps from the outside, neighbours of one kind as one).

    Fails where an operation of this project calls another.
    """

    def __init__(self):
        super().__init__()
        self.operation = None
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "moe_runtime":
            return func(*args, **(kwargs or {}))
        assert self.operation is None, f"{self.operation} calls {func.name()}"
        self.operation = func.name()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.operation = None

    def record(self, kernel):
        frame, steps = sys._getframe(2), []
        while frame is not None:
            kind = step(frame)
            if kind and steps[:1] != [kind]:
                steps.insert(0, kind)
            frame = frame.f_back
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        self.seen.append((self.operation, name, steps))


@pytest.fixture
def launches(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    launches, run = Launches(), InterpretedFunction.run

    def recording(self, *args, **kwargs):
        launches.record(self.fn)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recording)
    return launches


@needs_interpreter
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_walks_the_steps_that_are_shown(name, launches):
    kind, modules = LAYERS[name]
    config = tiny_model(kind).config.model_config()
    block = Block(config.block_config(0)).train()
    present = {type(module).__name__ for module in block.modules()}
    assert modules <= present
    x_BLD = torch.randn(2, 3, config.hidden_size, requires_grad=True)
    with interpreted(), launches:
        out = block(x_BLD)
        in_forward = len(launches.seen)
        (out.x_BLD.sum() + out.balance_loss + out.z_loss).backward()
    assert 0 < in_forward < len(launches.seen)
    shown = {walk.operation: walk.kernels for walk in walks() if present & set(walk.modules)}
    for number, (operation, kernel, steps) in enumerate(launches.seen):
        # autograd, not the module, calls a function's backward
        assert steps == (IN_FORWARD if number < in_forward else IN_FORWARD[1:]), (operation, kernel)
        assert kernel in shown[operation], operation
