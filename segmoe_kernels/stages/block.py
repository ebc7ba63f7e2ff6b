"""Plan "block": stages 1 to 3 in one kernel, for few experts on rows that fit a program.

Data flow: ``x (B, T, D) -> y (B, T, D)``, the weighted sum over the choices, and the router's
decisions. A program owns a run of consecutive segments: it reads them, routes them, lists them by
expert and runs the experts over its own rows, so nothing is sorted globally, no intermediate
reaches memory and no later kernel sums the choices.

Backward keeps x, the logits, the ids and the seeds. The weights and the order by expert are made
anew, and the kernels of `experts` and `route` give the gradients.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.launch import (
    accumulator,
    accumulator_dtype,
    define_operator,
    exact,
    input_precision,
    padded,
    step_flags,
)
from segmoe_kernels._triton.tiles import block_fwd_tile, block_router_tile
from segmoe_kernels.routing import FFNWeights, RouterOutput
from segmoe_kernels.stages.block_kernels import block_fwd_kernel, block_prepare_kernel
from segmoe_kernels.stages.experts import differentiate_experts
from segmoe_kernels.stages.experts_launch import rows_contiguous
from segmoe_kernels.stages.permute import SEGMENTS_PER_BLOCK, permute
from segmoe_kernels.stages.route import differentiate_routing

NUM_TENSORS = 12


def _block_fwd(*args: Any) -> tuple[Tensor, ...]:
    outputs = _block_fwd_fake(*args)
    y, logits, probs, topk_weights, topk_ids, expert_counts = outputs
    x, router_weight, router_start, padding_mask, router_seed, seed, *weights = args[:NUM_TENSORS]
    segment_size, top_k, pooling, temperature, router_dropout, renormalize, activation, dropout = (
        args[NUM_TENSORS:]
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
    block_s, block_k = block_router_tile(d_model, x.dtype)
    blocks = triton.cdiv(num_segments, tile.segments)
    block_counts = topk_ids.new_empty(blocks, num_experts)
    list_size = blocks * tile.segments * top_k
    # An entry of a list holds a slot and a flag in 32 bits; kernels count rows in 32 bits too.
    check.check_programs("block", max(2, segment_size) * (list_size + tile.block_m))
    lists = topk_ids.new_empty(num_experts + (padding_mask is not None), list_size)
    block_fwd_kernel[(blocks,)](
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
        x.stride(0),
        x.stride(1),
        router_weight.stride(0),
        *up.stride()[:2],
        *((0, 0) if gate is None else gate.stride()[:2]),
        *down.stride()[:2],
        exact(temperature, x.dtype),
        exact(router_dropout, x.dtype),
        exact(dropout, x.dtype),
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
        **tile.options(),
    )
    torch.sum(block_counts, 0, dtype=torch.int32, out=expert_counts)
    return outputs


def _block_fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    x, router_weight = args[:2]
    up = args[6]
    segment_size, top_k = args[NUM_TENSORS : NUM_TENSORS + 2]
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
    "block_fwd(Tensor x, Tensor router_weight, Tensor? router_start, Tensor? padding_mask, "
    "Tensor? router_seed, Tensor? seed, Tensor up_proj, Tensor down_proj, Tensor? gate_proj, "
    "Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, SymInt segment_size, SymInt top_k, "
    "str pooling, float temperature, float router_dropout, bool renormalize, str activation, "
    "float dropout) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _block_fwd,
    _block_fwd_fake,
)


def _block_prepare(
    logits: Tensor,
    topk_ids: Tensor,
    router_seed: Tensor | None,
    temperature: float,
    router_dropout: float,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    outputs = _block_prepare_fake(logits, topk_ids)
    num_segments, num_experts = logits.shape
    if num_segments:
        block_prepare_kernel[(triton.cdiv(num_segments, SEGMENTS_PER_BLOCK),)](
            logits,
            topk_ids,
            router_seed,
            *outputs,
            num_segments,
            num_experts,
            exact(temperature, logits.dtype),
            exact(router_dropout, logits.dtype),
            TOP_K=topk_ids.shape[1],
            RENORMALIZE=renormalize,
            EXPERTS=padded(num_experts),
            BLOCK_S=SEGMENTS_PER_BLOCK,
            num_warps=1,
        )
    return outputs


def _block_prepare_fake(logits: Tensor, topk_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    num_segments, num_experts = logits.shape
    blocks = (num_segments + SEGMENTS_PER_BLOCK - 1) // SEGMENTS_PER_BLOCK
    # Flat, as those of `route`.
    counts = topk_ids.new_empty(blocks * (num_experts + 1))
    return torch.empty_like(topk_ids, dtype=logits.dtype), counts


_block_prepare_op = define_operator(
    "block_prepare(Tensor logits, Tensor topk_ids, Tensor? router_seed, float temperature, "
    "float router_dropout, bool renormalize) -> (Tensor, Tensor)",
    _block_prepare,
    _block_prepare_fake,
)


class _Block(torch.autograd.Function):
    """Keeps x, the weights, the mask, the seeds, and of a segment ``4 * (E + top_k)`` bytes."""

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
        options: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        # The parameters are written out, here and below: torch.compile counts them.
        outputs: tuple[Tensor, ...] = _block_fwd_op(
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
            *options,
        )
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
        *routing, seed, up, down, gate, up_bias, gate_bias, down_bias, logits, topk_ids = (
            ctx.saved_tensors
        )
        x, router_weight, _, padding_mask, router_seed = routing
        weights = (up, down, gate, up_bias, gate_bias, down_bias)
        segment_size, top_k, pooling, *choice, activation, dropout = ctx.options
        need = ctx.needs_input_grad
        need_dx, need_router = need[0], need[1] or need[2]
        dslots = shares = dx = drouter = dstart = None
        dw: list[Tensor] = []
        if dy is not None:
            topk_weights, block_counts = _block_prepare_op(logits, topk_ids, router_seed, *choice)
            order = permute(topk_ids, router_weight.shape[0], block_counts)
            absent = x.new_empty(0)
            needs = (need_dx, need_router, any(need[6:NUM_TENSORS]))
            dslots, shares, *dw = differentiate_experts(
                x.expand(top_k, *x.shape),
                topk_weights[..., None],
                order.sorted_to_slot,
                order.expert_offsets,
                *weights,
                padding_mask,
                seed,
                dy.expand(top_k, *dy.shape),
                absent,
                absent,
                (segment_size, False, activation, dropout, *needs),
            )
        if need_dx or need_router:
            dx, drouter, dstart = differentiate_routing(
                *routing,
                logits,
                topk_ids,
                dtopk_weights,
                shares,
                dprobs,
                dlogits,
                dslots if need_dx else None,
                (segment_size, pooling, *choice, need_dx, need_router),
            )
        given = iter(dw)
        dweights = [None if w is None or not dw else next(given) for w in weights]
        return (
            dx if need_dx else None,
            drouter if need[1] else None,
            dstart if need[2] else None,
            None,
            None,
            None,
            *(d if n else None for d, n in zip(dweights, need[6:NUM_TENSORS], strict=True)),
            None,
        )


def _draw_seed(probability: float, device: torch.device) -> Tensor | None:
    if probability > 0:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    return None


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
        step_flags(padding_mask, x.dtype),
        _draw_seed(router_dropout, x.device),
        _draw_seed(dropout, x.device),
        *rows_contiguous(experts),
        options,
    )
    return y[None], RouterOutput(*routing), expert_counts
