"""Soft mixture of attention as one attention call, against a loop over its attention experts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from moe_runtime_kernels._cpu import ONEDNN_IS_FASTER, product
from torch import Tensor

from moe_runtime.attention import MixtureOfAttention, rotary_tables, rotate
from moe_runtime.config import AttentionConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # batch, length, width, heads, kv heads, width of a head, experts
    "smollm2-135m": (1, 512, 576, 9, 3, 64, 4),
    "bam-small": (1, 512, 1024, 8, 8, 128, 4),
    "one-token-batch-16": (16, 1, 1024, 8, 8, 128, 4),
}
TINY = {"tiny": (1, 16, 32, 4, 2, 8, 2)}


def expert_rows(layer: MixtureOfAttention, expert: int) -> tuple[Tensor, Tensor]:
    """Rows of q_proj (columns of o_proj) of one attention expert, and rows of its k_proj and v_proj."""
    config = layer.config
    A, P = config.num_experts, config.head_dim
    rows = torch.arange(config.total_heads * P)
    if config.kv == "expert":
        kv_rows = torch.arange(config.total_kv_heads * P).view(A, -1)[expert]
        return rows.view(A, -1)[expert], kv_rows
    in_groups = rows.view(config.num_kv_heads, A, -1)[:, expert].flatten()
    return in_groups, torch.arange(config.num_kv_heads * P)


def split_experts(layer: MixtureOfAttention) -> list[tuple[Tensor, ...]]:
    """Each expert's own contiguous projections, as a loop would hold them."""
    parts = []
    for expert in range(layer.config.num_experts):
        q_rows, kv_rows = expert_rows(layer, expert)
        parts.append(
            (
                layer.q_proj.weight[q_rows].detach(),
                layer.k_proj.weight[kv_rows].detach(),
                layer.v_proj.weight[kv_rows].detach(),
                layer.o_proj.weight[:, q_rows].detach().contiguous(),
            )
        )
    return parts


def attend_in_a_loop(
    layer: MixtureOfAttention, parts: list[tuple[Tensor, ...]], x_BLD: Tensor, rotary
) -> Tensor:
    """The same layer by the same products, one attention call per expert; shared keys and values are
    projected once."""
    config = layer.config
    gate_BLA = layer.router(x_BLD.flatten(0, 1)).view(*x_BLD.shape[:2], -1)

    def heads_of(weight: Tensor, rotated: bool) -> Tensor:
        heads = product(x_BLD, weight).unflatten(-1, (-1, config.head_dim))
        return (rotate(heads, rotary) if rotated else heads).transpose(1, 2)

    y_BLD, shared = torch.zeros_like(x_BLD), None
    for expert, (q, k, v, o) in enumerate(parts):
        if shared is None or config.kv == "expert":
            shared = heads_of(k, True), heads_of(v, False)
        attended = F.scaled_dot_product_attention(heads_of(q, True), *shared, is_causal=True, enable_gqa=True)
        out_BLD = product(attended.transpose(1, 2).flatten(2), o)
        y_BLD = y_BLD + gate_BLA[..., expert, None].to(x_BLD.dtype) * out_BLD
    return y_BLD


# "high" is PyTorch's switch for faster and less precise float32 products, in the loop as in the call
KINDS = {
    "float32": (torch.float32, "highest"),
    "float32, high": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("shape", [*SHAPES, *TINY])
def bench_attention_mixture(compare, tiny, set_precision, shape, kv, kind):
    if (shape in TINY) != tiny:
        pytest.skip("the other size of shapes was asked for")
    if kind == "float32, high" and DEVICE == "cpu" and not ONEDNN_IS_FASTER and not tiny:
        pytest.skip("it changes no product on this processor")
    B, L, D, H, kv_heads, P, A = {**SHAPES, **TINY}[shape]
    dtype, precision = KINDS[kind]
    set_precision(precision)
    torch.manual_seed(0)
    config = AttentionConfig(
        hidden_size=D, num_heads=H, num_kv_heads=kv_heads, head_dim=P, num_experts=A, kv=kv
    )
    layer = MixtureOfAttention(config).to(DEVICE, dtype).eval()
    x_BLD = torch.randn(B, L, D, device=DEVICE).to(dtype)
    rotary = rotary_tables(torch.arange(L, device=DEVICE)[None], P)
    parts = split_experts(layer)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()
        wide_rotary = tuple(table.double() for table in rotary)
        exact_BLD = attend_in_a_loop(exact, split_experts(exact), x_BLD.double(), wide_rotary)
        # roundings to the stored type, and sums over all heads in float32 in another order
        rounding = 8 * torch.finfo(dtype).eps + (A * H * P) ** 0.5 * torch.finfo(torch.float32).eps
        tolerance = rounding * exact_BLD.abs().max()

        def check(name: str, out: Tensor) -> None:
            error = (out - exact_BLD).abs().max()
            assert error <= tolerance, f"{name} is {error:.1e} from the loop over experts in float64"

        compare(
            "attention_mixture",
            {
                "shape": shape,
                "kv": kv,
                "dtype": kind,
                "tokens": B * L,
                "experts": A,
            },
            {
                "loop": lambda: attend_in_a_loop(layer, parts, x_BLD, rotary),
                "one_call": lambda: layer(x_BLD, rotary),
            },
            check=check,
        )
