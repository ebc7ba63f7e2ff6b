"""The stages in order, as both backends run them."""

import math
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from segmoe_kernels.autograd import autocast_is_on
from segmoe_kernels.options import Options
from segmoe_kernels.routing import FFNWeights, LayerWeights, RouterOutput, Routing
from segmoe_kernels.segments import crop, segments, valid_steps

__all__ = ["Stages", "autocast_weights", "run_stages"]


class Stages(Protocol):
    """What a backend has, or what stands in for one: `reference`, `stages`, `parallel`'s."""

    def routed_experts(
        self,
        x: Tensor,
        router_weight: Tensor,
        experts: FFNWeights,
        options: Options,
        *,
        router_start: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, RouterOutput, Tensor]:
        """Stages 1 to 3; the experts run in the dtype of their weights.

        Returns ``(expert_out, routed, expert_counts)``: the weighted outputs, (top_k, B, T, D);
        RouterOutput; (E,) int32.
        """
        ...

    def shared_combine(
        self,
        expert_out: Tensor,
        x: Tensor,
        shared: FFNWeights,
        shared_gate: Tensor,
        *,
        segment_size: int,
        activation: str = "gelu",
        dropout: float = 0.0,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Stage 4 with a shared expert, (B, T, D)."""
        ...

    def combine(
        self,
        expert_out: Tensor,
        shared_out: Tensor | None = None,
        shared_gate_logits: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Stage 4, (B, T, D). See `functional.combine`."""
        ...


def autocast_weights(x: Tensor, weights: LayerWeights) -> tuple[LayerWeights, torch.dtype]:
    """Weights as ``torch.autocast`` wants them, and the dtype that products run in.

    The router stays in the dtype of x; without autocast, or in float64, nothing changes.
    """
    kind = x.device.type
    if not autocast_is_on(kind) or x.dtype == torch.float64:
        return weights, x.dtype
    dtype = torch.get_autocast_dtype(kind)
    shared, shared_gate = weights.shared, weights.shared_gate
    cast = weights._replace(
        router_weight=weights.router_weight.to(x.dtype),
        experts=weights.experts.to(dtype),
        shared=None if shared is None else shared.to(dtype),
        shared_gate=None if shared_gate is None else shared_gate.to(dtype),
    )
    return cast, dtype


def in_order(
    stages: Stages,
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Routing]:
    """The stages by themselves, without projections; a backend may have them in one."""
    expert_out, routed, expert_counts = stages.routed_experts(
        x,
        weights.router_weight,
        weights.experts,
        options,
        router_start=weights.router_start,
        padding_mask=padding_mask,
    )
    shared = weights.shared
    if shared is not None and weights.shared_gate is not None:
        y = stages.shared_combine(
            expert_out,
            x.to(shared.up_proj.dtype),
            shared,
            weights.shared_gate,
            segment_size=shared.up_proj.shape[-1] // x.shape[-1],
            activation=options.activation,
            dropout=options.dropout,
            padding_mask=padding_mask,
        )
    else:
        y = stages.combine(expert_out, None, None, padding_mask=padding_mask)
    return y, Routing(*routed[:4], expert_counts)


def run_stages(
    stages: Stages,
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Routing]:
    """Run the layer on the stages of one backend.

    Args:
        stages: of a backend.
        x: (..., T, D).
        weights: from `autocast_weights`.
        options: checked.
        padding_mask: (..., T) bool or None.

    Returns:
        ``(y, routing)``.
    """
    *batch_shape, length, d_model = x.shape
    sequences, mask = x, padding_mask
    if len(batch_shape) != 1:
        batch = math.prod(batch_shape)  # not numel(), which export would make a constant
        sequences = x.reshape(batch, length, d_model)
        mask = None if padding_mask is None else padding_mask.reshape(batch, length)
    tokens, real, size = sequences, mask, options.segment_size
    in_proj, out_proj = weights.in_proj, weights.out_proj
    if in_proj is not None:
        # A projected segment is one token of width D: the rest of the layer sees P = 1.
        rows = segments(sequences, size, mask).flatten(-2)
        # Back from the autocast dtype: the router sees x's.
        tokens = F.linear(rows, *in_proj).to(x.dtype)
        real = None if mask is None else valid_steps(sequences, size, mask).any(-1)
        options = options._replace(segment_size=1, expert_scope="token")
    whole = getattr(stages, "whole_layer", None) or partial(in_order, stages)
    y, routing = whole(tokens, weights, options, real)
    if out_proj is not None:
        y = F.linear(y.to(tokens.dtype), *out_proj)
        y = crop(rearrange(y, "b j (p d) -> b (j p) d", p=size), 1, length)
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
    # Some ways to crop leave a view.
    y = (y if y.dtype == x.dtype else y.to(x.dtype)).contiguous()
    return y if len(batch_shape) == 1 else y.reshape(x.shape), routing
