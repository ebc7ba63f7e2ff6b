"""The four stages on Triton, in pipeline order, with the names of `segmoe_kernels.reference`."""

from torch import Tensor

from segmoe_kernels.options import Options
from segmoe_kernels.routing import FFNWeights, RouterOutput
from segmoe_kernels.stages.combine import combine
from segmoe_kernels.stages.experts import expert_ffn
from segmoe_kernels.stages.grouped_gemm import grouped_gemm
from segmoe_kernels.stages.permute import permute
from segmoe_kernels.stages.route import route, route_and_pass
from segmoe_kernels.stages.shared import shared_combine

__all__ = [
    "combine",
    "expert_ffn",
    "grouped_gemm",
    "permute",
    "route",
    "routed_experts",
    "shared_combine",
]


def routed_experts(
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    options: Options,
    *,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, RouterOutput, Tensor]:
    """Stages 1 to 3 in order. See `pipeline.Stages`."""
    start, mask = router_start, padding_mask
    routed, weights, tokens = route_and_pass(
        x, router_weight, **options.of_router(), router_start=start, padding_mask=mask
    )
    permutation = permute(routed.topk_ids, router_weight.shape[0], routed.block_counts)
    expert_out = expert_ffn(
        tokens.to(experts.up_proj.dtype),
        # Whole segments have one row, hence one weight, for each slot.
        weights if options.expert_scope == "token" else routed.topk_weights,
        permutation,
        experts,
        **options.of_experts(),
        padding_mask=padding_mask,
    )
    return expert_out, routed, permutation.expert_counts
