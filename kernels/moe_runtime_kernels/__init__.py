"""Operations of moe_runtime, each with a PyTorch reference that is also its CPU path."""

from .attention_mix import attention_mix
from .combine import combine
from .expert_choice import RouteExpertChoice, route_expert_choice
from .expert_ffn import expert_ffn
from .grouped_gemm import gathered_grouped_gemm, grouped_gemm
from .memory import MemoryPlan, plan_memory
from .packed_experts import PackedExperts
from .permute import gather_rows, scatter_rows
from .plan import RoutingPlan, make_plan
from .route import RouteTopK, route_topk

__all__ = [
    "MemoryPlan",
    "PackedExperts",
    "RouteExpertChoice",
    "RouteTopK",
    "RoutingPlan",
    "attention_mix",
    "combine",
    "expert_ffn",
    "gather_rows",
    "gathered_grouped_gemm",
    "grouped_gemm",
    "make_plan",
    "plan_memory",
    "route_expert_choice",
    "route_topk",
    "scatter_rows",
]
