"""Kernels of plan "block", backward with one choice: experts and router in one pass over x and dy.

Launched by `block`. A tile is whole segments of one expert, so the gradient of a segment's routing
weight is complete inside the tile, and the router's share of dx is added before dx is stored.
`block_bwd_kernel` sums the gradients of the experts' weights in the same pass, where they fit in
registers beside the rest.
"""

import triton
import triton.language as tl

from segmoe_kernels._triton.ffn import hidden_with_grads, load_bias, load_tile
from segmoe_kernels._triton.partials import store_gradients
from segmoe_kernels._triton.router import differentiate_choice
from segmoe_kernels._triton.sequences import (
    find_group,
    find_split,
    load_rows,
    place_steps,
    store_steps,
)


@triton.jit
def _find_segments(
    sorted_to_slot_ptr, start, end, SEGMENT_SIZE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return ``(mask_m, segment)`` of the rows of a tile."""
    local = tl.arange(0, BLOCK_M) // SEGMENT_SIZE
    mask_m = (local < BLOCK_M // SEGMENT_SIZE) & (start + local < end)
    return mask_m, tl.load(sorted_to_slot_ptr + start + local, mask=mask_m, other=0)


@triton.jit
def _load_segments(
    x_ptr,
    dy_ptr,
    topk_weights_ptr,
    sorted_to_slot_ptr,
    padding_mask_ptr,
    start,  # first segment of the tile, in the order grouped by expert
    end,  # of the expert's segments
    has_expert,
    segments_per_sequence,
    length,
    stride_x_b,
    stride_x_t,
    stride_dy_b,
    stride_dy_t,
    up_ptr,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return ``(row_ids, x, dy, weights)`` of a tile's rows."""
    rows = tl.arange(0, BLOCK_M)
    position = rows % SEGMENT_SIZE
    mask_m, segment = _find_segments(sorted_to_slot_ptr, start, end, SEGMENT_SIZE, BLOCK_M)
    sequence = segment // segments_per_sequence
    step = (segment % segments_per_sequence) * SEGMENT_SIZE + position
    offs_d = tl.arange(0, BLOCK_D)
    routed = mask_m & has_expert
    x = load_rows(
        x_ptr, padding_mask_ptr, segment, sequence, step, routed, offs_d, D, length,
        0, stride_x_b, stride_x_t, D, False,
    ).to(up_ptr.dtype.element_ty)  # fmt: skip
    dy = load_rows(
        dy_ptr, padding_mask_ptr, segment, sequence, step, routed, offs_d, D, length,
        0, stride_dy_b, stride_dy_t, D, False,
    )  # fmt: skip
    weights = tl.load(topk_weights_ptr + segment, mask=routed, other=0.0).to(ACC)
    return segment * SEGMENT_SIZE + position, x, dy, weights


@triton.jit
def _finish_segments(
    dx,  # (BLOCK_M, BLOCK_D), of the experts
    dweight,  # (BLOCK_M,), one share for each step
    expert,
    has_expert,
    sorted_to_slot_ptr,
    expert_offsets_ptr,
    padding_mask_ptr,
    segments_per_sequence,
    length,
    num_sequences,
    router_weight_ptr,
    logits_ptr,
    dtopk_weights_ptr,
    dprobs_ptr,
    dlogits_in_ptr,
    dx_ptr,
    dlogits_ptr,
    router_seed_ptr,
    start,
    end,
    num_experts,
    stride_w_e,
    temperature,
    router_dropout,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    ROUTER_PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the tile's logit gradients, and dx with the router's share added."""
    # Found anew, behind a barrier and with a 0 that the compiler can't know: it would hold
    # addresses and segments in registers since `_load_segments`.
    tl.debug_barrier()
    start += tl.load(expert_offsets_ptr)
    mask_m, segment = _find_segments(sorted_to_slot_ptr, start, end, SEGMENT_SIZE, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    local = rows // SEGMENT_SIZE
    position = rows % SEGMENT_SIZE
    routed = mask_m & has_expert
    # Every row gets the sum over its segment, and from it the segment's logit gradients.
    together = (local[:, None] == local[None, :]) & mask_m[None, :]
    dweight = tl.sum(tl.where(together, dweight[None, :], 0.0), 1)
    if dtopk_weights_ptr is not None:
        dweight += tl.load(dtopk_weights_ptr + segment, mask=routed, other=0.0)
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    offs = segment.to(tl.int64)[:, None] * num_experts + experts[None, :]
    mask_me = routed[:, None] & mask_e[None, :]
    logits = tl.load(logits_ptr + offs, mask=mask_me, other=0.0)
    selected = (experts == expert)[None, :] & routed[:, None]
    dprobs = tl.zeros((BLOCK_M, EXPERTS), dtype=logits.dtype)
    if dprobs_ptr is not None:
        dprobs += tl.load(dprobs_ptr + offs, mask=mask_me, other=0.0)
    dlogits = differentiate_choice(
        logits, selected, tl.where(selected, dweight[:, None], 0.0), dprobs, segment.to(tl.int64),
        num_experts, temperature, router_dropout, router_seed_ptr, RENORMALIZE, EXPERTS,
    )  # fmt: skip
    if dlogits_in_ptr is not None:
        dlogits += tl.load(dlogits_in_ptr + offs, mask=mask_me, other=0.0)
    if dlogits_ptr is not None:
        mask = (mask_m & (position == 0))[:, None] & mask_e[None, :]
        tl.store(dlogits_ptr + offs, dlogits, mask=mask)
    if dx_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        for p in range(SEGMENT_SIZE):
            w = tl.load(
                router_weight_ptr + experts[:, None] * stride_w_e + p * D + offs_d[None, :],
                mask=mask_e[:, None] & (offs_d < D)[None, :],
                other=0.0,
            ).to(ACC)
            here = tl.where((position == p)[:, None], dlogits, 0.0)
            dx = tl.dot(here, w, dx, input_precision=ROUTER_PRECISION, out_dtype=ACC)
        sequence = segment // segments_per_sequence
        step = (segment % segments_per_sequence) * SEGMENT_SIZE + position
        place = place_steps(padding_mask_ptr, 0, sequence, step, mask_m, num_sequences, length)
        store_steps(dx_ptr, dx, place, offs_d, D)


@triton.jit
def block_dx_kernel(
    x_ptr,  # (B, T, D)
    dy_ptr,  # (B, T, D)
    router_weight_ptr,  # (E, P * D)
    topk_weights_ptr,  # (S, 1)
    logits_ptr,  # (S, E)
    dtopk_weights_ptr,  # (S, 1) or None: what the caller made of the weights
    dprobs_ptr,  # (S, E) or None
    dlogits_in_ptr,  # (S, E) or None: the gradient of the logits themselves
    up_ptr,  # (E, F, D)
    gate_ptr,  # (E, F, D) or None
    down_ptr,  # (E, D, F)
    up_bias_ptr,  # (E, F) or None
    gate_bias_ptr,  # (E, F) or None
    down_bias_ptr,  # (E, D) or None
    dx_ptr,  # (B, T, D) contiguous or None, every row is written
    dlogits_ptr,  # (S, E) or None, every row is written
    sorted_to_slot_ptr,  # (S,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    padding_mask_ptr,  # (B, T) bool or None
    router_seed_ptr,  # (1,) int64 or None
    seed_ptr,  # (1,) int64 or None
    num_segments,
    segments_per_sequence,
    length,
    num_experts,
    num_sequences,
    stride_x_b,
    stride_x_t,
    stride_dy_b,
    stride_dy_t,
    stride_w_e,
    stride_up_e,
    stride_up_f,
    stride_gate_e,
    stride_gate_f,
    stride_down_e,
    stride_down_d,
    temperature,
    router_dropout,
    dropout,
    D: tl.constexpr,
    F: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUTER_PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Gradients of the rows of ``BLOCK_M // P`` segments and of their router logits.

    Grid: ``(cdiv(S, BLOCK_M // P) + E,)``. The hidden layer is recomputed; the gradient of a
    routing weight is ``<dhidden, hidden>`` (the identity is SonicMoE's, arXiv 2512.14080).
    """
    segments_per_tile: tl.constexpr = BLOCK_M // SEGMENT_SIZE
    expert, start, end = find_group(
        tl.program_id(0), expert_offsets_ptr, num_experts, num_segments, 1, segments_per_tile,
        GROUPS,
    )  # fmt: skip
    if expert > num_experts:
        return
    row_ids, x, dy, weights = _load_segments(
        x_ptr, dy_ptr, topk_weights_ptr, sorted_to_slot_ptr, padding_mask_ptr, start, end,
        expert < num_experts, segments_per_sequence, length, stride_x_b, stride_x_t,
        stride_dy_b, stride_dy_t, up_ptr, D, SEGMENT_SIZE, ACC, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    e = expert.to(tl.int64)

    dx = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    dweight = tl.zeros((BLOCK_M,), dtype=ACC)
    f_end = tl.where(expert < num_experts, F, 0)
    if down_bias_ptr is not None:
        # Before the loop: dy need not stay in registers through it.
        bias = tl.load(down_bias_ptr + e * D + offs_d, mask=(offs_d < D) & (f_end > 0), other=0.0)
        dweight += tl.sum(tl.fma(dy.to(ACC), bias.to(ACC)[None, :], 0.0), 1)
        if dy.dtype.primitive_bitwidth > 16:
            # As in `expert_ffn_dx_kernel`.
            tl.debug_barrier()
            _row_ids, _x, dy, _weights = _load_segments(
                x_ptr, dy_ptr, topk_weights_ptr, sorted_to_slot_ptr, padding_mask_ptr, start, end,
                expert < num_experts, segments_per_sequence, length, stride_x_b, stride_x_t,
                stride_dy_b, stride_dy_t, up_ptr, D, SEGMENT_SIZE, ACC, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    for f0 in tl.range(0, f_end, BLOCK_F, disable_licm=True):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        up = load_tile(up_ptr, e, offs_f, offs_d, F, D, stride_up_e, stride_up_f)
        down = load_tile(down_ptr, e, offs_d, offs_f, D, F, stride_down_e, stride_down_d)
        gate = up
        if gate_ptr is not None:
            gate = load_tile(gate_ptr, e, offs_f, offs_d, F, D, stride_gate_e, stride_gate_f)
        up_bias = load_bias(up_bias_ptr, e, offs_f, F, ACC)
        gate_bias = load_bias(gate_bias_ptr, e, offs_f, F, ACC)
        hidden, dhidden, dpre, dgate = hidden_with_grads(
            x, dy, up, gate, down, up_bias, gate_bias, seed_ptr, row_ids, offs_f, dropout, F,
            gate_ptr is not None, up_bias_ptr is not None, gate_bias_ptr is not None,
            ACTIVATION, ACC, PRECISION, f0,
        )  # fmt: skip
        # Rounded before the sum: fused with it, the lanes of a row would have different bits.
        dweight += tl.sum(tl.fma(dhidden, hidden, 0.0), 1)
        if dx_ptr is not None:
            dpre = (dpre * weights[:, None]).to(x.dtype)
            dx = tl.dot(dpre, up, dx, input_precision=PRECISION, out_dtype=ACC)
            if gate_ptr is not None:
                dgate = (dgate * weights[:, None]).to(x.dtype)
                dx = tl.dot(dgate, gate, dx, input_precision=PRECISION, out_dtype=ACC)

    _finish_segments(
        dx, dweight, expert, expert < num_experts, sorted_to_slot_ptr, expert_offsets_ptr,
        padding_mask_ptr, segments_per_sequence, length, num_sequences, router_weight_ptr,
        logits_ptr, dtopk_weights_ptr, dprobs_ptr, dlogits_in_ptr, dx_ptr, dlogits_ptr,
        router_seed_ptr, start, end, num_experts, stride_w_e, temperature, router_dropout, D,
        SEGMENT_SIZE, RENORMALIZE, ACC, ROUTER_PRECISION, EXPERTS, BLOCK_M, BLOCK_D,
    )  # fmt: skip


@triton.jit
def block_bwd_kernel(
    x_ptr,  # (B, T, D)
    dy_ptr,  # (B, T, D)
    router_weight_ptr,  # (E, P * D)
    topk_weights_ptr,  # (S, 1)
    logits_ptr,  # (S, E)
    dtopk_weights_ptr,  # (S, 1) or None: what the caller made of the weights
    dprobs_ptr,  # (S, E) or None
    dlogits_in_ptr,  # (S, E) or None: the gradient of the logits themselves
    up_ptr,  # (E, F, D)
    gate_ptr,  # (E, F, D) or None
    down_ptr,  # (E, D, F)
    up_bias_ptr,  # (E, F) or None
    gate_bias_ptr,  # (E, F) or None
    down_bias_ptr,  # (E, D) or None
    dx_ptr,  # (B, T, D) contiguous, every row is written
    dlogits_ptr,  # (S, E) or None, every row is written
    dup_ptr,  # (E, F, D), written where one split has all rows of an expert, as the next five
    ddown_ptr,  # (E, D, F)
    dgate_ptr,  # (E, F, D) or None
    dup_bias_ptr,  # (E, F) or None
    ddown_bias_ptr,  # (E, D) or None
    dgate_bias_ptr,  # (E, F) or None
    partials_ptr,  # (splits + E - 1, up | down | gate | biases), slots that are read are written
    sorted_to_slot_ptr,  # (S,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    padding_mask_ptr,  # (B, T) bool or None
    router_seed_ptr,  # (1,) int64 or None
    seed_ptr,  # (1,) int64 or None
    num_segments,
    segments_per_sequence,
    length,
    num_experts,
    num_sequences,
    num_splits,
    partial_size,
    stride_x_b,
    stride_x_t,
    stride_dy_b,
    stride_dy_t,
    stride_w_e,
    stride_up_e,
    stride_up_f,
    stride_gate_e,
    stride_gate_f,
    stride_down_e,
    stride_down_d,
    temperature,
    router_dropout,
    dropout,
    D: tl.constexpr,
    F: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUTER_PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """All gradients of a run of tiles; the router's weight follows from the logits'.

    Grid: ``(splits,)``. Split i owns tiles ``[i * tiles // splits, ...)`` of the segments grouped
    by expert; its weight gradients for expert e go to slot ``i + e``, which no other pair uses, or
    where they belong if they are whole. The hidden layer is one chunk: BLOCK_F is at least F.
    """
    segments_per_tile: tl.constexpr = BLOCK_M // SEGMENT_SIZE
    split = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    offs_f = tl.arange(0, BLOCK_F)
    mask_d = offs_d < D
    mask_f = offs_f < F
    first, last, first_expert, end_expert, before = find_split(
        split, num_splits, expert_offsets_ptr, num_experts, 1, segments_per_tile, EXPERTS
    )
    for expert in tl.range(first_expert, end_expert, disable_licm=True):
        lo = tl.load(expert_offsets_ptr + expert)
        hi = tl.load(expert_offsets_ptr + expert + 1)
        tiles = (hi - lo + segments_per_tile - 1) // segments_per_tile
        begin = tl.maximum(first, before)
        stop = tl.minimum(last, before + tiles)
        if begin < stop:
            e = (split * 0 + expert).to(tl.int64)
            up = load_tile(up_ptr, e, offs_f, offs_d, F, D, stride_up_e, stride_up_f)
            down = load_tile(down_ptr, e, offs_d, offs_f, D, F, stride_down_e, stride_down_d)
            gate = up
            if gate_ptr is not None:
                gate = load_tile(gate_ptr, e, offs_f, offs_d, F, D, stride_gate_e, stride_gate_f)
            up_bias = load_bias(up_bias_ptr, e, offs_f, F, ACC)
            gate_bias = load_bias(gate_bias_ptr, e, offs_f, F, ACC)
            dup = tl.zeros((BLOCK_F, BLOCK_D), dtype=ACC)
            ddown = tl.zeros((BLOCK_D, BLOCK_F), dtype=ACC)
            dgate = tl.zeros((BLOCK_F, BLOCK_D), dtype=ACC)
            dup_bias = tl.zeros((BLOCK_F,), dtype=ACC)
            dgate_bias = tl.zeros((BLOCK_F,), dtype=ACC)
            ddown_bias = tl.zeros((BLOCK_D,), dtype=ACC)
            for tile in tl.range(begin, stop, disable_licm=True):
                start = lo + (tile - before) * segments_per_tile
                row_ids, x, dy, weights = _load_segments(
                    x_ptr, dy_ptr, topk_weights_ptr, sorted_to_slot_ptr, padding_mask_ptr, start,
                    hi, start < hi, segments_per_sequence, length, stride_x_b,
                    stride_x_t, stride_dy_b, stride_dy_t, up_ptr, D, SEGMENT_SIZE, ACC, BLOCK_M,
                    BLOCK_D,
                )  # fmt: skip
                hidden, dhidden, dpre, dgate_pre = hidden_with_grads(
                    x, dy, up, gate, down, up_bias, gate_bias, seed_ptr, row_ids, offs_f, dropout,
                    F, gate_ptr is not None, up_bias_ptr is not None, gate_bias_ptr is not None,
                    ACTIVATION, ACC, PRECISION, 0,
                )  # fmt: skip
                dweight = tl.sum(dhidden * hidden, 1)
                hidden = (hidden * weights[:, None]).to(x.dtype)
                ddown = tl.dot(
                    tl.trans(dy), hidden, ddown, input_precision=PRECISION, out_dtype=ACC
                )
                dpre = dpre * weights[:, None]
                if HAS_BIAS:
                    dup_bias += tl.sum(dpre, 0)
                    ddown_bias += tl.sum(dy.to(ACC) * weights[:, None], 0)
                dpre = dpre.to(x.dtype)
                dup = tl.dot(tl.trans(dpre), x, dup, input_precision=PRECISION, out_dtype=ACC)
                dx = tl.dot(dpre, up, input_precision=PRECISION, out_dtype=ACC)
                if gate_ptr is not None:
                    dgate_pre = dgate_pre * weights[:, None]
                    if HAS_BIAS:
                        dgate_bias += tl.sum(dgate_pre, 0)
                    dgate_pre = dgate_pre.to(x.dtype)
                    dgate = tl.dot(
                        tl.trans(dgate_pre), x, dgate, input_precision=PRECISION, out_dtype=ACC
                    )
                    dx = tl.dot(dgate_pre, gate, dx, input_precision=PRECISION, out_dtype=ACC)
                if down_bias_ptr is not None:
                    bias = load_bias(down_bias_ptr, e, offs_d, D, ACC)
                    dweight += tl.sum(dy.to(ACC) * bias[None, :], 1)
                _finish_segments(
                    dx, dweight, e, start < hi, sorted_to_slot_ptr, expert_offsets_ptr,
                    padding_mask_ptr, segments_per_sequence, length, num_sequences,
                    router_weight_ptr, logits_ptr, dtopk_weights_ptr, dprobs_ptr, dlogits_in_ptr,
                    dx_ptr, dlogits_ptr, router_seed_ptr, start, hi, num_experts, stride_w_e,
                    temperature, router_dropout, D, SEGMENT_SIZE, RENORMALIZE, ACC,
                    ROUTER_PRECISION, EXPERTS, BLOCK_M, BLOCK_D,
                )  # fmt: skip
            out = partials_ptr + (split + expert).to(tl.int64) * partial_size
            # From numbers that stay in registers anyway.
            whole = (first <= before) & (before + tiles <= last)
            mask_fd = mask_f[:, None] & mask_d[None, :]
            mask_df = mask_d[:, None] & mask_f[None, :]
            offs_fd = offs_f[:, None] * D + offs_d[None, :]
            offs_df = offs_d[:, None] * F + offs_f[None, :]
            store_gradients(
                whole, e, out, dup_ptr, ddown_ptr, dgate_ptr, dup_bias_ptr, ddown_bias_ptr,
                dgate_bias_ptr, dup, ddown, dgate, dup_bias, ddown_bias, dgate_bias, offs_fd,
                offs_df, offs_f, offs_d, mask_fd, mask_df, mask_f, mask_d, D, F, HAS_BIAS,
            )  # fmt: skip
        before += tiles
    if padding_mask_ptr is not None:
        # Segments without an expert: their gradients are 0.
        lo = tl.load(expert_offsets_ptr + num_experts)
        tiles = (num_segments - lo + segments_per_tile - 1) // segments_per_tile
        first = (split.to(tl.int64) * tiles // num_splits).to(tl.int32)
        last = ((split + 1).to(tl.int64) * tiles // num_splits).to(tl.int32)
        for tile in range(first, last):
            start = lo + tile * segments_per_tile
            row_ids, x, dy, weights = _load_segments(
                x_ptr, dy_ptr, topk_weights_ptr, sorted_to_slot_ptr, padding_mask_ptr, start,
                num_segments, start < 0, segments_per_sequence, length, stride_x_b,
                stride_x_t, stride_dy_b, stride_dy_t, up_ptr, D, SEGMENT_SIZE, ACC, BLOCK_M,
                BLOCK_D,
            )  # fmt: skip
            _finish_segments(
                tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC), weights, num_experts, start < 0,
                sorted_to_slot_ptr, expert_offsets_ptr, padding_mask_ptr, segments_per_sequence,
                length, num_sequences, router_weight_ptr, logits_ptr, dtopk_weights_ptr, dprobs_ptr,
                dlogits_in_ptr, dx_ptr, dlogits_ptr, router_seed_ptr, start, num_segments,
                num_experts, stride_w_e, temperature, router_dropout, D, SEGMENT_SIZE, RENORMALIZE,
                ACC, ROUTER_PRECISION, EXPERTS, BLOCK_M, BLOCK_D,
            )  # fmt: skip
