"""Stage 3 of 4, experts: every slot's FFN on its own rows, scaled by the slot's weight.

Data flow: ``x (top_k, B, T, D), topk_weights (S, top_k) -> out (top_k, B, T, D)``; rows are
gathered through ``sorted_to_slot`` and written where they came from. Two ways:

* fused, for rows of at most `MAX_FUSED_WIDTH` columns: one kernel forward, and backward one for
  x and the routing weights and one for the weights; the hidden layer is recomputed;
* two grouped products, for wider rows: the hidden layer before its activation is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from segmoe_kernels._triton.launch import (
    accumulator,
    accumulator_dtype,
    define_operator,
    input_precision,
    padded,
    refuse_double_backward,
)
from segmoe_kernels._triton.partials import new_partials, reduce_partials
from segmoe_kernels._triton.tiles import (
    GEMM_GROUP_M,
    MAX_FUSED_WIDTH,
    expert_ffn_dw_tile,
    expert_ffn_dx_tile,
    expert_ffn_fwd_tile,
    grouped_gemm_dhidden_tile,
    num_row_splits,
)
from segmoe_kernels.routing import FFNWeights, Permutation
from segmoe_kernels.stages.experts_fused import (
    expert_ffn_dw_kernel,
    expert_ffn_dx_kernel,
    expert_ffn_fwd_kernel,
)
from segmoe_kernels.stages.grouped_gemm import (
    gemm_grid,
    product,
    weight_gradient,
)
from segmoe_kernels.stages.grouped_gemm_kernels import grouped_gemm_dhidden_kernel
from segmoe_kernels.stages.route import router_precision, sum_splits


class Call:
    """One call's tensors and what the launches derive from them.

    Products run in the weights' dtype; under autocast x has a wider one.
    """

    def __init__(
        self,
        x: Tensor,
        topk_weights: Tensor,
        sorted_to_slot: Tensor,
        expert_offsets: Tensor,
        weights: FFNWeights,
        padding_mask: Tensor | None,
        seed: Tensor | None,
        segment_size: int,
        concat: bool,
        activation: str,
        dropout: float,
    ) -> None:
        self.x, self.topk_weights, self.weights = x, topk_weights, weights
        self.sorted_to_slot, self.expert_offsets = sorted_to_slot, expert_offsets
        self.padding_mask, self.seed = padding_mask, seed
        self.activation, self.dropout = activation, dropout
        self.top_k, self.batch, self.length, self.d_model = x.shape
        self.num_slots = topk_weights.shape[0] * topk_weights.shape[1]
        self.segments_per_sequence = -(-self.length // segment_size)
        self.rows_per_slot = 1 if concat else segment_size
        self.num_rows = self.num_slots * self.rows_per_slot
        self.num_experts, self.d_ff, self.width = weights.up_proj.shape
        self.dtype = weights.up_proj.dtype
        self.gated = weights.gate_proj is not None
        biased = any(bias is not None for bias in weights[3:])
        # What the table of tiles asks of a fused kernel.
        self.fused_in = {
            "gated": self.gated,
            "extras": biased or padding_mask is not None or seed is not None,
        }
        self.fused = self.width <= MAX_FUSED_WIDTH and not concat
        self.sequences: dict[str, Any] = {
            "sorted_to_slot": sorted_to_slot,
            "padding_mask": padding_mask,
            "segments_per_sequence": self.segments_per_sequence,
            "length": self.length,
            "constants": {
                "D": self.d_model,
                "TOP_K": self.top_k,
                "SEGMENT_SIZE": segment_size,
                "ROWS_PER_SLOT": self.rows_per_slot,
                "CONCAT": concat,
            },
        }
        self.numerics = {
            "ACC": accumulator(self.dtype),
            "PRECISION": input_precision(self.dtype),
        }
        self.fused_constants = {
            "D": self.d_model,
            "F": self.d_ff,
            "TOP_K": self.top_k,
            "SEGMENT_SIZE": segment_size,
            "ACTIVATION": activation,
        }

    def weight_strides(self) -> tuple[int, ...]:
        """Outer strides of up, gate and down."""
        up, down, gate = self.weights[:3]
        gate_strides = (0, 0) if gate is None else gate.stride()[:2]
        return (*up.stride()[:2], *gate_strides, *down.stride()[:2])


def _forward_fused(call: Call, out: Tensor) -> None:
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    tile = expert_ffn_fwd_tile(call.width, call.d_ff, call.dtype, **call.fused_in)
    grid = gemm_grid(call.num_rows, call.num_experts, 1, tile)
    expert_ffn_fwd_kernel[grid](
        call.x,
        call.topk_weights,
        up,
        gate,
        down,
        up_bias,
        gate_bias,
        down_bias,
        out,
        call.sorted_to_slot,
        call.expert_offsets,
        call.padding_mask,
        call.seed,
        call.num_slots,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        *call.x.stride()[:3],
        *call.weight_strides(),
        call.batch,
        call.dropout,
        **call.fused_constants,
        **call.numerics,
        GROUPS=padded(call.num_experts + 1),
        BLOCK_M=tile.block_m,
        BLOCK_F=tile.block_n,
        BLOCK_D=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _forward_two_products(
    call: Call, out: Tensor, pre: Tensor | None, gate_pre: Tensor | None
) -> None:
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    hidden = call.x.new_empty(call.num_rows, call.d_ff)
    product(
        call.x,
        up,
        hidden,
        call.expert_offsets,
        call.num_rows,
        widths=(call.d_ff, call.width),
        b2=gate,
        bias=up_bias,
        bias2=gate_bias,
        pre=pre,
        pre2=gate_pre,
        seed=call.seed,
        dropout=call.dropout,
        activation=call.activation,
        gather=True,
        sequences=call.sequences,
    )
    product(
        hidden,
        down,
        out,
        call.expert_offsets,
        call.num_rows,
        widths=(call.width, call.d_ff),
        bias=down_bias,
        row_weights=call.topk_weights,
        scatter=True,
        sequences=call.sequences,
    )


def launch_dx(call: Call, dy: Tensor, dx: Tensor | None, drow_weights: Tensor) -> None:
    """Gradients of x, for each choice, and of the routing weights, one share for each step."""
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    tile = expert_ffn_dx_tile(call.width, call.d_ff, call.dtype, **call.fused_in)
    grid = gemm_grid(call.num_rows, call.num_experts, 1, tile)
    expert_ffn_dx_kernel[grid](
        call.x,
        dy,
        call.topk_weights,
        up,
        gate,
        down,
        up_bias,
        gate_bias,
        down_bias,
        dx,
        drow_weights,
        call.sorted_to_slot,
        call.expert_offsets,
        call.padding_mask,
        call.seed,
        call.num_slots,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        *call.x.stride()[:3],
        *dy.stride()[:3],
        *call.weight_strides(),
        call.batch,
        call.dropout,
        **call.fused_constants,
        **call.numerics,
        GROUPS=padded(call.num_experts + 1),
        BLOCK_M=tile.block_m,
        BLOCK_F=tile.block_n,
        BLOCK_D=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def in_slot_order(dweights: FFNWeights) -> list[Tensor | None]:
    """The gradients in the order in which a slot of partial sums holds them."""
    up, down, gate, up_bias, gate_bias, down_bias = dweights
    return [up, down, gate, up_bias, down_bias, gate_bias]


def launch_dw(
    call: Call,
    dy: Tensor,
    dweights: FFNWeights,
    dlogits: Tensor | None = None,
    drouter: Tensor | None = None,
) -> None:
    """Weight gradients of the experts, and of the router in the same pass over x.

    Args:
        call: of a width that is fused.
        dy: (top_k, B, T, D).
        dweights: contiguous, every element is written.
        dlogits: (S, E), or None without the router; its pooling is "concat".
        drouter: (E, P * D) contiguous or None, every element is written.
    """
    up, down, gate, up_bias, gate_bias, _ = call.weights
    tile = expert_ffn_dw_tile(call.width, call.d_ff, call.dtype, **call.fused_in)
    columns = triton.cdiv(call.d_ff, tile.block_n)
    splits = num_row_splits(call.num_rows, tile.block_m, columns)
    parts = in_slot_order(dweights)
    partials = new_partials(parts, splits, call.num_experts, accumulator_dtype(call.dtype))
    router_partials = None if drouter is None else partials.new_empty(splits, *drouter.shape)
    expert_ffn_dw_kernel[(splits, columns + (drouter is not None))](
        call.x,
        dy,
        call.topk_weights,
        up,
        gate,
        down,
        up_bias,
        gate_bias,
        *parts,
        partials,
        call.sorted_to_slot,
        call.expert_offsets,
        call.padding_mask,
        call.seed,
        dlogits,
        router_partials,
        call.num_slots // call.top_k,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        splits,
        partials.shape[1],
        *call.x.stride()[:3],
        *dy.stride()[:3],
        *call.weight_strides(),
        call.dropout,
        **call.fused_constants,
        **call.numerics,
        HAS_BIAS=dweights.up_proj_bias is not None,
        ROUTER_PRECISION=router_precision(call.x),
        EXPERTS=padded(call.num_experts),
        GROUPS=padded(call.num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_F=tile.block_n,
        BLOCK_D=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    reduce_partials(partials, parts, call.expert_offsets, splits, call.rows_per_slot, tile.block_m)
    if drouter is not None and router_partials is not None:
        sum_splits(router_partials, drouter)


def _backward_two_products(
    call: Call,
    dy: Tensor,
    dx: Tensor | None,
    drow_weights: Tensor,
    dweights: FFNWeights | None,
    pre: Tensor,
    gate_pre: Tensor | None,
) -> None:
    up, down, gate, _, _, down_bias = call.weights
    hidden, dpre = torch.empty_like(pre), torch.empty_like(pre)
    dgate = None if gate_pre is None else torch.empty_like(gate_pre)
    tile = _dhidden_tile(call)
    grid = gemm_grid(call.num_rows, call.num_experts, call.d_ff, tile)
    grouped_gemm_dhidden_kernel[grid](
        dy,
        down,
        pre,
        gate_pre,
        call.topk_weights,
        down_bias,
        hidden,
        dpre,
        dgate,
        drow_weights,
        call.sorted_to_slot,
        call.expert_offsets,
        call.padding_mask,
        call.seed,
        call.num_slots,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        *dy.stride()[:3],
        *down.stride()[:2],
        call.dropout,
        N=call.d_ff,
        K=call.width,
        ACTIVATION=call.activation,
        **call.sequences["constants"],
        **call.numerics,
        GROUPS=padded(call.num_experts + 1),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GEMM_GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if dx is not None:
        product(
            dpre,
            up.transpose(1, 2),
            dx,
            call.expert_offsets,
            call.num_rows,
            widths=(call.width, call.d_ff),
            a2=dgate,
            b2=None if gate is None else gate.transpose(1, 2),
            scatter=True,
            sequences=call.sequences,
        )
    if dweights is None:
        return
    offsets, rows = call.expert_offsets, call.num_rows
    for d, weight, bias in (
        (dpre, dweights.up_proj, dweights.up_proj_bias),
        (dgate, dweights.gate_proj, dweights.gate_proj_bias),
    ):
        if d is not None and weight is not None:
            weight_gradient(
                d,
                call.x,
                offsets,
                weight,
                bias,
                rows,
                widths=(call.d_ff, call.width),
                gather=(False, True),
                sequences=call.sequences,
            )
    weight_gradient(
        dy,
        hidden,
        offsets,
        dweights.down_proj,
        dweights.down_proj_bias,
        rows,
        widths=(call.width, call.d_ff),
        gather=(True, False),
        row_weights=call.topk_weights,
        sequences=call.sequences,
    )


def _dhidden_tile(call: Call) -> Any:
    rows_per_expert = call.num_rows // call.num_experts
    return grouped_gemm_dhidden_tile(
        call.d_ff, call.width, rows_per_expert, call.x.dtype, **call.fused_in
    )


def _column_tiles(call: Call) -> int:
    """Rows of drow_weights: one for each column tile that contributes to a routing weight."""
    return int(triton.cdiv(call.d_ff, _dhidden_tile(call).block_n))


def _expert_ffn_fwd(
    x: Tensor,
    topk_weights: Tensor,
    sorted_to_slot: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate_proj: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    padding_mask: Tensor | None,
    seed: Tensor | None,
    segment_size: int,
    concat: bool,
    activation: str,
    dropout: float,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = FFNWeights(up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias)
    call = Call(
        x, topk_weights, sorted_to_slot, expert_offsets, weights, padding_mask, seed,
        segment_size, concat, activation, dropout,
    )  # fmt: skip
    out, pre, gate_pre = _outputs(call, keep_hidden)
    if out.numel() == 0:
        return out, pre, gate_pre
    if call.fused:
        _forward_fused(call, out)
    else:
        _forward_two_products(
            call, out, pre if pre.numel() else None, gate_pre if gate_pre.numel() else None
        )
    return out, pre, gate_pre


def _outputs(call: Call, keep_hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = keep_hidden and not call.fused
    shape = (call.num_rows, call.d_ff)
    out = call.x.new_empty(call.top_k, call.batch, call.length, call.d_model)
    pre = call.x.new_empty(shape if kept else (0,))
    gate_kept = kept and call.weights.gate_proj is not None
    return out, pre, call.x.new_empty(shape if gate_kept else (0,))


def _call(tensors: Sequence[Any], *options: Any) -> Call:
    """The call that an operator's arguments describe."""
    x, topk_weights, sorted_to_slot, expert_offsets = tensors[:4]
    padding_mask, seed = tensors[10:12]
    weights = FFNWeights(*tensors[4:10])
    return Call(
        x, topk_weights, sorted_to_slot, expert_offsets, weights, padding_mask, seed, *options
    )


def _expert_ffn_fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, segment_size, concat, activation, dropout, keep_hidden = args
    call = _call(tensors, segment_size, concat, activation, dropout)
    return _outputs(call, keep_hidden)


_TENSORS = (
    "Tensor x, Tensor topk_weights, Tensor sorted_to_slot, Tensor expert_offsets, "
    "Tensor up_proj, Tensor down_proj, Tensor? gate_proj, Tensor? up_bias, Tensor? gate_bias, "
    "Tensor? down_bias, Tensor? padding_mask, Tensor? seed"
)
_OPTIONS = "SymInt segment_size, bool concat, str activation, float dropout"

_expert_ffn_fwd_op = define_operator(
    f"expert_ffn_fwd({_TENSORS}, {_OPTIONS}, bool keep_hidden) -> (Tensor, Tensor, Tensor)",
    _expert_ffn_fwd,
    _expert_ffn_fwd_fake,
)


def _expert_ffn_bwd(
    x: Tensor,
    topk_weights: Tensor,
    sorted_to_slot: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate_proj: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    padding_mask: Tensor | None,
    seed: Tensor | None,
    dy: Tensor,
    pre: Tensor,
    gate_pre: Tensor,
    segment_size: int,
    concat: bool,
    activation: str,
    dropout: float,
    need_dx: bool,
    need_dw: bool,
) -> list[Tensor]:
    weights = FFNWeights(up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias)
    call = Call(
        x, topk_weights, sorted_to_slot, expert_offsets, weights, padding_mask, seed,
        segment_size, concat, activation, dropout,
    )  # fmt: skip
    dx, drow_weights, *dw = _gradients(call, need_dx, need_dw)
    if call.num_rows == 0 or x.numel() == 0:
        return [t.zero_() for t in (dx, drow_weights, *dw)]
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    dweights = None
    if need_dw:
        given = iter(dw)
        found = [None if w is None else next(given) for w in weights]
        dweights = FFNWeights(*found)  # type: ignore[arg-type]  # up and down are never None
    shares = drow_weights
    if not call.fused:
        shares = drow_weights.new_empty(_column_tiles(call), *drow_weights.shape)
    if call.fused:
        launch_dx(call, dy, dx if need_dx else None, shares)
        if dweights is not None:
            launch_dw(call, dy, dweights)
    else:
        _backward_two_products(
            call, dy, dx if need_dx else None, shares, dweights, pre,
            gate_pre if gate_proj is not None else None,
        )  # fmt: skip
        torch.sum(shares, dim=0, out=drow_weights)
    return [dx, drow_weights, *dw]


def _gradients(call: Call, need_dx: bool, need_dw: bool) -> list[Tensor]:
    """(dx, drow_weights, then one for each weight that is there)."""
    drow_weights = call.topk_weights.new_empty(*call.topk_weights.shape, call.rows_per_slot)
    dx = call.x.new_empty(call.x.shape if need_dx else (0,))
    dw = [w.new_empty(w.shape) for w in call.weights if w is not None] if need_dw else []
    return [dx, drow_weights, *dw]


def _expert_ffn_bwd_fake(*args: Any) -> list[Tensor]:
    *tensors, segment_size, concat, activation, dropout, need_dx, need_dw = args
    call = _call(tensors, segment_size, concat, activation, dropout)
    return _gradients(call, need_dx, need_dw)


_expert_ffn_bwd_op = define_operator(
    f"expert_ffn_bwd({_TENSORS}, Tensor dy, Tensor pre, Tensor gate_pre, {_OPTIONS}, "
    "bool need_dx, bool need_dw) -> Tensor[]",
    _expert_ffn_bwd,
    _expert_ffn_bwd_fake,
)


class _ExpertFFN(torch.autograd.Function):
    """Keeps x, the routing and the seed; wider rows keep the hidden layer before its activation."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, row_weights, *tensors, options = args
        # One column of the view is the contiguous (S, top_k) that it was made of.
        out: tuple[Tensor, Tensor, Tensor] = _expert_ffn_fwd_op(
            x, row_weights[..., 0].contiguous(), *tensors, *options
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, row_weights, *tensors, ctx.options = inputs
        _, pre, gate_pre = output
        ctx.mark_non_differentiable(pre, gate_pre)
        ctx.save_for_backward(x, row_weights, *tensors, pre, gate_pre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, pre, gate_pre = ctx.saved_tensors
        need = ctx.needs_input_grad
        options = (*ctx.options[:-1], need[0], any(need[4:10]))
        dx, drow_weights, *dw = _ExpertFFNBackward.apply(*tensors, grads[0], pre, gate_pre, options)
        given = iter(dw)
        dweights = [None if w is None or not dw else next(given) for w in tensors[4:10]]
        return (
            dx if need[0] else None,
            drow_weights if need[1] else None,
            None,
            None,
            *(d if n else None for d, n in zip(dweights, need[4:10], strict=True)),
            None,
            None,
            None,
        )


class _ExpertFFNBackward(torch.autograd.Function):
    """The gradient as a function of its own, so that a second derivative is refused loudly."""

    @staticmethod
    def forward(
        x: Tensor,
        row_weights: Tensor,
        sorted_to_slot: Tensor,
        expert_offsets: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        gate_proj: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        down_bias: Tensor | None,
        padding_mask: Tensor | None,
        seed: Tensor | None,
        dy: Tensor,
        pre: Tensor,
        gate_pre: Tensor,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        # The parameters are written out: torch.compile counts them.
        topk_weights = row_weights[..., 0].contiguous()
        return tuple(
            _expert_ffn_bwd_op(
                x,
                topk_weights,
                sorted_to_slot,
                expert_offsets,
                up_proj,
                down_proj,
                gate_proj,
                up_bias,
                gate_bias,
                down_bias,
                padding_mask,
                seed,
                dy,
                pre,
                gate_pre,
                *options,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        refuse_double_backward()


def rows_contiguous(weights: FFNWeights) -> FFNWeights:
    """Inner stride 1 for the matrices, biases contiguous; copies only what is not."""
    matrices = [w if w is None or w.stride(-1) == 1 else w.contiguous() for w in weights[:3]]
    biases = [None if w is None else w.contiguous() for w in weights[3:]]
    return FFNWeights(*matrices, *biases)  # type: ignore[arg-type]  # up and down are never None


def expert_ffn(
    x: Tensor,
    topk_weights: Tensor,
    permutation: Permutation,
    experts: FFNWeights,
    *,
    segment_size: int,
    expert_scope: str = "token",
    activation: str = "gelu",
    dropout: float = 0.0,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Run each slot's expert; see `functional.expert_ffn`.

    Args:
        x: (B, T, D), or (top_k, B, T, D), a view that repeats x for each choice.
        topk_weights: (S, top_k), or (S, top_k, P), a view that repeats them for each step.
        permutation: of the slots.
        experts: weights stacked over E.
        segment_size: P.
        expert_scope: "token" or "segment".
        activation: name of the activation.
        dropout: probability.
        padding_mask: (B, T) bool or None.

    Returns:
        (top_k, B, T, D).
    """
    if x.ndim == 3:
        x = x.expand(topk_weights.shape[1], *x.shape)
    concat = expert_scope == "segment"
    if topk_weights.ndim == 2:
        rows = 1 if concat else segment_size
        topk_weights = topk_weights[..., None].expand(*topk_weights.shape, rows)
    if x.stride(-1) != 1:
        x = x.contiguous()
    seed = None
    if dropout > 0:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    weights = rows_contiguous(experts)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, topk_weights, *weights)
    )
    options = (segment_size, concat, activation, float(dropout), needs_grad)
    out, _, _ = _ExpertFFN.apply(
        x,
        topk_weights,
        permutation.sorted_to_slot,
        permutation.expert_offsets,
        *weights,
        None if padding_mask is None else padding_mask.contiguous(),
        seed,
        options,
    )
    result: Tensor = out
    return result
