"""Stages 1 to 3 together, on the plan that suits the shapes."""

from torch import Tensor

from segmoe_kernels._triton.plans import choose_plan
from segmoe_kernels.routing import FFNWeights, RouterOutput
from segmoe_kernels.stages.block import block_experts
from segmoe_kernels.stages.experts import expert_ffn
from segmoe_kernels.stages.permute import permute
from segmoe_kernels.stages.route import route_and_pass


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
        ``(expert_out, routed, expert_counts)``: the weighted outputs, (top_k, B, T, D), or
        (1, B, T, D) where the plan has summed them; RouterOutput; (E,) int32.
    """
    batch, length, d_model = x.shape
    num_experts = router_weight.shape[0]
    if choose_plan(d_model, num_experts, top_k, batch * length, expert_scope) == "block":
        return block_experts(
            x,
            router_weight,
            experts,
            segment_size=segment_size,
            top_k=top_k,
            pooling=pooling,
            activation=activation,
            dropout=dropout,
            router_temperature=router_temperature,
            router_dropout=router_dropout,
            renormalize=renormalize,
            router_start=router_start,
            padding_mask=padding_mask,
        )
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
    permutation = permute(routed.topk_ids, num_experts, routed.block_counts)
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
