"""Kernels of stage 1: pooling, router product, softmax, top-k, and their gradients.

Launched by `route`.
"""

import triton
import triton.language as tl

from segmoe_kernels._triton.launch import kernel
from segmoe_kernels._triton.router import (
    Segments,
    choose_experts,
    differentiate_choice,
    load_steps,
    pool,
    score_segments,
    step_range,
    unpool_step,
)


@kernel
def route_fwd_kernel(
    x_rows,  # Rows (B, T, D)
    padding_mask_ptr,  # (B, T) bool or None
    router,
    dropout,
    out,  # Routed
    num_segments,
    segments_per_block,
    segments_per_sequence,
    length,
    num_experts,
    temperature,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    POOLING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Route segments_per_block consecutive segments, BLOCK_S at a time.

    Grid: ``(cdiv(S, segments_per_block),)``. Products of x and router_weight are summed in ACC;
    softmax and top-k run in ACC.
    """
    pid = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    unrouted = tl.sum(counts, 0)
    for start in range(0, segments_per_block, BLOCK_S):
        # Segments are counted in 32 bits, whose division is a fifth of that of 64. What needs 64
        # goes into scalar pointers: offsets inside a block fit 32.
        inner = tl.arange(0, BLOCK_S)
        segment = pid * segments_per_block + start + inner
        first = (pid * segments_per_block + start).to(tl.int64)
        mask_s = segment < num_segments
        logits, routed = score_segments(
            x_rows, padding_mask_ptr, router, segment, mask_s, segments_per_sequence, length,
            num_experts, D, SEGMENT_SIZE, POOLING, ACC, EXPERTS, BLOCK_D,
        )  # fmt: skip
        offs = inner[:, None] * num_experts + experts[None, :]
        mask_se = mask_s[:, None] & mask_e[None, :]
        tl.store(out.logits_ptr + first * num_experts + offs, logits, mask=mask_se)
        probs, weights, rank = choose_experts(
            logits, routed, segment, num_experts, temperature, dropout, TOP_K, RENORMALIZE, EXPERTS
        )
        tl.store(out.probs_ptr + first * num_experts + offs, probs, mask=mask_se)
        selected = rank < TOP_K
        ids = tl.where(routed[:, None], experts[None, :], -1)
        place = inner[:, None] * TOP_K + rank
        chosen = selected & mask_s[:, None]
        tl.store(out.topk_weights_ptr + first * TOP_K + place, weights, mask=chosen)
        tl.store(out.topk_ids_ptr + first * TOP_K + place, ids, mask=chosen)
        counts += tl.sum((selected & routed[:, None]).to(tl.int32), 0)
        unrouted += tl.sum((mask_s & (routed == 0)).to(tl.int32), 0) * TOP_K
    row = out.block_counts_ptr + pid.to(tl.int64) * (num_experts + 1)
    tl.store(row + experts, counts, mask=mask_e)
    tl.store(row + num_experts, unrouted)


@kernel
def dlogits_kernel(
    logits_ptr,  # (S, E)
    topk_ids_ptr,  # (S, TOP_K) int32
    gradients,  # RoutedGradients
    dlogits_ptr,  # (S, E), every row is written
    dropout,
    num_segments,
    num_experts,
    temperature,
    TOP_K: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Differentiate top-k, dropout, softmax and temperature for BLOCK_S segments.

    Grid: ``(cdiv(S, BLOCK_S),)``.
    """
    segment = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    experts = tl.arange(0, EXPERTS)
    mask_s = segment < num_segments
    mask_e = experts < num_experts
    mask_se = mask_s[:, None] & mask_e[None, :]
    offs = segment[:, None] * num_experts + experts[None, :]

    logits = tl.load(logits_ptr + offs, mask=mask_se, other=0.0)
    dprobs = tl.zeros((BLOCK_S, EXPERTS), dtype=logits.dtype)
    if gradients.probs_ptr is not None:
        dprobs += tl.load(gradients.probs_ptr + offs, mask=mask_se, other=0.0)
    selected = tl.zeros((BLOCK_S, EXPERTS), dtype=tl.int1)
    dweights = tl.zeros((BLOCK_S, EXPERTS), dtype=logits.dtype)
    if (gradients.topk_weights_ptr is not None) or (gradients.row_weights_ptr is not None):
        for k in range(TOP_K):
            slot = segment * TOP_K + k
            ids = tl.load(topk_ids_ptr + slot, mask=mask_s, other=-1)
            dweight = tl.zeros((BLOCK_S,), dtype=logits.dtype)
            if gradients.topk_weights_ptr is not None:
                dweight += tl.load(gradients.topk_weights_ptr + slot, mask=mask_s, other=0.0)
            if gradients.row_weights_ptr is not None:
                for p in range(SEGMENT_SIZE):
                    share = gradients.row_weights_ptr + slot * SEGMENT_SIZE + p
                    dweight += tl.load(share, mask=mask_s, other=0.0)
            hit = experts[None, :] == ids[:, None]
            selected |= hit
            dweights = tl.where(hit, dweight[:, None], dweights)
    dlogits = differentiate_choice(
        logits, selected, dweights, dprobs, segment, num_experts, temperature, dropout,
        RENORMALIZE, EXPERTS,
    )  # fmt: skip
    if gradients.logits_ptr is not None:
        dlogits += tl.load(gradients.logits_ptr + offs, mask=mask_se, other=0.0)
    # A segment that is not routed is a constant 0, whatever comes back.
    routed = tl.load(topk_ids_ptr + segment * TOP_K, mask=mask_s, other=-1) >= 0
    dlogits = tl.where(routed[:, None], dlogits, 0.0)
    tl.store(dlogits_ptr + offs, dlogits, mask=mask_se)


@kernel
def route_bwd_kernel(
    x_rows,  # Rows (B, T, D)
    padding_mask_ptr,  # (B, T) bool or None
    router,
    dlogits_ptr,  # (S, E)
    dslots,  # Rows (k, B, T, D), if there: gradients of x from the next stages
    dx_ptr,  # (B, T, D) contiguous or None, every row is written
    dweight_ptr,  # (splits, E, W) or None, every row is written
    num_segments,
    segments_per_sequence,
    length,
    num_experts,
    num_choices,
    blocks_per_split,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    POOLING: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Gradients of x and of the router weight for a run of segments.

    Grid: ``(splits, SEGMENT_SIZE or 1, cdiv(D, BLOCK_D))``; one program owns blocks_per_split
    blocks of BLOCK_S segments and BLOCK_D columns, of one step each with "concat", else of all.
    """
    split = tl.program_id(0)
    position = tl.program_id(1)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    # position is 0 unless the pooled vector is the concatenation.
    offs_w = experts[:, None] * router.stride_row + position * D + offs_d[None, :]
    mask_w = mask_e[:, None] & mask_d[None, :]
    w = tl.load(router.weight_ptr + offs_w, mask=mask_w, other=0.0).to(ACC)
    dweight = tl.zeros((EXPERTS, BLOCK_D), dtype=ACC)

    for block in range(blocks_per_split):
        segment = (split * blocks_per_split + block) * BLOCK_S + tl.arange(0, BLOCK_S)
        mask_s = segment < num_segments
        index = segment % segments_per_sequence
        segments = Segments(segment // segments_per_sequence, index * SEGMENT_SIZE, mask_s)
        # The logits that saw this segment: its own, or in a causal router the next one's.
        source = segment
        mask_l = mask_s
        if router.start_ptr is not None:
            source = segment + 1
            mask_l = mask_s & (index + 1 < segments_per_sequence)
        dlogits = tl.load(
            dlogits_ptr + source.to(tl.int64)[:, None] * num_experts + experts[None, :],
            mask=mask_l[:, None] & mask_e[None, :],
            other=0.0,
        )
        dpooled = tl.dot(dlogits, w, input_precision=PRECISION, out_dtype=ACC)
        if POOLING == "concat":
            x, real = load_steps(x_rows, padding_mask_ptr, segments, position, offs_d, length, D)
            pooled = x.to(ACC)
        else:
            span = step_range(padding_mask_ptr, segments, length, SEGMENT_SIZE)
            pooled = pool(
                x_rows, padding_mask_ptr, segments, span, offs_d, length, D, SEGMENT_SIZE,
                POOLING, ACC,
            )  # fmt: skip
        dweight = tl.dot(
            tl.trans(dlogits), pooled, dweight, input_precision=PRECISION, out_dtype=ACC
        )
        if dx_ptr is not None and POOLING == "concat":
            _store_dx(
                dpooled, real, dslots, dx_ptr, segments, position, offs_d, length, num_choices, D
            )
        elif dx_ptr is not None:
            # The earliest maximum takes the gradient, once.
            open_max = tl.full((BLOCK_S, BLOCK_D), 1, dtype=tl.int1)
            for p in range(SEGMENT_SIZE):
                x, real = load_steps(x_rows, padding_mask_ptr, segments, p, offs_d, length, D)
                dx, open_max = unpool_step(
                    dpooled, pooled, x, real, p, span, open_max, POOLING, ACC
                )
                _store_dx(dx, real, dslots, dx_ptr, segments, p, offs_d, length, num_choices, D)
    if dweight_ptr is not None:
        width = D * SEGMENT_SIZE if POOLING == "concat" else D
        row = split.to(tl.int64) * num_experts + experts
        offs = row[:, None] * width + position * D + offs_d[None, :]
        tl.store(dweight_ptr + offs, dweight, mask=mask_w)


@triton.jit
def _store_dx(
    dx,  # (BLOCK_S, BLOCK_D)
    real,
    dslots,
    dx_ptr,
    segments,
    p,
    offs_d,
    length,
    num_choices,
    D: tl.constexpr,
):
    """Add the gradients from the next stages, in the order of the choices, and store."""
    mask_d = (offs_d < D)[None, :]
    step = segments.first_step + p
    dx = tl.where(real[:, None], dx, 0.0)
    if dslots.ptr is not None:
        offs = segments.sequence.to(tl.int64) * dslots.stride_b
        offs += step.to(tl.int64) * dslots.stride_t
        ptrs = dslots.ptr + offs[:, None] + offs_d[None, :]
        for _ in range(num_choices):
            dx += tl.load(ptrs, mask=real[:, None] & mask_d, other=0.0).to(dx.dtype)
            ptrs += dslots.stride_k
    row = (segments.sequence * length + step).to(tl.int64)
    ptrs = dx_ptr + (row * D)[:, None] + offs_d[None, :]
    mask = (segments.mask & (step < length))[:, None] & mask_d
    tl.store(ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
