"""Backward of plan "block": which kernels run, and their launches."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.launch import accumulator_dtype, define_operator, exact, padded
from segmoe_kernels._triton.partials import new_partials, reduce_partials
from segmoe_kernels._triton.plans import choose_backward
from segmoe_kernels._triton.tile_table import TileConfig
from segmoe_kernels._triton.tiles import block_bwd_tile, block_dx_tile, num_row_splits
from segmoe_kernels.routing import FFNWeights
from segmoe_kernels.stages.block_backward_kernels import block_bwd_kernel, block_dx_kernel
from segmoe_kernels.stages.block_kernels import block_prepare_kernel
from segmoe_kernels.stages.experts_launch import Call, in_slot_order, launch_dw, launch_dx
from segmoe_kernels.stages.permute import SEGMENTS_PER_BLOCK, permute
from segmoe_kernels.stages.route_gradients import input_gradients, logits_gradient, router_precision

TENSORS = (
    "Tensor x, Tensor router_weight, Tensor? router_start, Tensor? padding_mask, "
    "Tensor? router_seed, Tensor? seed, Tensor up_proj, Tensor down_proj, Tensor? gate_proj, "
    "Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias"
)
OPTIONS = (
    "SymInt segment_size, SymInt top_k, str pooling, float temperature, float router_dropout, "
    "bool renormalize, str activation, float dropout"
)
NUM_TENSORS = 12


def _block_bwd(*args: Any) -> list[Tensor]:
    x, router_weight, router_start, padding_mask, router_seed, seed, *weights = args[:NUM_TENSORS]
    logits, topk_ids, dy, dtopk_weights, dprobs, dlogits_in = args[NUM_TENSORS : NUM_TENSORS + 6]
    (
        segment_size, top_k, pooling, temperature, router_dropout, renormalize, activation,
        dropout, need_dx, need_drouter, need_dw,
    ) = args[NUM_TENSORS + 6 :]  # fmt: skip
    gradients = _block_bwd_fake(*args)
    if logits.shape[0] == 0:
        return [gradient.zero_() for gradient in gradients]
    dx, drouter, dstart, *dw = gradients
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    num_segments, num_experts = logits.shape
    topk_weights = torch.empty_like(topk_ids, dtype=logits.dtype)
    blocks = triton.cdiv(num_segments, SEGMENTS_PER_BLOCK)
    block_counts = topk_ids.new_empty(blocks, num_experts + 1)
    block_prepare_kernel[(blocks,)](
        logits,
        topk_ids,
        router_seed,
        topk_weights,
        block_counts,
        num_segments,
        num_experts,
        exact(temperature, logits.dtype),
        exact(router_dropout, logits.dtype),
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        EXPERTS=padded(num_experts),
        BLOCK_S=SEGMENTS_PER_BLOCK,
        num_warps=1,
    )
    permutation = permute(topk_ids, num_experts, block_counts)
    call = Call(
        x.expand(top_k, *x.shape),
        topk_weights,
        permutation.sorted_to_slot,
        permutation.expert_offsets,
        FFNWeights(*weights),
        padding_mask,
        seed,
        segment_size,
        False,
        activation,
        dropout,
    )
    dslots = dy.expand(top_k, *dy.shape)
    router = _Router(
        router_weight,
        logits,
        None if dtopk_weights is None else dtopk_weights.contiguous(),
        None if dprobs is None else dprobs.contiguous(),
        None if dlogits_in is None else dlogits_in.contiguous(),
        router_seed,
        temperature,
        router_dropout,
        renormalize,
    )
    dlogits = None
    router_done = False
    direct = pooling == "concat" and router_start is None
    tile = block_dx_tile(call.width, call.d_ff, call.dtype, **call.fused_in)
    if (need_dx or need_drouter) and direct and _holds_segments(call, tile):
        dlogits = torch.empty_like(logits) if need_drouter else None
        small = block_bwd_tile(
            call.width, call.d_ff, call.dtype, **call.fused_in, dropout=call.seed is not None
        )
        fits = small is not None and _holds_segments(call, small)
        if need_dx and need_dw and small is not None and fits and choose_backward() == "one":
            _launch_block_bwd(call, small, dslots, router, dx, dlogits, _as_weights(dw, weights))
            need_dw = False
        else:
            _launch_block_dx(call, tile, dslots, router, dx if need_dx else None, dlogits)
        if need_dw and need_drouter:
            launch_dw(call, dslots, _as_weights(dw, weights), dlogits, drouter)
            return gradients
        router_done = True
    elif need_dx or need_drouter:
        shares = topk_weights.new_empty(*topk_weights.shape, segment_size)
        parts = call.x.new_empty(call.x.shape, dtype=dy.dtype) if need_dx else None
        launch_dx(call, dslots, parts, shares)
        dlogits = logits_gradient(
            logits,
            topk_ids,
            router_seed,
            router.dtopk_weights,
            shares,
            router.dprobs,
            router.dlogits_in,
            temperature,
            router_dropout,
            renormalize,
        )
        input_gradients(
            x, router_weight, router_start, padding_mask, dlogits, parts,
            dx if need_dx else None, drouter if need_drouter else None,
            dstart if router_start is not None and need_drouter else None, segment_size, pooling,
        )  # fmt: skip
    if router_done and need_drouter and dlogits is not None:
        input_gradients(
            x, router_weight, None, padding_mask, dlogits, None, None, drouter, None,
            segment_size, pooling,
        )  # fmt: skip
    if need_dw:
        launch_dw(call, dslots, _as_weights(dw, weights))
    return gradients


def _as_weights(dw: list[Tensor], weights: list[Tensor | None]) -> FFNWeights:
    """The gradients in the places of the weights that are there."""
    given = iter(dw)
    found = [None if w is None else next(given) for w in weights]
    return FFNWeights(*found)  # type: ignore[arg-type]  # up and down are never None


class _Router(NamedTuple):
    """What the backward kernels take of the router; the gradients come from the caller."""

    weight: Tensor  # (E, P * D)
    logits: Tensor  # (S, E)
    dtopk_weights: Tensor | None  # (S, top_k)
    dprobs: Tensor | None  # (S, E)
    dlogits_in: Tensor | None  # (S, E)
    seed: Tensor | None
    temperature: float
    dropout: float
    renormalize: bool


def _holds_segments(call: Call, tile: TileConfig) -> bool:
    """Whether a tile can be whole segments of one expert.

    With several choices a segment lies in several tiles, and where segments leave a quarter of a
    tile empty, that costs more than the pass it saves.
    """
    full = tile.block_m // call.rows_per_slot * call.rows_per_slot
    return call.top_k == 1 and 4 * full >= 3 * tile.block_m


def _launch_block_dx(
    call: Call,
    tile: TileConfig,
    dy: Tensor,
    router: _Router,
    dx: Tensor | None,
    dlogits: Tensor | None,
) -> None:
    programs = triton.cdiv(call.num_slots, tile.block_m // call.rows_per_slot) + call.num_experts
    check.check_programs("block", programs * tile.block_m)
    block_dx_kernel[(programs,)](
        call.x,
        dy,
        router.weight,
        call.topk_weights,
        *router[1:5],
        *_kernel_weights(call),
        dx,
        dlogits,
        call.sorted_to_slot,
        call.expert_offsets,
        call.padding_mask,
        router.seed,
        call.seed,
        call.num_slots,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        call.batch,
        *_strides(call, dy, router.weight),
        exact(router.temperature, call.dtype),
        exact(router.dropout, call.dtype),
        exact(call.dropout, call.dtype),
        **_constants(call, tile, renormalize=router.renormalize),
        GROUPS=padded(call.num_experts + 1),
    )


def _launch_block_bwd(
    call: Call,
    tile: TileConfig,
    dy: Tensor,
    router: _Router,
    dx: Tensor,
    dlogits: Tensor | None,
    dweights: FFNWeights,
) -> None:
    splits = num_row_splits(call.num_rows, tile.block_m, 1)
    parts = in_slot_order(dweights)
    partials = new_partials(parts, splits, call.num_experts, accumulator_dtype(call.dtype))
    block_bwd_kernel[(splits,)](
        call.x,
        dy,
        router.weight,
        call.topk_weights,
        *router[1:5],
        *_kernel_weights(call),
        dx,
        dlogits,
        *parts,
        partials,
        call.sorted_to_slot,
        call.expert_offsets,
        call.padding_mask,
        router.seed,
        call.seed,
        call.num_slots,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        call.batch,
        splits,
        partials.shape[1],
        *_strides(call, dy, router.weight),
        exact(router.temperature, call.dtype),
        exact(router.dropout, call.dtype),
        exact(call.dropout, call.dtype),
        **_constants(call, tile, renormalize=router.renormalize),
        HAS_BIAS=dweights.up_proj_bias is not None,
    )
    segments_per_tile = tile.block_m // call.rows_per_slot
    reduce_partials(partials, parts, call.expert_offsets, splits, 1, segments_per_tile)


def _kernel_weights(call: Call) -> tuple[Tensor | None, ...]:
    """The weights in the order that the kernels take them in."""
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    return up, gate, down, up_bias, gate_bias, down_bias


def _strides(call: Call, dy: Tensor, router_weight: Tensor) -> tuple[int, ...]:
    """Outer strides of x, dy, the router's weight, up, gate and down."""
    rows = (*call.x.stride()[1:3], *dy.stride()[1:3])
    return (*rows, router_weight.stride(0), *call.weight_strides())


def _constants(call: Call, tile: TileConfig, *, renormalize: bool) -> dict[str, Any]:
    """What both backward kernels are compiled for."""
    return {
        "D": call.d_model,
        "F": call.d_ff,
        "SEGMENT_SIZE": call.rows_per_slot,
        "RENORMALIZE": renormalize,
        "ACTIVATION": call.activation,
        **call.numerics,
        "ROUTER_PRECISION": router_precision(call.x),
        "EXPERTS": padded(call.num_experts),
        "BLOCK_M": tile.block_m,
        "BLOCK_F": tile.block_n,
        "BLOCK_D": tile.block_k,
        **tile.options(),
    }


def _block_bwd_fake(*args: Any) -> list[Tensor]:
    """(dx, drouter_weight, drouter_start, then one for each weight); empty where not needed."""
    x, router_weight, router_start = args[:3]
    weights = args[6:NUM_TENSORS]
    need_dx, need_drouter, need_dw = args[-3:]
    has_start = router_start is not None and need_drouter
    return [
        x.new_empty(x.shape if need_dx else (0,)),
        router_weight.new_empty(router_weight.shape if need_drouter else (0,)),
        router_weight.new_empty(router_weight.shape[1:] if has_start else (0,)),
        *(w.new_empty(w.shape) for w in weights if w is not None and need_dw),
    ]


block_bwd_op = define_operator(
    f"block_bwd({TENSORS}, Tensor logits, Tensor topk_ids, Tensor dy, Tensor? dtopk_weights, "
    f"Tensor? dprobs, Tensor? dlogits_in, {OPTIONS}, bool need_dx, bool need_drouter, "
    "bool need_dw) -> Tensor[]",
    _block_bwd,
    _block_bwd_fake,
)
