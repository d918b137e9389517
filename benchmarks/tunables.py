"""The kernels whose launches `python -m benchmarks tune` measures: what chooses them, and what is timed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from moe_runtime_kernels import make_plan
from torch import Tensor

from benchmarks.exact import make_layer
from benchmarks.shapes import EXPERTS, MIXES, ExpertShape, MixShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Shape = ExpertShape | MixShape
Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """A kernel by its name in the table.

    Args:
        file: of `_triton/`, `function` the kernel in it and `choice` what chooses its launch.
        labels: words of the label of its compilations.
        shapes: those it can be measured in.
        sizes: inner, outer, groups and rows of its product, for a shape and a number of tokens; by them
            the table is looked up.
        arguments: of `choice` after the first, and its keywords, for the same.
        call: what is timed, for the same, on the device that is there.
        unused: fields of its launch that it does not read.
    """

    kernel: str
    file: str
    function: str
    choice: str
    labels: tuple[str, ...] = ()
    shapes: dict[str, Any]
    sizes: Callable[[Any, int], tuple[int, int, int, int]]
    arguments: Callable[[Any, int], tuple[tuple[int, ...], dict[str, Any]]]
    call: Callable[[Any, int], Call]
    unused: tuple[str, ...] = ()

    def module(self) -> Any:
        return import_module(f"moe_runtime_kernels._triton.{self.file}")

    def closed_form(self, shape: Shape, T: int, family: str) -> Any:
        """What is chosen where the table has nothing."""
        sizes, keywords = self.arguments(shape, T)
        return getattr(self.module(), self.choice)(2, *sizes, aligned=True, family=family, **keywords)

    def choose(self, shape: Shape, T: int, family: str) -> Any:
        """What is chosen with the table as it is."""
        from moe_runtime_kernels._triton.tuned import Case

        sizes, keywords = self.arguments(shape, T)
        case = Case(self.kernel, *self.sizes(shape, T))
        choose = getattr(self.module(), self.choice)
        return choose(2, *sizes, aligned=True, family=family, case=case, **keywords)

    def is_of(self, compilation: Any) -> bool:
        """In bfloat16, aligned, without dependent launch; what is added to a main gradient is another one."""
        words = compilation.label.split()
        wanted = {"bf16", *self.labels} <= set(words) and compilation.kernel.fn.__name__ == self.function
        return wanted and not compilation.options.pdl and not {"odd", "added"} & set(words)


@contextmanager
def chosen(tunable: Tunable, launch: Any) -> Iterator[None]:
    """Inside, the kernel's launch choice is this launch, whatever the sizes."""
    module = tunable.module()
    choose = getattr(module, tunable.choice)
    setattr(module, tunable.choice, lambda *sizes, **keywords: launch)
    try:
        yield
    finally:
        setattr(module, tunable.choice, choose)


# --- what is timed: operations, by their schemas' names, on random numbers --------------


def operation(name: str, **values: Any) -> Call:
    """A call of an operation, with those of the values that its schema names."""
    op = getattr(torch.ops.moe_runtime, name).default
    arguments = {argument.name: values[argument.name] for argument in op._schema.arguments}
    return lambda: op(**arguments)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)


def product_call(kind: str, shape: ExpertShape, T: int) -> Call:
    """One grouped product: "plain" is a down-projection, "transposed" the input gradient of the other."""
    layer = make_layer(T, shape.D, shape.F, shape.E, shape.K, DEVICE)
    plan, N = make_plan(layer.expert_TK, shape.E), T * shape.K
    schedule = {"token": plan.token_N, "offset": plan.offset_E, "tile_end": plan.tile_end_ME, "bias": None}
    up, down = layer.gate_up_EGD, layer.down_EDF
    if kind == "plain":
        return operation("grouped_gemm", x=_normal(N, shape.F), weight=down, **schedule)
    if kind == "gathered":
        return operation("gathered_grouped_gemm", x=layer.x_TD, weight=up, **schedule)
    dh = _normal(N, 2 * shape.F)
    if kind == "transposed":
        return operation("grouped_gemm_input_grad", grad_out=dh, weight=up, **schedule)
    return operation("gathered_grouped_gemm_weight_grad", grad_out=dh, x=layer.x_TD, **schedule)


def layer_call(kind: str, shape: ExpertShape, T: int) -> Call:
    """A layer's forward with h kept, for "up"; the cheapest backward in which "dh" has all to write."""
    layer = make_layer(T, shape.D, shape.F, shape.E, shape.K, DEVICE)
    plan = make_plan(layer.expert_TK, shape.E)
    values: dict[str, Any] = {
        "x": layer.x_TD,
        "gate_up": layer.gate_up_EGD,
        "down": layer.down_EDF,
        "weight": layer.weight_TK,
        **dict.fromkeys(("gate_up_bias", "down_bias", "residual")),
        **{"row": plan.row_TK, "token": plan.token_N, "slot": plan.slot_N},
        **{"offset": plan.offset_E, "tile_end": plan.tile_end_ME},
        "activation": "silu",
    }
    if kind == "up":
        return operation("expert_ffn", **values, keep_h=True)
    # dh for a bias' gradient, the weighted activations for the down-projection's, and the gates'. The
    # down-projection's gradient, a product of the same size, takes the same time whatever the launch
    needs = [False, False, True, True, False, True]
    h = _normal(T * shape.K, 2 * shape.F)
    return operation("expert_ffn_backward", **values, grad_out=layer.grad_TD, h=h, needs=needs)


def mix_call(kind: str, shape: MixShape, T: int) -> Call:
    """ "forward", "input_grad" with the gates' gradient, or "weight_grad"."""
    S, A, Q, D = shape.S, shape.A, shape.Q, shape.D
    gate = torch.randn(T, A, device=DEVICE).softmax(1)
    values = {"o": _normal(T, S, A, Q), "gate": gate, "weight": _normal(D, S * A * Q)}
    if kind == "forward":
        return operation("attention_mix", **values)
    weight_only = kind == "weight_grad"
    needs = [not weight_only, not weight_only, weight_only]
    return operation("attention_mix_backward", **values, grad_out=_normal(T, D), needs=needs)


# --- the kernels ------------------------------------------------------------------------


def _by_rows(shape: ExpertShape, T: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    return (T * shape.K, shape.E), {}


_grouped = partial(
    Tunable, file="grouped_gemm", function="_grouped_gemm_kernel", choice="choose_launch", shapes=EXPERTS
)
_layer = partial(Tunable, file="expert_ffn", shapes=EXPERTS)
_mix = partial(Tunable, file="attention_mix", shapes=MIXES)

TUNABLES = (
    _grouped(
        kernel="grouped_gemm plain",
        labels=("plain",),
        sizes=lambda shape, T: (shape.F, shape.D, shape.E, T * shape.K),
        arguments=_by_rows,
        call=partial(product_call, "plain"),
    ),
    _grouped(
        kernel="grouped_gemm gathered",
        labels=("gathered",),
        sizes=lambda shape, T: (shape.D, 2 * shape.F, shape.E, T * shape.K),
        arguments=_by_rows,
        call=partial(product_call, "gathered"),
    ),
    _grouped(
        kernel="grouped_gemm transposed",
        labels=("transposed",),
        sizes=lambda shape, T: (2 * shape.F, shape.D, shape.E, T * shape.K),
        arguments=_by_rows,
        call=partial(product_call, "transposed"),
    ),
    Tunable(
        kernel="grouped_wgrad gathered x",
        file="grouped_wgrad",
        function="_weight_grad_kernel",
        choice="choose_launch",
        labels=("gathered", "x"),
        shapes=EXPERTS,
        sizes=lambda shape, T: (shape.D, 2 * shape.F, shape.E, T * shape.K),
        arguments=lambda shape, T: ((), {}),
        call=partial(product_call, "weight gradient"),
    ),
    _layer(
        kernel="expert_ffn up gated",
        function="_up_kernel",
        choice="choose_up_launch",
        labels=("gated",),
        sizes=lambda shape, T: (shape.D, shape.F, shape.E, T * shape.K),
        arguments=lambda shape, T: ((T * shape.K, shape.E), {"gated": True}),
        call=partial(layer_call, "up"),
        unused=("slices",),
    ),
    _layer(
        kernel="expert_ffn dh",
        function="_dh_kernel",
        choice="choose_dh_launch",
        sizes=lambda shape, T: (shape.D, shape.F, shape.E, T * shape.K),
        arguments=_by_rows,
        call=partial(layer_call, "dh"),
    ),
    _mix(
        kernel="attention_mix forward",
        function="_mix_kernel",
        choice="choose_forward_launch",
        sizes=lambda shape, T: (shape.S * shape.A * shape.Q, shape.D, shape.S * shape.A, T),
        arguments=lambda shape, T: ((T, shape.D), {}),
        call=partial(mix_call, "forward"),
    ),
    _mix(
        kernel="attention_mix input_grad",
        function="_input_grad_kernel",
        choice="choose_launch",
        sizes=lambda shape, T: (shape.D, shape.Q, shape.S * shape.A, T),
        arguments=lambda shape, T: ((T, shape.Q), {}),
        call=partial(mix_call, "input_grad"),
        unused=("swapped",),
    ),
    _mix(
        kernel="attention_mix weight_grad",
        function="_weight_grad_kernel",
        choice="choose_weight_grad_launch",
        sizes=lambda shape, T: (shape.Q, shape.D, shape.S * shape.A, T),
        arguments=lambda shape, T: ((shape.Q, shape.D, shape.S * shape.A), {}),
        call=partial(mix_call, "weight_grad"),
        unused=("swapped",),
    ),
)
