"""The four stages on Triton, in pipeline order, with the names of `segmoe_kernels.reference`."""

from torch import Tensor

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
    *,
    segment_size: int,
    top_k: int,
    pooling: str = "concat",
    expert_scope: str = "token",
    activation: str = "gelu",
    dropout: float = 0.0,
    router_dropout: float = 0.0,
    router_temperature: float = 1.0,
    renormalize: bool | None = None,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, RouterOutput, Tensor]:
    """Route and run the experts, which run in the dtype of their weights.

    Returns:
        ``(expert_out, routed, expert_counts)``: the weighted outputs, (top_k, B, T, D);
        RouterOutput; (E,) int32.
    """
    routed, weights, tokens = route_and_pass(
        x,
        router_weight,
        segment_size=segment_size,
        top_k=top_k,
        pooling=pooling,
        router_temperature=router_temperature,
        router_dropout=router_dropout,
        renormalize=renormalize,
        router_start=router_start,
        padding_mask=padding_mask,
    )
    permutation = permute(routed.topk_ids, router_weight.shape[0], routed.block_counts)
    expert_out = expert_ffn(
        tokens.to(experts.up_proj.dtype),
        # Whole segments have one row, hence one weight, for each slot.
        weights if expert_scope == "token" else routed.topk_weights,
        permutation,
        experts,
        segment_size=segment_size,
        expert_scope=expert_scope,
        activation=activation,
        dropout=dropout,
        padding_mask=padding_mask,
    )
    return expert_out, routed, permutation.expert_counts
