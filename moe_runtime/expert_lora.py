"""Low-rank adapters of stacked experts, as grouped products: no expert's weight is ever rebuilt.

    h[n] = x[n] @ W[e].T + bias[e] + scaling * (x[n] @ A[e].T) @ B[e].T        for the rows n of expert e

for both projections of the experts, or one. R is the rank of the adapters, and scaling = alpha / R, or
alpha / sqrt(R) with `use_rslora`. The function is that of PEFT's LoRA for `target_parameters`, which makes
W + scaling * B A of all experts in every forward.
"""

import math
from collections.abc import Sequence

import torch
from moe_runtime_kernels import RoutingPlan, combine, gathered_grouped_gemm, grouped_gemm
from torch import Tensor, nn

from moe_runtime.config import Activation
from moe_runtime.experts import activate

TARGETS = ("gate_up_proj", "down_proj")


class ExpertLoRA(nn.Module):
    """The adapters of a layer's experts; as its submodule `expert_lora` called in the place of `expert_ffn`.

    `lora_A[target]` is [E, R, I] and `lora_B[target]` [E, O, R] for a target weight [E, O, I]: float32 where
    the weights have half precision, cast in each forward. B begins as zeros: nothing changes at first.

    Args:
        gate_up_proj: [E, 2F, D], or [E, F, D] for experts without a gate; for shape, dtype and device.
        down_proj: [E, D, F].
        r: rank.
        alpha: numerator of the scaling.
        targets: which of the two weights have adapters.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023).

    Raises:
        ValueError: the rank is below 1, or a target is unknown.
    """

    def __init__(
        self,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        r: int = 8,
        alpha: float = 16,
        targets: Sequence[str] = TARGETS,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        if not targets or not set(targets) <= set(TARGETS):
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {tuple(targets)}")
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.scaling = alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in zip(TARGETS, (gate_up_proj, down_proj), strict=True):
            if name in targets:
                E, O, I = weight.shape
                dtype = torch.promote_types(weight.dtype, torch.float32)
                self.lora_A[name] = nn.Parameter(torch.empty(E, r, I, dtype=dtype, device=weight.device))
                self.lora_B[name] = nn.Parameter(torch.empty(E, O, r, dtype=dtype, device=weight.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As PEFT draws them: each A[e] as an nn.Linear's weight, B zero."""
        for A_ERI, B_EOR in zip(self.lora_A.values(), self.lora_B.values(), strict=True):
            bound = A_ERI.shape[2] ** -0.5
            nn.init.uniform_(A_ERI, -bound, bound)
            nn.init.zeros_(B_EOR)

    def forward(  # noqa: PLR0913 - the arguments of expert_ffn
        self,
        x_TD: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        weight_TK: Tensor,
        plan: RoutingPlan,
        *,
        activation: Activation = "silu",
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        residual_TD: Tensor | None = None,
    ) -> Tensor:
        """`expert_ffn` of the same arguments, with the adapters added to its two products.

        Backward keeps the parts: the pre-activations, the activations, the rows before they are combined. A
        weight that requires no gradient costs none.
        """
        h_NG = gathered_grouped_gemm(x_TD, gate_up_proj, plan, gate_up_bias)
        if "gate_up_proj" in self.lora_A:
            low_NR = gathered_grouped_gemm(x_TD, self.lora_A["gate_up_proj"].to(x_TD.dtype), plan)
            self._add_up(h_NG, low_NR, "gate_up_proj", plan)
        a_NF = activate(h_NG, activation, gated=gate_up_proj.shape[1] != down_proj.shape[2])
        y_ND = grouped_gemm(a_NF, down_proj, plan, down_bias)
        if "down_proj" in self.lora_A:
            low_NR = grouped_gemm(a_NF, self.lora_A["down_proj"].to(a_NF.dtype), plan)
            self._add_up(y_ND, low_NR, "down_proj", plan)
        return combine(y_ND, weight_TK, plan, residual_TD)

    def _add_up(self, y_NO: Tensor, low_NR: Tensor, target: str, plan: RoutingPlan) -> None:
        """y[n] += scaling * low[n] @ B[e].T, in place: no other copy of the rows."""
        y_NO.add_(grouped_gemm(low_NR * self.scaling, self.lora_B[target].to(low_NR.dtype), plan))

    @torch.no_grad()
    def merge(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        """weight[e] += scaling * B[e] @ A[e], in place, summed in the adapters' dtype and rounded once."""
        for name, weight_EOI in zip(TARGETS, (gate_up_proj, down_proj), strict=True):
            if name in self.lora_A:
                for weight_OI, A_RI, B_OR in zip(
                    weight_EOI, self.lora_A[name], self.lora_B[name], strict=True
                ):
                    wide_OI = weight_OI.to(A_RI.dtype)
                    weight_OI.copy_(torch.addmm(wide_OI, B_OR, A_RI, alpha=self.scaling))

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, {', '.join(self.lora_A)}, use_rslora={self.use_rslora}"
