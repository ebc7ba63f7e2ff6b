"""Pieces of the definition in plain PyTorch: segments, and an FFN on every row."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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


def dense_ffn(
    x: Tensor, weights: FFNWeights, activation: str, dropout: float | Tensor = 0.0
) -> Tensor:
    """One FFN on every row: (..., D) -> (..., D); dropout is a probability or a drawn scale."""
    function = ACTIVATION_FUNCTIONS[activation]
    hidden = F.linear(x, weights.up_proj, weights.up_proj_bias)
    if weights.gate_proj is None:
        hidden = function(hidden)
    else:
        hidden = function(F.linear(x, weights.gate_proj, weights.gate_proj_bias)) * hidden
    drop: Callable[..., Tensor] = torch.mul if isinstance(dropout, Tensor) else F.dropout
    hidden = drop(hidden, dropout)
    return F.linear(hidden, weights.down_proj, weights.down_proj_bias)
