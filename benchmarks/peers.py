"""Other libraries behind the signatures of what is timed, each only where it is installed and can run.

A peer that cannot is never left out in silence: `UnavailableError` says why, and row and report repeat it.
Those of liger-kernel 0.8.5, moe-ops 0.1.0 and scattermoe give the right answers in Triton's interpreter; no
adaptor of LIBRARIES has run on a GPU. One that fails there says so in its row and stops nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_runtime

Router = Callable[[Tensor], tuple[Tensor, Tensor]]
# x, gate_up_proj, down_proj, weight_TK -> y, for one routing
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# --- which of them can run here ---------------------------------------------------------

# distribution -> module; the extra "peers" has the first two, the others are up to who wants the comparison
LIBRARIES = {
    "liger-kernel": "liger_kernel",
    "moe-ops": "moe_ops",
    "sonic-moe": "sonicmoe",
    "scattermoe": "scattermoe",
    "momoe": "MoMoE",
    "megablocks": "megablocks",
    "triton-kernels": "triton_kernels",
}


class UnavailableError(Exception):
    """Why a peer is not timed here, as a phrase: "liger-kernel is not installed"."""


@dataclass
class Peers:
    """Those that can run here, by name, and why the others cannot."""

    fns: dict[str, Callable[..., Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def installed(distribution: str) -> str | None:
    """The version of one of LIBRARIES; None where it is not installed."""
    if find_spec(LIBRARIES[distribution]) is None:
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "unknown"


def installed_versions() -> dict[str, str]:
    """Of all LIBRARIES that are installed; for the result file."""
    versions = {name: installed(name) for name in LIBRARIES}
    return {name: version for name, version in versions.items() if version is not None}


def require(distribution: str) -> None:
    """Raise UnavailableError unless the library is there and a GPU, which all of them need."""
    if installed(distribution) is None:
        raise UnavailableError(f"{distribution} is not installed")
    if not torch.cuda.is_available():
        raise UnavailableError(f"{distribution} needs a GPU")


def available(makers: Mapping[str, Callable[[], Callable[..., Any]]]) -> Peers:
    """Make each peer, or keep why it cannot be made; whatever a library raises is such a reason."""
    peers = Peers()
    for name, make in makers.items():
        try:
            peers.fns[name] = make()
        except UnavailableError as reason:
            peers.absent[name] = str(reason)
        except Exception as error:
            peers.absent[name] = failure("cannot be set up", error)
    return peers


def failure(what: str, error: Exception) -> str:
    """A line for a result file: what failed, and the first line of why."""
    lines = str(error).splitlines()
    return f"{what}: {type(error).__name__}{': ' + lines[0][:200] if lines else ''}"


# --- routers, from logits ---------------------------------------------------------------


class _NoProjection:
    """torch.nn.functional, but `linear` hands its input through: a router then starts from the logits."""

    def __getattr__(self, name: str) -> Any:
        return (lambda x, weight: x) if name == "linear" else getattr(F, name)


def _from_logits(router: torch.nn.Module) -> Router:
    forward = type(router).forward
    routed = FunctionType(forward.__code__, {**forward.__globals__, "F": _NoProjection()}, forward.__name__)

    def route(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        _, weight_TK, expert_TK = routed(router, logits_TE)
        return weight_TK, expert_TK

    return route


def _place(router: torch.nn.Module, device: str) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    return router.to(device).eval()


def mixtral_router(num_experts: int, experts_per_token: int, device: str) -> Router:
    """transformers' softmax, top-k and renormalisation."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    config = MixtralConfig(
        hidden_size=num_experts, num_local_experts=num_experts, num_experts_per_tok=experts_per_token
    )
    return _from_logits(_place(MixtralTopKRouter(config), device))


def qwen3_router(num_experts: int, experts_per_token: int, device: str) -> Router:
    """The same with Qwen3-MoE's code, which rounds the gates to the logits' dtype."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(
        hidden_size=num_experts,
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=True,
    )
    return _from_logits(_place(Qwen3MoeTopKRouter(config), device))


def deepseek_router(
    num_experts: int, experts_per_token: int, num_groups: int, groups_kept: int, device: str
) -> Router:
    """Sigmoid scores, the best groups by the sum of their best two, renormalised gates."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=num_experts,
        n_routed_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        n_group=num_groups,
        topk_group=groups_kept,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    return _from_logits(_place(DeepseekV3TopkRouter(config), device))


def moe_ops_router(experts_per_token: int) -> Router:
    """moe-ops' fused top-k and softmax over the chosen logits, which is what renormalising gives."""
    require("moe-ops")
    from moe_ops import fused_topk_softmax

    return lambda logits_TE: fused_topk_softmax(logits_TE, experts_per_token)


# --- planning and moving rows -----------------------------------------------------------


def liger_plan(num_experts: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Liger's routing metadata as our row, token, slot and offset; it waits for the device once per call."""
    require("liger-kernel")
    from liger_kernel.ops.fused_moe import compute_routing_metadata

    def plan(expert_TK: Tensor) -> tuple[Tensor, ...]:
        _, start, token_N, slot_N, row_N, _, _ = compute_routing_metadata(expert_TK, num_experts)
        return row_N.view_as(expert_TK), token_N, slot_N, start[1:]

    return plan


def moe_ops_permute(num_experts: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """moe-ops' sort and row copy in one: (rows in expert order, row of each [choice, token]).

    Rows of one expert are in the order in which atomics placed them.
    """
    require("moe-ops")
    from moe_ops import permute

    def move(x_TD: Tensor, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        rows, row_map, _ = permute(x_TD, expert_TK, E=num_experts)
        return rows, row_map.view(expert_TK.shape[1], expert_TK.shape[0])

    return move


def moe_ops_unpermute(row_TK: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """moe-ops' gate-weighted sum of each token's rows; it has no residual."""
    require("moe-ops")
    from moe_ops import unpermute_forward

    T, K = row_TK.shape
    row_map = row_TK.t().contiguous().flatten()
    return lambda y_ND, weight_TK: unpermute_forward(y_ND, row_map, weight_TK, T, K)


# --- products over rows in expert order -------------------------------------------------


def torch_grouped_mm(offset_E: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`torch.nn.functional.grouped_mm`."""
    if not hasattr(F, "grouped_mm"):
        raise UnavailableError(f"torch {torch.__version__} has no grouped_mm")
    return lambda x_NI, weight_EOI: F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=offset_E)


def moe_ops_grouped_gemm(offset_E: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    require("moe-ops")
    from moe_ops import grouped_gemm

    # without TMA, and for gradients, it reads the start of the first expert too
    starts = torch.cat((offset_E.new_zeros(1), offset_E))
    return lambda x_NI, weight_EOI: grouped_gemm(x_NI, weight_EOI, starts, True)


# --- whole expert layers ----------------------------------------------------------------

COPIED_WEIGHTS = {"cuda": 2**34, "cpu": 2**28}  # bytes that `batched_mm` may copy


def transformers_experts(implementation: str, expert_TK: Tensor, num_experts: int) -> Experts:
    """Qwen3-MoE's expert layer of transformers, with "eager", "grouped_mm", "batched_mm" or "moe_runtime"."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    if implementation == "moe_runtime":
        moe_runtime.register()

    class Layer:
        """What the forward of such a module reads."""

        _apply_gate = Qwen3MoeExperts._apply_gate

        def __init__(self, **attributes: Any) -> None:
            self.__dict__.update(attributes)

    def experts(x_TD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_TK: Tensor) -> Tensor:
        module = Layer(
            config=SimpleNamespace(_experts_implementation=implementation),
            num_experts=num_experts,
            gate_up_proj=gate_up_proj,
            down_proj=down_proj,
            act_fn=F.silu,
            has_gate=True,
            has_bias=False,
            has_post_expert_norm=False,
            is_transposed=False,
            is_concatenated=True,
            _is_expert_parallel=False,
        )
        return Qwen3MoeExperts.forward(module, x_TD, chosen_TK, weight_TK.to(x_TD.dtype))

    chosen_TK = expert_TK.long()
    return experts


def refuse_copies(num_rows: int, weight_bytes: int, device_type: str) -> None:
    """UnavailableError where `batched_mm`, which copies an expert's weights for each row, copies too much."""
    copied, most = num_rows * weight_bytes, COPIED_WEIGHTS[device_type]
    if copied > most:
        raise UnavailableError(
            f"would copy {copied / 2**30:,.2f} GiB of weights, more than {most / 2**30:,.2f}"
        )


def batched_experts(expert_TK: Tensor, num_experts: int, weight_bytes: int) -> Experts:
    """`batched_mm`, where an expert's weights have so many bytes."""
    refuse_copies(expert_TK.numel(), weight_bytes, expert_TK.device.type)
    return transformers_experts("batched_mm", expert_TK, num_experts)


def liger_experts(expert_TK: Tensor) -> Experts:
    """Liger's fused MoE; it tunes itself in its first call."""
    require("liger-kernel")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def experts(x_TD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_TK: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x_TD, gate_up_proj, down_proj, expert_TK, weight_TK)

    return experts


def sonicmoe_experts(expert_TK: Tensor, num_experts: int) -> Experts:
    require("sonic-moe")
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    T, K = expert_TK.shape
    token_N = torch.arange(T, device=expert_TK.device, dtype=torch.int32).repeat_interleave(K)
    expert_N = expert_TK.flatten()

    def experts(x_TD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_TK: Tensor) -> Tensor:
        y_TD, _ = moe_general_routing_inputs(
            x_TD,
            weight_TK.flatten(),
            token_N,
            expert_N,
            gate_up_proj.permute(1, 2, 0),
            None,
            down_proj.permute(1, 2, 0),
            None,
            E=num_experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return y_TD

    return experts


def scattermoe_experts(expert_TK: Tensor, num_experts: int) -> Experts:
    require("scattermoe")
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def experts(x_TD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_TK: Tensor) -> Tensor:
        order = flatten_sort_count(expert_TK, num_experts)
        up, down = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
        h = parallel_linear(x_TD, up, expert_TK.shape[1], *order, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        gates = weight_TK.to(x_TD.dtype)
        return parallel_linear(F.silu(gate) * up, down, 1, *order, grouped_in=True, gates=gates)

    return experts


def moe_ops_experts(expert_TK: Tensor, num_experts: int) -> Experts:
    """moe-ops' parts in a row; between its two products PyTorch applies the gate."""
    require("moe-ops")
    from moe_ops import grouped_gemm, permute, unpermute

    T, K = expert_TK.shape

    def experts(x_TD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_TK: Tensor) -> Tensor:
        x_ND, row_map, start = permute(x_TD, expert_TK, E=num_experts)
        gate, up = grouped_gemm(x_ND, gate_up_proj, start, True).chunk(2, dim=-1)
        y_ND = grouped_gemm(F.silu(gate) * up, down_proj, start, True)
        return unpermute(y_ND, row_map, weight_TK, T, K)

    return experts


def megablocks_experts(expert_TK: Tensor, num_experts: int) -> Experts:
    """The steps of megablocks' dropless layer with its grouped GEMM, for bfloat16 only.

    Gate and up are one product here, as the weights are stored; its own layer makes two. It waits for the
    device once per call, because the product wants the rows per expert on the host.
    """
    require("megablocks")
    from megablocks import ops
    from megablocks.grouped_gemm_util import ops as grouped

    if grouped is None:
        raise UnavailableError("megablocks has no grouped_gemm here, which is its extra gg")
    sort_end_bit = max(math.ceil(math.log2(num_experts)), 1)
    expert_N, K = expert_TK.flatten(), expert_TK.shape[1]

    def experts(x_TD: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_TK: Tensor) -> Tensor:
        with torch.no_grad():
            sorted_N, index_N = ops.sort(expert_N, sort_end_bit)
            count_E = ops.histogram(expert_N, num_experts)
            end_E = ops.inclusive_cumsum(count_E, 0).view(-1)
            rows_E = count_E.cpu().long()
        x_ND = ops.gather(x_TD, index_N, sorted_N, end_E, K)
        gate, up = grouped.gmm(x_ND, gate_up_proj, rows_E, trans_b=True).chunk(2, dim=-1)
        y_ND = grouped.gmm(F.silu(gate) * up, down_proj, rows_E, trans_b=True)
        gate_N = weight_TK.to(x_TD.dtype).flatten()
        return ops.scatter(y_ND, index_N, sorted_N, gate_N, end_E, K)

    return experts


def no_adaptor(distribution: str, reason: str) -> Experts:
    """A library that this file cannot call; "not installed" comes first."""
    require(distribution)
    raise UnavailableError(f"no adaptor for {distribution}: {reason}")


def expert_peers(expert_TK: Tensor, num_experts: int, weight_bytes: int) -> Peers:
    """Every other expert layer there is, for one routing; an expert's weights have so many bytes."""
    return available(
        {
            "transformers_eager": lambda: transformers_experts("eager", expert_TK, num_experts),
            "transformers_grouped_mm": lambda: transformers_experts("grouped_mm", expert_TK, num_experts),
            "transformers_batched_mm": lambda: batched_experts(expert_TK, num_experts, weight_bytes),
            "liger": lambda: liger_experts(expert_TK),
            "sonicmoe": lambda: sonicmoe_experts(expert_TK, num_experts),
            "scattermoe": lambda: scattermoe_experts(expert_TK, num_experts),
            "moe_ops": lambda: moe_ops_experts(expert_TK, num_experts),
            "momoe": lambda: no_adaptor("momoe", "it keeps its weights in a layout of its own"),
            "megablocks": lambda: megablocks_experts(expert_TK, num_experts),
            "triton_kernels": lambda: no_adaptor("triton-kernels", "its calls change with every release"),
        }
    )
