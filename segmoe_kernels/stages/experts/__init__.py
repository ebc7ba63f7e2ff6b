"""Stage 3 of 4, experts: every slot's FFN on its own rows, scaled by the slot's weight.

Data flow: ``x (top_k, B, T, D), topk_weights (S, top_k) -> out (top_k, B, T, D)``; rows are
gathered through ``sorted_to_slot`` and written where they came from. Two ways:

* fused, for rows of at most `MAX_FUSED_WIDTH` columns: one kernel forward, and backward one for
  x and the routing weights; the hidden layer is recomputed. Weight gradients: one more kernel, or
  in float32 and beyond `MAX_FUSED_DW_WIDTH` columns products of what the kernel for x has written;
* two grouped products, for wider rows: the hidden layer before its activation is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segmoe_kernels._triton.arguments import Slots
from segmoe_kernels._triton.launch import define_operator, draw_seed, step_flags
from segmoe_kernels._triton.tiles import MAX_FUSED_DW_WIDTH
from segmoe_kernels.autograd import apply, is_followed
from segmoe_kernels.routing import FFNWeights, Permutation
from segmoe_kernels.stages.experts.launch import (
    Call,
    backward_two_products,
    column_tiles,
    forward_fused,
    forward_two_products,
    launch_dw,
    launch_dx,
    launch_products_dw,
    new_kept,
    rows_contiguous,
)


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
    slots = Slots(sorted_to_slot, expert_offsets, padding_mask)
    call = Call(x, topk_weights, slots, weights, seed, segment_size, concat, activation, dropout)
    out, pre, gate_pre = _outputs(call, keep_hidden)
    if out.numel() == 0:
        return out, pre, gate_pre
    if call.fused:
        forward_fused(call, out)
    else:
        forward_two_products(
            call, out, pre if pre.numel() else None, gate_pre if gate_pre.numel() else None
        )
    return out, pre, gate_pre


def _outputs(call: Call, keep_hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = keep_hidden and not call.fused
    shape = (call.num_rows, call.d_ff)
    out = call.x.new_empty(call.shape)
    pre = call.x.new_empty(shape if kept else (0,))
    gate_kept = kept and call.weights.gate_proj is not None
    return out, pre, call.x.new_empty(shape if gate_kept else (0,))


def _call(tensors: Sequence[Any], *options: Any) -> Call:
    """The call that an operator's arguments describe."""
    x, topk_weights, sorted_to_slot, expert_offsets, *weights, padding_mask, seed = tensors[:12]
    slots = Slots(sorted_to_slot, expert_offsets, padding_mask)
    return Call(x, topk_weights, slots, FFNWeights(*weights), seed, *options)


def _expert_ffn_fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, segment_size, concat, activation, dropout, keep_hidden = args
    call = _call(tensors, segment_size, concat, activation, dropout)
    return _outputs(call, keep_hidden)


expert_ffn_fwd = define_operator("expert_ffn_fwd", _expert_ffn_fwd, _expert_ffn_fwd_fake)


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
    need_drow_weights: bool,
    need_dw: bool,
) -> list[Tensor]:
    weights = FFNWeights(up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias)
    slots = Slots(sorted_to_slot, expert_offsets, padding_mask)
    call = Call(x, topk_weights, slots, weights, seed, segment_size, concat, activation, dropout)
    dx, drow_weights, *dw = _gradients(call, need_dx, need_dw)
    if call.num_rows == 0 or x.numel() == 0:
        return [t.zero_() for t in (dx, drow_weights, *dw)]
    dy = call.in_sequence(dy if dy.stride(-1) == 1 else dy.contiguous())
    dweights = None
    if need_dw:
        given = iter(dw)
        found = [None if w is None else next(given) for w in weights]
        dweights = FFNWeights(*found)  # type: ignore[arg-type]  # up and down are never None
    if call.fused:
        products = call.width > MAX_FUSED_DW_WIDTH or call.dtype == torch.float32
        kept = new_kept(call) if need_dw and products else None
        if need_dx or need_drow_weights or kept is not None:
            launch_dx(call, dy, dx if need_dx else None, drow_weights, kept)
        if dweights is not None and kept is not None:
            launch_products_dw(call, dy, dweights, *kept)
        elif dweights is not None:
            launch_dw(call, dy, dweights)
    else:
        shares = drow_weights.new_empty(column_tiles(call), *drow_weights.shape)
        wanted = dx if need_dx else None
        gate_kept = gate_pre if call.gated else None
        backward_two_products(call, dy, wanted, shares, dweights, pre, gate_kept)
        torch.sum(shares, dim=0, out=drow_weights)
    return [dx, drow_weights, *dw]


def _gradients(call: Call, need_dx: bool, need_dw: bool) -> list[Tensor]:
    """(dx, drow_weights, then one for each weight that is there)."""
    drow_weights = call.topk_weights.new_empty(*call.topk_weights.shape, call.rows_per_slot)
    dx = call.x.new_empty(call.shape if need_dx else (0,), dtype=call.dtype)
    dw = [w.new_empty(w.shape) for w in call.weights if w is not None] if need_dw else []
    return [dx, drow_weights, *dw]


def _expert_ffn_bwd_fake(*args: Any) -> list[Tensor]:
    *tensors, segment_size, concat, activation, dropout, need_dx, _, need_dw = args
    call = _call(tensors, segment_size, concat, activation, dropout)
    return _gradients(call, need_dx, need_dw)


expert_ffn_bwd = define_operator(
    "expert_ffn_bwd", _expert_ffn_bwd, _expert_ffn_bwd_fake, gradient=True
)


class _ExpertFFN(torch.autograd.Function):
    """Keeps x, the routing and the seed; wider rows keep the hidden layer before its activation."""

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
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The parameters are written out: torch.compile counts them.
        out: tuple[Tensor, Tensor, Tensor] = expert_ffn_fwd(
            x,
            # One column of the view is the contiguous (S, top_k) that it was made of.
            row_weights[..., 0].contiguous(),
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
            *options,
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, row_weights, *tensors, ctx.options = inputs
        _, pre, gate_pre = output
        ctx.mark_non_differentiable(pre, gate_pre)
        # As zeros those of the kept layers would be as large as they are.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, row_weights, *tensors, pre, gate_pre)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 13
        x, row_weights, *tensors, pre, gate_pre = ctx.saved_tensors
        topk_weights = row_weights[..., 0].contiguous()
        need = ctx.needs_input_grad
        options = (*ctx.options[:-1], *need[:2], any(need[4:10]))
        dx, drow_weights, *dw = expert_ffn_bwd(
            x, topk_weights, *tensors, dy, pre, gate_pre, *options
        )
        given = iter(dw)
        dweights = [None if w is None or not dw else next(given) for w in tensors[2:8]]
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
    weights = rows_contiguous(experts)
    keep = is_followed(x, topk_weights, *weights)
    options = (segment_size, concat, activation, float(dropout), keep)
    out, _, _ = apply(
        _ExpertFFN,
        x,
        topk_weights,
        permutation.sorted_to_slot,
        permutation.expert_offsets,
        *weights,
        step_flags(padding_mask, x.dtype),
        draw_seed(dropout, x),
        options,
    )
    result: Tensor = out
    return result
