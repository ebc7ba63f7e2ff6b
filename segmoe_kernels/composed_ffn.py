"""The experts' FFN in plain PyTorch: the definition, on every device.

Slots are gathered by expert, run through grouped products and gathered back. On a CPU `grouped_ffn`
computes the same faster and takes its higher derivatives from here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from segmoe_kernels.grouped_mm import gather_rows, grouped_linear
from segmoe_kernels.routing import FFNWeights

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def segments(x: Tensor, segment_size: int, padding_mask: Tensor | None = None) -> Tensor:
    """Cut sequences into segments: (B, T, D) -> (B, J, P, D); masked and missing steps are 0."""
    if padding_mask is not None:
        x = x.masked_fill(~padding_mask[..., None], 0)
    batch, length, d_model = x.shape
    if torch.compiler.is_exporting() and segment_size > 1:
        return _segments_of_any_length(x, segment_size)
    missing = -length % segment_size
    if missing:  # F.pad would fill all of it first
        x = torch.cat([x, x.new_zeros(batch, missing, d_model)], dim=1)
        length += missing
    return x.reshape(batch, length // segment_size, segment_size, d_model)


def _segments_of_any_length(x: Tensor, segment_size: int) -> Tensor:
    """`segments` without a question about the length, whose answer would be part of a program."""
    # Counted, not computed: a size that is computed may not become 1.
    steps = torch.arange(x.shape[1], device=x.device)
    starts = (steps % segment_size == 0).nonzero()
    index = starts + steps.new_tensor(range(segment_size))
    missing = index >= x.shape[1]
    pieces, missing = x[:, index.masked_fill(missing, 0)], missing[..., None]
    # Not every runtime can fill flags.
    return pieces & ~missing if x.dtype == torch.bool else pieces.masked_fill(missing, 0)


def valid_steps(x: Tensor, segment_size: int, padding_mask: Tensor | None = None) -> Tensor:
    """(B, J, P) bool: True where a segment has a real step."""
    if padding_mask is None:
        padding_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return segments(padding_mask[..., None], segment_size)[..., 0]


def crop(x: Tensor, dim: int, length: int) -> Tensor:
    """The first ``length`` steps; an exported program may not ask whether there are more."""
    if torch.compiler.is_exporting():
        return x.index_select(dim, torch.arange(length, device=x.device))
    return x.narrow(dim, 0, length)


def dense_ffn(x: Tensor, weights: FFNWeights, activation: str, dropout: float = 0.0) -> Tensor:
    """One FFN on every row: (..., D) -> (..., D). Also the GEMMs of the Triton backend."""
    function = ACTIVATION_FUNCTIONS[activation]
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
    function = ACTIVATION_FUNCTIONS[activation]
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
