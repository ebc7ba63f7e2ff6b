"""Stage 1 of 4, route: pool each segment, score the experts, choose the best.

Data flow: ``x (B, T, D) -> pooled (S, W) -> router_logits (S, E) -> router_probs (S, E) ->
topk_weights, topk_ids (S, top_k)`` in one pass over x; pooled stays on chip.
Backward: ``dtopk_weights, drouter_probs, drouter_logits -> dlogits (S, E)``, then in one pass over
x ``dx = sum_k dx_slots[k] + dlogits @ router_weight`` and ``drouter_weight = dlogits.T @ pooled``.
"""

from typing import Any

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.arguments import (
    Routed,
    RoutedGradients,
    dropout_of,
    router_of,
    rows_of,
)
from segmoe_kernels._triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    define_operator,
    draw_seed,
    exact,
    padded,
    step_flags,
    within_reach,
)
from segmoe_kernels._triton.tiles import route_fwd_tile, segments_per_block
from segmoe_kernels.autograd import apply
from segmoe_kernels.options import Options
from segmoe_kernels.routing import RouterOutput
from segmoe_kernels.stages.route.backward import input_gradients, logits_gradient
from segmoe_kernels.stages.route.kernels import route_fwd_kernel


def _route_fwd(
    x: Tensor,
    router_weight: Tensor,
    router_start: Tensor | None,
    padding_mask: Tensor | None,
    seed: Tensor | None,
    segment_size: int,
    top_k: int,
    pooling: str,
    temperature: float,
    dropout: float,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _route_fwd_fake(x, router_weight, None, None, None, segment_size, top_k)
    num_segments = outputs[0].shape[0]
    if num_segments == 0:
        return outputs
    tile = route_fwd_tile(x.shape[2], router_weight.shape[0], x.dtype)
    # Rows that begin anywhere are loaded by the element: few columns at a time fit the registers.
    aligned = not any(offset % 16 for offset in (x.data_ptr(), *x.stride()[:-1]))
    per_block = segments_per_block(num_segments, router_weight.shape[0])
    grid = (cdiv(num_segments, per_block),)
    # Kernels count steps in 32 bits, missing ones of the last segments included.
    check.check_programs("route", grid[0] * per_block * segment_size)
    route_fwd_kernel[grid](
        rows_of(x),
        padding_mask,
        router_of(router_weight, router_start),
        dropout_of(seed, dropout, x.dtype),
        Routed(*outputs),
        num_segments,
        per_block,
        num_segments // x.shape[0],
        x.shape[1],
        router_weight.shape[0],
        exact(temperature, x.dtype),
        D=x.shape[2],
        SEGMENT_SIZE=segment_size,
        TOP_K=top_k,
        POOLING=pooling,
        RENORMALIZE=renormalize,
        ACC=accumulator(x.dtype),
        EXPERTS=padded(router_weight.shape[0]),
        BLOCK_S=tile.block_m,
        BLOCK_D=tile.block_n if aligned else min(tile.block_n, 32),
        **tile.options(),
    )
    return outputs


def _route_fwd_fake(
    x: Tensor,
    router_weight: Tensor,
    router_start: Tensor | None,  # noqa: ARG001  schema, as below
    padding_mask: Tensor | None,  # noqa: ARG001
    seed: Tensor | None,  # noqa: ARG001
    segment_size: int,
    top_k: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_segments = x.shape[0] * ((x.shape[1] + segment_size - 1) // segment_size)
    num_experts = router_weight.shape[0]
    dtype = accumulator_dtype(x.dtype)
    num_blocks = cdiv(num_segments, segments_per_block(num_segments, num_experts))
    logits = x.new_empty(num_segments, num_experts, dtype=dtype)
    return (
        logits,
        torch.empty_like(logits),
        logits.new_empty(num_segments, top_k),
        logits.new_empty(num_segments, top_k, dtype=torch.int32),
        # Flat: a dimension of one block would be specialised while tracing.
        logits.new_empty(num_blocks * (num_experts + 1), dtype=torch.int32),
    )


route_fwd = define_operator("route_fwd", _route_fwd, _route_fwd_fake)


def _route_bwd(
    x: Tensor,
    router_weight: Tensor,
    router_start: Tensor | None,
    padding_mask: Tensor | None,
    seed: Tensor | None,
    logits: Tensor,
    topk_ids: Tensor,
    dtopk_weights: Tensor | None,
    drow_weights: Tensor | None,
    dprobs: Tensor | None,
    dlogits_in: Tensor | None,
    dslots: Tensor | None,
    segment_size: int,
    pooling: str,
    temperature: float,
    dropout: float,
    renormalize: bool,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dstart = _route_bwd_fake(x, router_weight, router_start, need_dx, need_dweight)
    if logits.shape[0] == 0:
        return dx, dweight.zero_(), dstart.zero_()
    dlogits = logits_gradient(
        logits,
        topk_ids,
        seed,
        RoutedGradients(dtopk_weights, drow_weights, dprobs, dlogits_in),
        temperature,
        dropout,
        renormalize,
    )
    input_gradients(
        x,
        router_weight,
        router_start,
        padding_mask,
        dlogits,
        dslots,
        dx if need_dx else None,
        dweight if need_dweight else None,
        dstart if router_start is not None and need_dweight else None,
        segment_size,
        pooling,
    )
    return dx, dweight, dstart


def _route_bwd_fake(
    x: Tensor,
    router_weight: Tensor,
    router_start: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_dweight = rest[-2:]
    dx = x.new_empty(x.shape if need_dx else (0,))
    dweight = router_weight.new_empty(router_weight.shape if need_dweight else (0,))
    has_start = router_start is not None and need_dweight
    return dx, dweight, router_weight.new_empty(router_weight.shape[1:] if has_start else (0,))


route_bwd = define_operator("route_bwd", _route_bwd, _route_bwd_fake, gradient=True)


class _Route(torch.autograd.Function):
    """Keeps x, the weight, the mask, logits and ids (``4 * (E + top_k)`` bytes a segment)."""

    @staticmethod
    def forward(
        x: Tensor,
        router_weight: Tensor,
        router_start: Tensor | None,
        padding_mask: Tensor | None,
        seed: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = route_fwd(
            x, router_weight, router_start, padding_mask, seed, *options
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options = inputs
        logits, topk_ids, block_counts = output[0], output[3], output[4]
        ctx.mark_non_differentiable(topk_ids, block_counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, logits, topk_ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dlogits, dprobs, dtopk_weights, *_ = grads
        if dlogits is None and dprobs is None and dtopk_weights is None:
            return (None,) * 6
        need_dx = ctx.needs_input_grad[0]
        need_dweight = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        given = (dtopk_weights, None, dprobs, dlogits, None)
        options = (ctx.options[0], *ctx.options[2:], need_dx, need_dweight)
        dx, dweight, dstart = route_bwd(*ctx.saved_tensors, *given, *options)
        return (
            dx if need_dx else None,
            dweight if ctx.needs_input_grad[1] else None,
            dstart if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


def router_options(options: Options) -> tuple[Any, ...]:
    """Those of `route_fwd`."""
    top_k, renormalize = options.top_k, options.renormalize
    renormalize = top_k > 1 if renormalize is None else renormalize
    numbers = float(options.router_temperature), float(options.router_dropout)
    return options.segment_size, top_k, options.pooling, *numbers, renormalize


def route(
    x: Tensor,
    router_weight: Tensor,
    *,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
    **options: Any,
) -> RouterOutput:
    """Pool each segment and choose its experts; see `functional.route`."""
    chosen = Options(**options)
    x = x if x.stride(-1) == 1 else x.contiguous()
    start = None if router_start is None else router_start.contiguous()
    flags, seed = step_flags(padding_mask, x.dtype), draw_seed(chosen.router_dropout, x)
    tensors = (x, within_reach(router_weight), start, flags, seed)
    return RouterOutput(*apply(_Route, *tensors, router_options(chosen)))
