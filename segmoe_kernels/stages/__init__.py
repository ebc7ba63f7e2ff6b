"""The four stages on Triton, in pipeline order, with the names of `segmoe_kernels.reference`."""

from segmoe_kernels.stages.combine import combine
from segmoe_kernels.stages.experts import expert_ffn
from segmoe_kernels.stages.grouped_gemm import grouped_gemm
from segmoe_kernels.stages.permute import permute
from segmoe_kernels.stages.route import route
from segmoe_kernels.stages.whole import routed_experts, shared_combine, whole_layer

__all__ = [
    "combine",
    "expert_ffn",
    "grouped_gemm",
    "permute",
    "route",
    "routed_experts",
    "shared_combine",
    "whole_layer",
]
