"""Segment-wise mixture-of-experts layers: fused Triton kernels and a plain PyTorch reference.

Shape letters, used in every docstring: ``B`` batch, ``T`` time steps, ``P`` segment_size,
``J`` segments of one sequence (``ceil(T / P)``), ``S`` segments in the batch (``B * J``),
``D`` d_model, ``F`` d_ff, ``E`` num_experts, ``R`` routed rows (``S * top_k``).
"""

from segmoe_kernels.layer import SegMoE, set_loss_scaler
from segmoe_kernels.losses import load_balancing_loss, router_z_loss
from segmoe_kernels.models.checkpoints import convert_state_dict
from segmoe_kernels.models.official import (
    load_official,
    load_official_layers,
    segment_schedule,
    to_official,
)
from segmoe_kernels.models.recipe import swap_recipe
from segmoe_kernels.models.swap import replace_ffn, upcycle
from segmoe_kernels.options import reload_settings
from segmoe_kernels.parallel import shard_experts
from segmoe_kernels.routing import FFNWeights, Permutation, RouterOutput, Routing
from segmoe_kernels.stats.collector import collect_routing_stats, collect_routings

__version__ = "0.1.0"

__all__ = [
    "FFNWeights",
    "Permutation",
    "RouterOutput",
    "Routing",
    "SegMoE",
    "collect_routing_stats",
    "collect_routings",
    "convert_state_dict",
    "load_balancing_loss",
    "load_official",
    "load_official_layers",
    "reload_settings",
    "replace_ffn",
    "router_z_loss",
    "segment_schedule",
    "set_loss_scaler",
    "shard_experts",
    "swap_recipe",
    "to_official",
    "upcycle",
]
