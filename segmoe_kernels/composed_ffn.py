"""The experts' FFN in plain PyTorch: the definition, on every device.

Slots are gathered by expert, run through grouped products and gathered back. On a CPU `grouped_ffn`
computes the same faster and takes its higher derivatives from here.
"""

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.grouped_mm import gather_rows, grouped_linear
from segmoe_kernels.routing import FFNWeights
from segmoe_kernels.segments import segments


def dense_ffn(x: Tensor, weights: FFNWeights, activation: str, dropout: float = 0.0) -> Tensor:
    """One FFN on every row: (..., D) -> (..., D). Also the GEMMs of the Triton backend."""
    function = ACTIVATIONS[activation].function
    hidden = F.linear(x, weights.up_proj, weights.up_proj_bias)
    if weights.gate_proj is None:
        hidden = function(hidden)
    else:
        hidden = function(F.linear(x, weights.gate_proj, weights.gate_proj_bias)) * hidden
    return F.linear(F.dropout(hidden, dropout), weights.down_proj, weights.down_proj_bias)


def composed_ffn(
    x: Tensor,
    topk_weights: Tensor,
    experts: FFNWeights,
    sorted_to_slot: Tensor,
    slot_to_sorted: Tensor,
    expert_offsets: Tensor,
    padding_mask: Tensor | None,
    *,
    segment_size: int,
    activation: str,
    dropout: float = 0.0,
) -> Tensor:
    """Each slot's steps through its expert, times the slot's weight, in plain PyTorch.

    Args:
        x: (B, T, D).
        topk_weights: (S, top_k).
        experts: weights stacked over E.
        sorted_to_slot: (R,) int32.
        slot_to_sorted: (R,) int32.
        expert_offsets: (E + 1,) int32, in slots.
        padding_mask: (B, T) bool or None.
        segment_size: P.
        activation: see `functional.expert_ffn`.
        dropout: probability, after the activation.

    Returns:
        (top_k, B, T, D), 0 where masked and for the slots of no expert.
    """
    batch, length, d_model = x.shape
    top_k = topk_weights.shape[-1]
    slots = rearrange(segments(x, segment_size, padding_mask), "b j p d -> (b j) (p d)")
    if top_k > 1:
        slots = repeat(slots, "s w -> (s k) w", k=top_k)
    offsets = expert_offsets * segment_size
    rows = gather_rows(slots, sorted_to_slot, slot_to_sorted)
    rows = rows.reshape(slots.shape[0] * segment_size, d_model)
    function = ACTIVATIONS[activation].function
    hidden = grouped_linear(rows, experts.up_proj, experts.up_proj_bias, offsets)
    if experts.gate_proj is None:
        hidden = function(hidden)
    else:
        gate = grouped_linear(rows, experts.gate_proj, experts.gate_proj_bias, offsets)
        hidden = function(gate) * hidden
    hidden = F.dropout(hidden, dropout)
    rows = grouped_linear(hidden, experts.down_proj, experts.down_proj_bias, offsets)

    slots = gather_rows(rows.reshape(slots.shape), slot_to_sorted, sorted_to_slot)
    shape = (batch, -(-length // segment_size), top_k, segment_size, d_model)
    slots = rearrange(slots.reshape(shape), "b j k p d -> k b (j p) d")
    weights = topk_weights.to(slots.dtype).reshape(shape[:3])
    weights = repeat(weights, "b j k -> k b (j p) 1", p=segment_size)
    # Cropped before the product, so that its result is the only copy.
    out = slots[:, :, :length] * weights[:, :, :length]
    return out if padding_mask is None else out.masked_fill(~padding_mask[..., None], 0)
