"""Plan "block": stages 1 to 3 in one kernel, for few experts on rows that fit a program.

Data flow: ``x (B, T, D) -> y (B, T, D)``, the weighted sum over the choices, and the router's
decisions. A program owns a run of consecutive segments: it reads them, routes them, lists them by
expert and runs the experts over its own rows, so nothing is sorted globally, no intermediate
reaches memory and no later kernel sums the choices.

Backward keeps x, the logits, the ids and the seeds. The slots are grouped by expert with the
kernels of `permute`; with one choice and "concat" pooling one kernel then gives the gradients of x
and of the logits, one those of all weights; small experts take one kernel for both. With more
choices the stages' own kernels do: the gradients of x of each choice, and their sum in the router's
backward.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.launch import (
    accumulator,
    accumulator_dtype,
    define_operator,
    input_precision,
    padded,
    refuse_double_backward,
)
from segmoe_kernels._triton.partials import new_partials, reduce_partials
from segmoe_kernels._triton.plans import choose_backward
from segmoe_kernels._triton.tile_table import TileConfig
from segmoe_kernels._triton.tiles import (
    block_bwd_tile,
    block_dx_tile,
    block_fwd_tile,
    block_router_tile,
    num_row_splits,
)
from segmoe_kernels.routing import FFNWeights, RouterOutput
from segmoe_kernels.stages.block_backward_kernels import block_bwd_kernel, block_dx_kernel
from segmoe_kernels.stages.block_kernels import block_fwd_kernel, block_prepare_kernel
from segmoe_kernels.stages.experts import (
    Call,
    in_slot_order,
    launch_dw,
    launch_dx,
    rows_contiguous,
)
from segmoe_kernels.stages.permute import SEGMENTS_PER_BLOCK, permute
from segmoe_kernels.stages.route import input_gradients, logits_gradient, router_precision

_TENSORS = (
    "Tensor x, Tensor router_weight, Tensor? router_start, Tensor? padding_mask, "
    "Tensor? router_seed, Tensor? seed, Tensor up_proj, Tensor down_proj, Tensor? gate_proj, "
    "Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias"
)
_OPTIONS = (
    "SymInt segment_size, SymInt top_k, str pooling, float temperature, float router_dropout, "
    "bool renormalize, str activation, float dropout"
)
_NUM_TENSORS = 12


def _block_fwd(*args: Any) -> tuple[Tensor, ...]:
    outputs = _block_fwd_fake(*args)
    y, logits, probs, topk_weights, topk_ids, expert_counts = outputs
    x, router_weight, router_start, padding_mask, router_seed, seed, *weights = args[:_NUM_TENSORS]
    segment_size, top_k, pooling, temperature, router_dropout, renormalize, activation, dropout = (
        args[_NUM_TENSORS:]
    )
    up, down, gate, up_bias, gate_bias, down_bias = weights
    num_segments, num_experts = logits.shape
    if num_segments == 0:
        expert_counts.zero_()
        return outputs
    batch, length, d_model = x.shape
    d_ff = up.shape[1]
    extras = (padding_mask, seed, up_bias, gate_bias, down_bias)
    tile = block_fwd_tile(
        d_model,
        d_ff,
        num_experts,
        top_k,
        segment_size,
        num_segments,
        up.dtype,
        gated=gate is not None,
        extras=any(tensor is not None for tensor in extras),
    )
    block_s, block_k = block_router_tile(d_model, tile.segments, x.dtype)
    blocks = triton.cdiv(num_segments, tile.segments)
    block_counts = topk_ids.new_empty(blocks, tile.groups, num_experts)
    list_size = blocks * tile.segments * top_k
    # An entry of a list holds a slot and a flag in 32 bits; kernels count rows in 32 bits too.
    check.check_programs("block", max(2, segment_size) * (list_size + tile.block_m))
    lists = topk_ids.new_empty(num_experts + (padding_mask is not None), list_size)
    block_fwd_kernel[(blocks, tile.groups)](
        x,
        router_weight,
        router_start,
        padding_mask,
        router_seed,
        seed,
        up,
        gate,
        down,
        up_bias,
        gate_bias,
        down_bias,
        y,
        logits,
        probs,
        topk_weights,
        topk_ids,
        block_counts,
        lists,
        list_size,
        num_segments,
        tile.segments,
        num_segments // batch,
        length,
        num_experts,
        batch,
        tile.groups,
        x.stride(0),
        x.stride(1),
        router_weight.stride(0),
        *up.stride()[:2],
        *((0, 0) if gate is None else gate.stride()[:2]),
        *down.stride()[:2],
        temperature,
        router_dropout,
        dropout,
        D=d_model,
        F=d_ff,
        SEGMENT_SIZE=segment_size,
        TOP_K=top_k,
        POOLING=pooling,
        RENORMALIZE=renormalize,
        ACTIVATION=activation,
        ROUTER_ACC=accumulator(x.dtype),
        ACC=accumulator(up.dtype),
        PRECISION=input_precision(up.dtype),
        EXPERTS=padded(num_experts),
        BLOCK_S=block_s,
        BLOCK_K=block_k,
        BLOCK_M=tile.block_m,
        BLOCK_F=tile.block_f,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    torch.sum(block_counts[:, 0], 0, dtype=torch.int32, out=expert_counts)
    return outputs


def _block_fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    x, router_weight = args[:2]
    up = args[6]
    segment_size, top_k = args[_NUM_TENSORS : _NUM_TENSORS + 2]
    num_segments = x.shape[0] * ((x.shape[1] + segment_size - 1) // segment_size)
    num_experts = router_weight.shape[0]
    logits = x.new_empty(num_segments, num_experts, dtype=accumulator_dtype(x.dtype))
    return (
        x.new_empty(x.shape, dtype=up.dtype),
        logits,
        torch.empty_like(logits),
        logits.new_empty(num_segments, top_k),
        logits.new_empty(num_segments, top_k, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=torch.int32),
    )


_block_fwd_op = define_operator(
    f"block_fwd({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _block_fwd,
    _block_fwd_fake,
)


def _block_bwd(*args: Any) -> list[Tensor]:
    x, router_weight, router_start, padding_mask, router_seed, seed, *weights = args[:_NUM_TENSORS]
    logits, topk_ids, dy, dtopk_weights, dprobs, dlogits_in = args[_NUM_TENSORS : _NUM_TENSORS + 6]
    (
        segment_size, top_k, pooling, temperature, router_dropout, renormalize, activation,
        dropout, need_dx, need_drouter, need_dw,
    ) = args[_NUM_TENSORS + 6 :]  # fmt: skip
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
        temperature,
        router_dropout,
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
        router.temperature,
        router.dropout,
        call.dropout,
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
        router.temperature,
        router.dropout,
        call.dropout,
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
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _block_bwd_fake(*args: Any) -> list[Tensor]:
    """(dx, drouter_weight, drouter_start, then one for each weight); empty where not needed."""
    x, router_weight, router_start = args[:3]
    weights = args[6:_NUM_TENSORS]
    need_dx, need_drouter, need_dw = args[-3:]
    has_start = router_start is not None and need_drouter
    return [
        x.new_empty(x.shape if need_dx else (0,)),
        router_weight.new_empty(router_weight.shape if need_drouter else (0,)),
        router_weight.new_empty(router_weight.shape[1:] if has_start else (0,)),
        *(w.new_empty(w.shape) for w in weights if w is not None and need_dw),
    ]


_block_bwd_op = define_operator(
    f"block_bwd({_TENSORS}, Tensor logits, Tensor topk_ids, Tensor dy, Tensor? dtopk_weights, "
    f"Tensor? dprobs, Tensor? dlogits_in, {_OPTIONS}, bool need_dx, bool need_drouter, "
    "bool need_dw) -> Tensor[]",
    _block_bwd,
    _block_bwd_fake,
)


class _Block(torch.autograd.Function):
    """Keeps x, the weights, the mask, the seeds, and of a segment ``4 * (E + top_k)`` bytes."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, options = args
        outputs: tuple[Tensor, ...] = _block_fwd_op(*tensors, *options)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options = inputs
        _, logits, _, _, topk_ids, expert_counts = output
        ctx.mark_non_differentiable(topk_ids, expert_counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, logits, topk_ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dlogits, dprobs, dtopk_weights = grads[:4]
        saved = ctx.saved_tensors
        need = ctx.needs_input_grad
        if dy is None:
            dy = saved[0].new_zeros((), dtype=saved[6].dtype).expand(saved[0].shape)
        needs = (need[0], need[1] or need[2], any(need[6:_NUM_TENSORS]))
        dx, drouter, dstart, *dw = _BlockBackward.apply(
            *saved, dy, dtopk_weights, dprobs, dlogits, (*ctx.options, *needs)
        )
        given = iter(dw)
        weights = saved[6:_NUM_TENSORS]
        dweights = [None if w is None or not dw else next(given) for w in weights]
        return (
            dx if need[0] else None,
            drouter if need[1] else None,
            dstart if need[2] else None,
            None,
            None,
            None,
            *(d if n else None for d, n in zip(dweights, need[6:_NUM_TENSORS], strict=True)),
            None,
        )


class _BlockBackward(torch.autograd.Function):
    """The gradient as a function of its own, so that a second derivative is refused loudly."""

    @staticmethod
    def forward(
        x: Tensor,
        router_weight: Tensor,
        router_start: Tensor | None,
        padding_mask: Tensor | None,
        router_seed: Tensor | None,
        seed: Tensor | None,
        up_proj: Tensor,
        down_proj: Tensor,
        gate_proj: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        down_bias: Tensor | None,
        logits: Tensor,
        topk_ids: Tensor,
        dy: Tensor,
        dtopk_weights: Tensor | None,
        dprobs: Tensor | None,
        dlogits: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        # The parameters are written out: torch.compile counts them.
        return tuple(
            _block_bwd_op(
                x,
                router_weight,
                router_start,
                padding_mask,
                router_seed,
                seed,
                up_proj,
                down_proj,
                gate_proj,
                up_bias,
                gate_bias,
                down_bias,
                logits,
                topk_ids,
                dy,
                dtopk_weights,
                dprobs,
                dlogits,
                *options,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        refuse_double_backward()


def block_experts(
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    *,
    segment_size: int,
    top_k: int,
    pooling: str = "concat",
    activation: str = "gelu",
    dropout: float = 0.0,
    router_temperature: float = 1.0,
    router_dropout: float = 0.0,
    renormalize: bool | None = None,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, RouterOutput, Tensor]:
    """Route every segment and run its experts, in one launch; see `functional.seg_moe`.

    Returns:
        ``(expert_out, routed, expert_counts)``: (1, B, T, D), the choices summed, in the weights'
        dtype; RouterOutput; (E,) int32.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    if router_weight.stride(-1) != 1:
        router_weight = router_weight.contiguous()

    def seed(probability: float) -> Tensor | None:
        if probability > 0:
            return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
        return None

    options = (
        segment_size,
        top_k,
        pooling,
        float(router_temperature),
        float(router_dropout),
        top_k > 1 if renormalize is None else renormalize,
        activation,
        float(dropout),
    )
    y, *routing, expert_counts = _Block.apply(
        x,
        router_weight,
        None if router_start is None else router_start.contiguous(),
        None if padding_mask is None else padding_mask.contiguous(),
        seed(router_dropout),
        seed(dropout),
        *rows_contiguous(experts),
        options,
    )
    return y[None], RouterOutput(*routing), expert_counts
