"""Launches of the router's backward, which the other stages make too."""

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.arguments import RoutedGradients, dropout_of, router_of, rows_of
from segmoe_kernels._triton.launch import accumulator, cdiv, exact, padded
from segmoe_kernels._triton.partials import sum_splits
from segmoe_kernels._triton.tiles import route_bwd_tile
from segmoe_kernels.stages.route.kernels import dlogits_kernel, route_bwd_kernel


def logits_gradient(
    logits: Tensor,
    topk_ids: Tensor,
    seed: Tensor | None,
    gradients: RoutedGradients,
    temperature: float,
    dropout: float,
    renormalize: bool,
) -> Tensor:
    """Launch `dlogits_kernel`; the arguments are its own. Returns (S, E)."""
    gradients = RoutedGradients(*(None if d is None else d.contiguous() for d in gradients))
    rows = gradients.row_weights_ptr
    num_segments, num_experts = logits.shape
    dlogits = torch.empty_like(logits)
    experts = padded(num_experts)
    block_s = max(16, min(128, 4096 // experts))
    dlogits_kernel[(cdiv(num_segments, block_s),)](
        logits,
        topk_ids,
        gradients,
        dlogits,
        dropout_of(seed, dropout, logits.dtype),
        num_segments,
        num_experts,
        exact(temperature, logits.dtype),
        TOP_K=topk_ids.shape[1],
        SEGMENT_SIZE=1 if rows is None else rows.shape[2],
        RENORMALIZE=renormalize,
        EXPERTS=experts,
        BLOCK_S=block_s,
        num_warps=4 if experts <= 256 else 8,
    )
    return dlogits


def router_precision(x: Tensor) -> str:
    """How products of the router's gradients round: its share of dx is rounded to x's dtype."""
    return "tf32" if x.dtype in {torch.float16, torch.bfloat16} else "ieee"


def input_gradients(
    x: Tensor,
    router_weight: Tensor,
    router_start: Tensor | None,
    padding_mask: Tensor | None,
    dlogits: Tensor,
    dslots: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dstart: Tensor | None,
    segment_size: int,
    pooling: str,
) -> None:
    """Launch `route_bwd_kernel` and add up its partial sums.

    Args:
        x: (B, T, D).
        router_weight: (E, W).
        router_start: (W,) or None.
        padding_mask: (B, T) bool or None.
        dlogits: (S, E).
        dslots: (k, B, T, D) or None, gradients of x from the experts; added to dx.
        dx: (B, T, D) contiguous or None, every element is written.
        dweight: (E, W) or None, every element is written.
        dstart: (W,) or None, every element is written.
        segment_size: P.
        pooling: see `functional.route`.
    """
    num_segments, num_experts = dlogits.shape
    experts = padded(num_experts)
    d_model = x.shape[2]
    tile = route_bwd_tile(d_model, num_experts, x.dtype)
    positions = segment_size if pooling == "concat" else 1
    columns = cdiv(d_model, tile.block_n)
    blocks = cdiv(num_segments, tile.block_m)
    # Enough programs to fill a large GPU, few enough that the partial sums stay small.
    splits = max(1, min(cdiv(blocks, 4), 1024 // (positions * columns)))
    blocks_per_split = cdiv(blocks, splits)
    splits = cdiv(blocks, blocks_per_split)
    # The kernel counts steps in 32 bits, those behind the last block of the last split included.
    check.check_programs("route", splits * blocks_per_split * tile.block_m * segment_size)
    partials = None
    if dweight is not None:
        partials = dlogits.new_empty(splits, *router_weight.shape)
    if dslots is not None and dslots.stride(-1) != 1:
        dslots = dslots.contiguous()
    route_bwd_kernel[(splits, positions, columns)](
        rows_of(x),
        padding_mask,
        router_of(router_weight, router_start),
        dlogits,
        rows_of(dslots),
        dx,
        partials,
        num_segments,
        num_segments // x.shape[0],
        x.shape[1],
        num_experts,
        0 if dslots is None else dslots.shape[0],
        blocks_per_split,
        D=d_model,
        SEGMENT_SIZE=segment_size,
        POOLING=pooling,
        ACC=accumulator(x.dtype),
        PRECISION=router_precision(x),
        EXPERTS=experts,
        BLOCK_S=tile.block_m,
        BLOCK_D=tile.block_n,
        **tile.options(),
    )
    if dweight is None or partials is None:
        return
    if router_start is None or dstart is None:
        sum_splits(partials, dweight)
        return
    # The first segment of each sequence saw the start vector.
    first = dlogits.view(x.shape[0], -1, num_experts)[:, 0].sum(0)
    dweight.copy_(partials.sum(0) + first[:, None] * router_start.to(first.dtype))
    dstart.copy_(first @ router_weight.to(first.dtype))
