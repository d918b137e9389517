"""Triton kernels for attention_mix. Contract and reference: ../attention_mix.py.

A slot is one (s, a), Q neighbouring columns of o and of the weight; all of them share one gate per token. The
products walk slot by slot, so that no step meets two gates, whatever Q is.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import FLOATS, check_dtype
from .launch import FAMILIES, Compilation, Options, allow_next_kernel, device_family, wait_for_inputs
from .tiles import swizzle
from .tuned import Case, measured_first, tuned_compilations

# --- kernels: pointers end in _ptr; every block load is followed by its shape -----------


@triton.jit
def _gated(gate, o):
    """gate * o, multiplied in float32 and rounded to o's dtype, which the product takes."""
    return (gate.to(tl.float32) * o.to(tl.float32)).to(o.dtype)


@triton.jit
def _slot_columns(block, Q, WIDTH: tl.constexpr):
    """(slot, columns in the slot, columns) of a block of WIDTH; blocks are counted slot by slot."""
    blocks_per_slot = tl.cdiv(Q, WIDTH)
    slot = (block // blocks_per_slot).to(tl.int64)
    q = (block % blocks_per_slot).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    return slot, q, slot * Q + q


@triton.jit
def _mix_kernel(
    o_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    T,
    D,
    C,
    S,
    A,
    Q,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_M) * cdiv(D, BLOCK_N),): BLOCK_M tokens by BLOCK_N columns of y.

    SWAPPED computes the tile's transpose: few tokens are the narrow side.
    """
    tile, block = swizzle(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP)
    t = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # what is past the end repeats the last one, so that the loop needs no mask for it
    token = tl.minimum(t, T - 1)
    row = tl.minimum(d, D - 1)
    wait_for_inputs(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, S * A * tl.cdiv(Q, BLOCK_K)):
        slot, q, c = _slot_columns(step, Q, BLOCK_K)
        gate = tl.load(gate_ptr + (token * A + slot % A))  # [BLOCK_M]
        o_offset = token[:, None] * C + c[None, :]
        weight_offset = row[:, None] * C + c[None, :]
        inside = (q < Q)[None, :]
        o = tl.load(o_ptr + o_offset, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptr + weight_offset, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_K]
        gated = _gated(gate[:, None], o)
        if SWAPPED:
            acc = tl.dot(weight, tl.trans(gated), acc, input_precision="ieee")
        else:
            acc = tl.dot(gated, tl.trans(weight), acc, input_precision="ieee")
    allow_next_kernel(PDL)
    if SWAPPED:
        acc = tl.trans(acc)
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(y_ptr + (t[:, None] * D + d[None, :]), acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _input_grad_kernel(
    grad_ptr,
    o_ptr,
    gate_ptr,
    weight_ptr,
    do_ptr,
    partial_ptr,
    T,
    D,
    C,
    A,
    Q,
    num_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_M) * num_blocks,): G = grad @ weight, hence do = gate * G and shares of <G, o>.

    BLOCK_M tokens by BLOCK_N columns of one slot; num_blocks = slots * cdiv(Q, BLOCK_N). The shares are
    [num_blocks, T]. `do_ptr` and `partial_ptr` may be None.
    """
    tile, block = swizzle(tl.program_id(0), tl.cdiv(T, BLOCK_M), num_blocks, GROUP)
    t = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(t, T - 1)
    slot, q, c = _slot_columns(block, Q, BLOCK_N)
    wait_for_inputs(PDL)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K).to(tl.int64)
        grad_offset = token[:, None] * D + d[None, :]
        grad = tl.load(grad_ptr + grad_offset, mask=(d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        weight_mask = (d < D)[:, None] & (q < Q)[None, :]
        weight_offset = d[:, None] * C + c[None, :]
        weight = tl.load(weight_ptr + weight_offset, mask=weight_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(grad, weight, acc, input_precision="ieee")
    allow_next_kernel(PDL)
    product = acc.to(weight_ptr.dtype.element_ty)
    offset = t[:, None] * C + c[None, :]
    inside = (t < T)[:, None] & (q < Q)[None, :]
    if do_ptr is not None:
        gate = tl.load(gate_ptr + (token * A + slot % A))  # [BLOCK_M]
        tl.store(do_ptr + offset, _gated(gate[:, None], product), mask=inside)
    if partial_ptr is not None:
        o = tl.load(o_ptr + offset, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_N]
        share = tl.sum(product.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(partial_ptr + (block.to(tl.int64) * T + t), share, mask=t < T)


@triton.jit
def _gate_grad_kernel(
    partial_ptr,
    dgate_ptr,
    T,
    A,
    S,
    blocks_per_slot,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(T, ROWS), A): dgate of one expert, its shares added in the order of their columns."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    a = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    total = tl.zeros([ROWS], tl.float32)
    for index in range(0, S * blocks_per_slot):
        slot = (index // blocks_per_slot).to(tl.int64) * A + a
        block = slot * blocks_per_slot + index % blocks_per_slot
        total += tl.load(partial_ptr + (block * T + t), mask=t < T, other=0.0)  # [ROWS]
    allow_next_kernel(PDL)
    tl.store(dgate_ptr + (t * A + a), total.to(dgate_ptr.dtype.element_ty), mask=t < T)


@triton.jit
def _weight_grad_kernel(
    grad_ptr,
    o_ptr,
    gate_ptr,
    dweight_ptr,
    T,
    D,
    C,
    A,
    Q,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (num_tiles * cdiv(D, BLOCK_N),): BLOCK_M columns of one slot by BLOCK_N rows of dweight.

    num_tiles = slots * cdiv(Q, BLOCK_M).

    The tile is the transpose of dweight's, because Hopper's tensor cores take only the left operand, which is
    the one with the gate, from registers. All tokens, BLOCK_K at a time; without tokens it is zero.
    """
    tile, block = swizzle(tl.program_id(0), num_tiles, tl.cdiv(D, BLOCK_N), GROUP)
    slot, q, c = _slot_columns(tile, Q, BLOCK_M)
    d = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(PDL)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, T, BLOCK_K):
        t = start + tl.arange(0, BLOCK_K).to(tl.int64)
        gate = tl.load(gate_ptr + (t * A + slot % A), mask=t < T, other=0.0)  # [BLOCK_K]
        o_mask = (q < Q)[:, None] & (t < T)[None, :]
        o = tl.load(o_ptr + (t[None, :] * C + c[:, None]), mask=o_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        grad_mask = (t < T)[:, None] & (d < D)[None, :]
        grad = tl.load(
            grad_ptr + (t[:, None] * D + d[None, :]), mask=grad_mask, other=0.0
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(_gated(gate[None, :], o), grad, acc, input_precision="ieee")
    allow_next_kernel(PDL)
    inside = (q < Q)[:, None] & (d < D)[None, :]
    tl.store(dweight_ptr + (d[None, :] * C + c[:, None]), acc.to(dweight_ptr.dtype.element_ty), mask=inside)


# --- launch choice: a pure function of sizes, so that it can be tested without a GPU ----


@dataclass(frozen=True, kw_only=True)
class MixLaunch:
    """Tiles of `block_m` by `block_n`, `block_k` of the inner size at a time; `group` as in `swizzle`."""

    block_m: int
    block_n: int
    block_k: int
    swapped: bool = False
    group: int = 8
    options: Options

    def blocks(self) -> dict[str, int]:
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return {**sizes, "GROUP": self.group}


FLOAT32 = MixLaunch(block_m=64, block_n=64, block_k=16, options=Options(num_warps=4, num_stages=2))
UNALIGNED = MixLaunch(block_m=64, block_n=32, block_k=32, options=Options(num_warps=4))
WIDE_FAMILIES = ("cuda90", "cuda100")
MULTIPROCESSORS = 132  # of an H100
FEW_TOKENS = 32
GATE_GRAD_ROWS = 256
GATE_GRAD_OPTIONS = Options(num_warps=4)


@measured_first
def choose_launch(itemsize: int, M: int, N: int, *, aligned: bool, family: str) -> MixLaunch:
    """For a product of [M, N].

    From compile checks, like all of them here; not yet measured on a GPU.

    Args:
        itemsize: bytes of an element. Products of 4 bytes are exact, without tensor cores.
        M: rows.
        N: columns.
        aligned: of o's slots and of the width D, every row starts at a multiple of 16 bytes; other rows are
            loaded element by element.
        family: of `device_family`.
    """
    if itemsize == 4:
        return FLOAT32
    if not aligned:
        return UNALIGNED
    stages = 2 if family == "hip" else 3
    if M <= 64 or N <= 64:
        options = Options(num_warps=4, num_stages=stages)
        return MixLaunch(block_m=64, block_n=64, block_k=64, options=options)
    options = Options(num_warps=8, num_stages=stages)
    return MixLaunch(block_m=128, block_n=128, block_k=32 if family == "hip" else 64, options=options)


@measured_first
def choose_forward_launch(itemsize: int, T: int, D: int, *, aligned: bool, family: str) -> MixLaunch:
    """Few tokens, as in decoding: narrow tiles and many bytes of the weight under way at once."""
    launch = choose_launch(itemsize, T, D, aligned=aligned, family=family)
    if T > FEW_TOKENS or launch in (FLOAT32, UNALIGNED):
        return _widened(launch, T, D, 1, family)
    block_m, block_k, stages = max(16, triton.next_power_of_2(T)), 128, 4
    if family == "hip":
        block_k, stages = 64, 2
    options = Options(num_warps=4, num_stages=stages)
    return MixLaunch(block_m=block_m, block_n=64, block_k=block_k, swapped=True, options=options)


@measured_first
def choose_weight_grad_launch(
    itemsize: int, Q: int, D: int, num_slots: int, *, aligned: bool, family: str
) -> MixLaunch:
    launch = choose_launch(itemsize, Q, D, aligned=aligned, family=family)
    return _widened(launch, Q, D, num_slots, family)


def _widened(launch: MixLaunch, M: int, N: int, num_products: int, family: str) -> MixLaunch:
    """256 columns where they fit and such tiles are enough for all multiprocessors."""
    enough = num_products * triton.cdiv(M, 128) * triton.cdiv(N, 256) >= MULTIPROCESSORS
    wide = family in WIDE_FAMILIES and launch.block_m == 128 and N % 256 == 0 and enough
    return replace(launch, block_n=256) if wide else launch


# --- launchers --------------------------------------------------------------------------


def _aligned(o: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether rows of o's slots and of the width are whole numbers of 16 elements from aligned addresses."""
    tensors = (o, weight, *others)
    starts_aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return o.shape[3] % 16 == 0 and weight.shape[0] % 16 == 0 and starts_aligned


def launch_attention_mix(o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    check_dtype("attention_mix on a GPU", "o", o, FLOATS[:3])
    (T, S, A, Q), D = o.shape, weight.shape[0]
    y = o.new_empty(T, D)
    if y.numel() == 0:
        return y
    aligned = _aligned(o, weight, gate)
    case = Case("attention_mix forward", S * A * Q, D, S * A, T)
    launch = choose_forward_launch(
        o.itemsize, T, D, aligned=aligned, family=device_family(o.device), case=case
    )
    _mix_kernel[(triton.cdiv(T, launch.block_m) * triton.cdiv(D, launch.block_n),)](
        o,
        gate,
        weight,
        y,
        T,
        D,
        S * A * Q,
        S,
        A,
        Q,
        SWAPPED=launch.swapped,
        **launch.blocks(),
        **launch.options.keywords(),
    )
    return y


def launch_attention_mix_backward(
    grad_out: Tensor, o: Tensor, gate: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    check_dtype("attention_mix on a GPU", "o", o, FLOATS[:3])
    do, dgate, dweight = (
        torch.empty_like(x) if needed else x.new_empty(0)
        for x, needed in zip((o, gate, weight), needs, strict=True)
    )
    if needs[0] or needs[1]:
        _launch_input_grad(grad_out, o, gate, weight, do if needs[0] else None, dgate if needs[1] else None)
    if dweight.numel() > 0:
        _launch_weight_grad(grad_out, o, gate, dweight)
    return do, dgate, dweight


def _launch_input_grad(
    grad: Tensor, o: Tensor, gate: Tensor, weight: Tensor, do: Tensor | None, dgate: Tensor | None
) -> None:
    (T, S, A, Q), D = o.shape, weight.shape[0]
    aligned = _aligned(o, weight, gate, grad, do)
    case = Case("attention_mix input_grad", D, Q, S * A, T)
    launch = choose_launch(o.itemsize, T, Q, aligned=aligned, family=device_family(o.device), case=case)
    blocks_per_slot = triton.cdiv(Q, launch.block_n)
    num_blocks = S * A * blocks_per_slot
    partial = None if dgate is None else torch.empty(num_blocks, T, dtype=torch.float32, device=o.device)
    if o.numel() > 0:
        _input_grad_kernel[(triton.cdiv(T, launch.block_m) * num_blocks,)](
            grad,
            o,
            gate,
            weight,
            do,
            partial,
            T,
            D,
            S * A * Q,
            A,
            Q,
            num_blocks,
            **launch.blocks(),
            **launch.options.keywords(),
        )
    if dgate is not None and dgate.numel() > 0:
        _gate_grad_kernel[(triton.cdiv(T, GATE_GRAD_ROWS), A)](
            partial,
            dgate,
            T,
            A,
            S,
            blocks_per_slot,
            ROWS=GATE_GRAD_ROWS,
            **GATE_GRAD_OPTIONS.keywords(),
        )


def _launch_weight_grad(grad: Tensor, o: Tensor, gate: Tensor, dweight: Tensor) -> None:
    (T, S, A, Q), D = o.shape, dweight.shape[0]
    aligned = _aligned(o, dweight, gate, grad)
    case = Case("attention_mix weight_grad", Q, D, S * A, T)
    launch = choose_weight_grad_launch(
        o.itemsize, Q, D, S * A, aligned=aligned, family=device_family(o.device), case=case
    )
    num_tiles = S * A * triton.cdiv(Q, launch.block_m)
    _weight_grad_kernel[(num_tiles * triton.cdiv(D, launch.block_n),)](
        grad,
        o,
        gate,
        dweight,
        T,
        D,
        S * A * Q,
        A,
        Q,
        num_tiles,
        **launch.blocks(),
        **launch.options.keywords(),
    )


# --- for compiling ahead of time --------------------------------------------------------

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
SIZES = (16, 32, 128, 1 << 15)
FLOAT32_POINTERS = ("gate_ptr", "dgate_ptr", "partial_ptr")
# in the table by these names; what may be absent
MEASURED = {
    "forward": (_mix_kernel, ((),)),
    "input_grad": (_input_grad_kernel, ((), ("do_ptr",), ("partial_ptr",))),
    "weight_grad": (_weight_grad_kernel, ((),)),
}
INTEGERS = ("T", "D", "C", "S", "A", "Q", "num_blocks", "num_tiles", "blocks_per_slot")


def compilations() -> list[Compilation]:
    """Every configuration that the launch choices give; the input gradient with either result absent, too."""
    cases: dict[tuple[Any, str, MixLaunch, tuple[str, ...]], dict[str, None]] = {}
    for family, (dtype, itemsize), aligned in product(FAMILIES, ITEMSIZES.items(), (True, False)):
        for M, N in product(SIZES, SIZES):
            launch = choose_forward_launch(itemsize, M, N, aligned=aligned, family=family)
            cases.setdefault((_mix_kernel, dtype, launch, ()), {})[family] = None
            launch = choose_weight_grad_launch(itemsize, M, N, 1, aligned=aligned, family=family)
            cases.setdefault((_weight_grad_kernel, dtype, launch, ()), {})[family] = None
            launch = choose_launch(itemsize, M, N, aligned=aligned, family=family)
            for absent in ((), ("do_ptr",), ("partial_ptr",)):
                cases.setdefault((_input_grad_kernel, dtype, launch, absent), {})[family] = None
    products = [
        _compilation(kernel, dtype, launch, absent, pdl=pdl, families=tuple(families))
        for (kernel, dtype, launch, absent), families in cases.items()
        for pdl in (False, True)
    ]
    measured = [
        made
        for name, (kernel, absents) in MEASURED.items()
        for made in tuned_compilations(
            f"attention_mix {name}",
            MixLaunch,
            partial(_measured_compilations, kernel=kernel, absents=absents),
        )
    ]
    return products + measured + [_gate_grad_compilation(pdl=pdl) for pdl in (False, True)]


def _measured_compilations(
    launch: MixLaunch, kernel: Any, absents: tuple[tuple[str, ...], ...]
) -> list[Compilation]:
    return [
        _compilation(kernel, dtype, launch, absent, pdl=False, families=())
        for dtype, absent in product(("bf16", "fp16"), absents)
    ]


def _compilation(
    kernel: Any,
    dtype: str,
    launch: MixLaunch,
    absent: tuple[str, ...],
    *,
    pdl: bool,
    families: tuple[str, ...],
) -> Compilation:
    """FLOAT32 is for any alignment, every launch but these two for aligned rows."""
    signature = {name: kind for name, kind in _signature(kernel, dtype).items() if name not in absent}
    swapped = {"SWAPPED": launch.swapped} if kernel is _mix_kernel else {}
    pointers = tuple(name for name in signature if name.endswith("_ptr"))
    size = f"{launch.block_m}x{launch.block_n}x{launch.block_k}"
    without = "".join(f" without {name}" for name in absent)
    return Compilation(
        kernel=kernel,
        label=f"{dtype} {size}{' swapped' if launch.swapped else ''}{without}{' pdl' if pdl else ''}",
        signature=signature,
        constexprs={**dict.fromkeys(absent), **swapped, **launch.blocks()},
        options=replace(launch.options, pdl=pdl),
        families=families,
        divisible=() if launch in (FLOAT32, UNALIGNED) else (*pointers, "D", "C", "Q"),
    )


def _gate_grad_compilation(*, pdl: bool) -> Compilation:
    return Compilation(
        kernel=_gate_grad_kernel,
        label=f"fp32 {GATE_GRAD_ROWS}{' pdl' if pdl else ''}",
        signature=_signature(_gate_grad_kernel, "fp32"),
        constexprs={"ROWS": GATE_GRAD_ROWS},
        options=replace(GATE_GRAD_OPTIONS, pdl=pdl),
    )


def _signature(kernel: Any, dtype: str) -> dict[str, str]:
    pointers = {name: f"*{'fp32' if name in FLOAT32_POINTERS else dtype}" for name in kernel.arg_names}
    kinds = {**pointers, **dict.fromkeys(INTEGERS, "i32")}
    return {name: kinds[name] for name in kernel.arg_names if name.endswith("_ptr") or name in INTEGERS}
