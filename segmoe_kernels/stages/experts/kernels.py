"""Stage 3 of 4, kernels for widths whose row fits a program: the hidden layer stays on chip.

Rows are steps, grouped by expert through ``sorted_to_slot``. Forward: one kernel reads x once and
writes the weighted outputs. Backward: one kernel recomputes the hidden layer for the gradients of x
and of the routing weights, one for the weight gradients, which are split over rows into partial
sums and added up in a fixed order by `grouped_gemm`.
"""

import triton
import triton.language as tl

from segmoe_kernels._triton.arguments import Gradients
from segmoe_kernels._triton.ffn import ffn_rows, hidden_with_grads, load_chunk
from segmoe_kernels._triton.launch import kernel
from segmoe_kernels._triton.partials import store_gradients, store_sum
from segmoe_kernels._triton.sequences import (
    find_group,
    find_split,
    find_steps,
    load_rows,
    place_steps,
    store_steps,
)


@kernel
def expert_ffn_fwd_kernel(
    x_rows,  # Rows (top_k, B, T, D)
    topk_weights_ptr,  # (S, top_k)
    experts,
    out_ptr,  # (top_k, B, T, D) contiguous, every row is written
    slots,
    dropout,
    num_slots,
    segments_per_sequence,
    length,
    num_experts,
    num_sequences,
    F: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Run one expert on BLOCK_M of its rows, BLOCK_F hidden columns at a time.

    Grid: ``(cdiv(R * P, BLOCK_M) + E,)``. Sums in ACC; the hidden layer is rounded to x's dtype.
    """
    D: tl.constexpr = LAYOUT.d_model
    SEGMENT_SIZE: tl.constexpr = LAYOUT.segment_size
    pid = tl.program_id(0)
    expert, row_start, row_end = find_group(
        pid, slots.expert_offsets_ptr, num_experts, num_slots, SEGMENT_SIZE, BLOCK_M, GROUPS
    )
    if expert > num_experts:
        return
    rows = row_start + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    at = find_steps(rows, mask_m, slots, segments_per_sequence, LAYOUT)
    offs_d = tl.arange(0, BLOCK_D)
    e = expert.to(tl.int64)
    routed = mask_m & (expert < num_experts)
    x = load_rows(x_rows, at, routed, offs_d, D, slots, length, LAYOUT)
    x = x.to(experts.up.ptr.dtype.element_ty)
    weights = tl.load(topk_weights_ptr + at.slot, mask=routed, other=0.0).to(ACC)
    row_ids = at.slot * SEGMENT_SIZE + rows % SEGMENT_SIZE
    place = place_steps(at, mask_m, slots, num_sequences, length)

    # Rows without an expert have no hidden layer: their outputs are 0.
    f_end = tl.where(expert < num_experts, F, 0)
    out = ffn_rows(
        x, row_ids, e, f_end, experts, dropout, D, F, ACTIVATION, ACC, PRECISION, BLOCK_F, BLOCK_D
    )
    store_steps(out_ptr, out * weights[:, None], place, offs_d, D)


@kernel
def expert_ffn_dx_kernel(
    x_rows,  # Rows (top_k, B, T, D)
    dy_rows,  # Rows (top_k, B, T, D)
    topk_weights_ptr,  # (S, top_k)
    experts,
    dx_ptr,  # (top_k, B, T, D) contiguous or None, every row is written
    drow_weights_ptr,  # (R, P) by slot, every element is written
    kept,  # if there
    slots,
    dropout,
    num_slots,
    segments_per_sequence,
    length,
    num_experts,
    num_sequences,
    F: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Gradients of BLOCK_M rows of x, and of their routing weights, ``<dhidden, hidden>``.

    Grid: ``(cdiv(R * P, BLOCK_M) + E,)``. The hidden layer is recomputed, so that the outputs of
    the experts need not be kept (the identity is SonicMoE's, arXiv 2512.14080).
    """
    D: tl.constexpr = LAYOUT.d_model
    SEGMENT_SIZE: tl.constexpr = LAYOUT.segment_size
    pid = tl.program_id(0)
    expert, row_start, row_end = find_group(
        pid, slots.expert_offsets_ptr, num_experts, num_slots, SEGMENT_SIZE, BLOCK_M, GROUPS
    )
    if expert > num_experts:
        return
    rows = row_start + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    at = find_steps(rows, mask_m, slots, segments_per_sequence, LAYOUT)
    offs_d = tl.arange(0, BLOCK_D)
    e = expert.to(tl.int64)
    routed = mask_m & (expert < num_experts)
    x = load_rows(x_rows, at, routed, offs_d, D, slots, length, LAYOUT)
    x = x.to(experts.up.ptr.dtype.element_ty)
    if BLOCK_D > 128 or D % 16 != 0:  # unaligned x comes by the element and takes registers
        tl.debug_barrier()
    dy = load_rows(dy_rows, at, routed, offs_d, D, slots, length, LAYOUT)
    weights = tl.load(topk_weights_ptr + at.slot, mask=routed, other=0.0).to(ACC)
    row_ids = at.slot * SEGMENT_SIZE + rows % SEGMENT_SIZE
    place = place_steps(at, mask_m, slots, num_sequences, length)
    row_offs = rows.to(tl.int64) * F
    dx = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    dweight = tl.zeros((BLOCK_M,), dtype=ACC)
    f_end = tl.where(expert < num_experts, F, 0)
    if experts.down_bias_ptr is not None:
        # Before the loop: dy need not stay in registers through it.
        bias_ptr = experts.down_bias_ptr + e * D
        bias = tl.load(bias_ptr + offs_d, mask=(offs_d < D) & (f_end > 0), other=0.0)
        dweight += tl.sum(tl.fma(dy.to(ACC), bias.to(ACC)[None, :], 0.0), 1)
        if dy.dtype.primitive_bitwidth > 16:
            # Without tensor cores the sum would keep whole rows of dy in each thread's registers.
            tl.debug_barrier()
            dy = load_rows(dy_rows, at, routed, offs_d, D, slots, length, LAYOUT)
    for f0 in tl.range(0, f_end, BLOCK_F, disable_licm=True):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        chunk = load_chunk(experts, e, offs_f, offs_d, D, F, ACC, True)
        hidden, dhidden, dpre, dgate = hidden_with_grads(
            x, dy, experts, chunk, dropout, row_ids, offs_f, f0, F, ACTIVATION, ACC,
            PRECISION,
        )  # fmt: skip
        # Rounded before the sum: fused with it, the lanes of a row would have different bits.
        dweight += tl.sum(tl.fma(dhidden, hidden, 0.0), 1)
        dpre = (dpre * weights[:, None]).to(x.dtype)
        dgate = (dgate * weights[:, None]).to(x.dtype)
        if dx_ptr is not None:
            dx = tl.dot(dpre, chunk.up, dx, input_precision=PRECISION, out_dtype=ACC)
            if experts.gate is not None:
                dx = tl.dot(dgate, chunk.gate, dx, input_precision=PRECISION, out_dtype=ACC)
        if kept.hidden_ptr is not None:
            offs = row_offs[:, None] + offs_f[None, :]
            mask = mask_m[:, None] & (offs_f < F)[None, :]
            store_sum(kept.hidden_ptr, offs, hidden * weights[:, None], mask)
            store_sum(kept.dpre_ptr, offs, dpre, mask)
            if experts.gate is not None:
                store_sum(kept.dgate_ptr, offs, dgate, mask)
    tl.store(drow_weights_ptr + row_ids, dweight, mask=mask_m)
    if dx_ptr is not None:
        store_steps(dx_ptr, dx, place, offs_d, D)


@triton.jit
def _sum_rows(
    x_rows,
    dy_rows,
    topk_weights_ptr,
    experts,
    slots,
    dropout,
    e,
    lo,
    hi,
    start,
    stop,
    before,
    segments_per_sequence,
    length,
    first_f,
    HAS_BIAS: tl.constexpr,
    F: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the `Gradients` of expert e, whose rows are ``[lo, hi)``, from ``[start, stop)``.

    These are tiles of all rows; ``before`` of them lie before the expert's first.
    """
    D: tl.constexpr = LAYOUT.d_model
    SEGMENT_SIZE: tl.constexpr = LAYOUT.segment_size
    WIDE: tl.constexpr = experts.up.ptr.dtype.element_ty.primitive_bitwidth > 16
    offs_f = first_f + tl.arange(0, BLOCK_F)
    offs_d = tl.arange(0, BLOCK_D)
    chunk = load_chunk(experts, e, offs_f, offs_d, D, F, ACC, True)
    # All (D, F): wgmma wants 64 rows at least, and a chunk of F may have fewer.
    dup = tl.zeros((BLOCK_D, BLOCK_F), dtype=ACC)
    ddown = tl.zeros((BLOCK_D, BLOCK_F), dtype=ACC)
    dgate = tl.zeros((BLOCK_D, BLOCK_F), dtype=ACC)
    dup_bias = tl.zeros((BLOCK_F,), dtype=ACC)
    dgate_bias = tl.zeros((BLOCK_F,), dtype=ACC)
    ddown_bias = tl.zeros((BLOCK_D,), dtype=ACC)
    for tile in tl.range(start, stop, disable_licm=True):
        rows = lo + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = rows < hi
        at = find_steps(rows, mask_m, slots, segments_per_sequence, LAYOUT)
        x = load_rows(x_rows, at, mask_m, offs_d, D, slots, length, LAYOUT)
        x = x.to(experts.up.ptr.dtype.element_ty)
        dy = load_rows(dy_rows, at, mask_m, offs_d, D, slots, length, LAYOUT)
        weights = tl.load(topk_weights_ptr + at.slot, mask=mask_m, other=0.0).to(ACC)
        row_ids = at.slot * SEGMENT_SIZE + rows % SEGMENT_SIZE
        hidden, _dhidden, dpre, dgate_pre = hidden_with_grads(
            x, dy, experts, chunk, dropout, row_ids, offs_f, first_f, F, ACTIVATION,
            ACC, PRECISION,
        )  # fmt: skip
        hidden = (hidden * weights[:, None]).to(x.dtype)
        dpre = dpre * weights[:, None]
        dgate_pre = dgate_pre * weights[:, None]
        # Registers are short: without tensor cores sums before products take fewer.
        if HAS_BIAS and WIDE:
            dup_bias += tl.sum(dpre, 0)
            dgate_bias += tl.sum(dgate_pre, 0)
            ddown_bias += tl.sum(dy.to(ACC) * weights[:, None], 0)
        dup = tl.dot(tl.trans(x), dpre.to(x.dtype), dup, input_precision=PRECISION, out_dtype=ACC)
        ddown = tl.dot(tl.trans(dy), hidden, ddown, input_precision=PRECISION, out_dtype=ACC)
        if experts.gate is not None:
            dgate = tl.dot(
                tl.trans(x), dgate_pre.to(x.dtype), dgate, input_precision=PRECISION,
                out_dtype=ACC,
            )  # fmt: skip
        if HAS_BIAS and not WIDE:
            dup_bias += tl.sum(dpre, 0)
            dgate_bias += tl.sum(dgate_pre, 0)
            ddown_bias += tl.sum(dy.to(ACC) * weights[:, None], 0)
    return Gradients(dup, ddown, dgate, dup_bias, ddown_bias, dgate_bias)


@kernel
def expert_ffn_dw_kernel(
    x_rows,  # Rows (top_k, B, T, D)
    dy_rows,  # Rows (top_k, B, T, D)
    topk_weights_ptr,  # (S, top_k)
    experts,
    gradients,  # written where one split has all rows of an expert
    partials_ptr,  # (splits + E - 1, elements of gradients), slots that are read are written
    slots,
    dropout,
    segments_per_sequence,
    length,
    num_experts,
    num_splits,
    partial_size,
    F: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Weight gradients of a run of tiles, for BLOCK_F hidden columns.

    Grid: ``(splits, cdiv(F, BLOCK_F))``. Split i owns tiles ``[i * tiles // splits, ...)`` of all
    rows grouped by expert; its sum for expert e goes to slot ``i + e``, which no other pair uses,
    or where it belongs if it is the whole.
    """
    D: tl.constexpr = LAYOUT.d_model
    SEGMENT_SIZE: tl.constexpr = LAYOUT.segment_size
    HAS_BIAS: tl.constexpr = gradients.up_bias is not None
    split = tl.program_id(0)
    first_f = tl.program_id(1) * BLOCK_F
    offs_f = first_f + tl.arange(0, BLOCK_F)
    offs_d = tl.arange(0, BLOCK_D)
    first, last, first_expert, end_expert, before = find_split(
        split, num_splits, slots.expert_offsets_ptr, num_experts, SEGMENT_SIZE, BLOCK_M, GROUPS
    )
    for expert in tl.range(first_expert, end_expert, disable_licm=True):
        lo = tl.load(slots.expert_offsets_ptr + expert) * SEGMENT_SIZE
        hi = tl.load(slots.expert_offsets_ptr + expert + 1) * SEGMENT_SIZE
        tiles = (hi - lo + BLOCK_M - 1) // BLOCK_M
        start = tl.maximum(first, before)
        stop = tl.minimum(last, before + tiles)
        if start < stop:
            e = (split * 0 + expert).to(tl.int64)
            sums = _sum_rows(
                x_rows, dy_rows, topk_weights_ptr, experts, slots, dropout, e, lo, hi, start, stop,
                before, segments_per_sequence, length, first_f, HAS_BIAS, F, LAYOUT, ACTIVATION,
                ACC, PRECISION, BLOCK_M, BLOCK_F, BLOCK_D,
            )  # fmt: skip
            out = partials_ptr + (split + expert).to(tl.int64) * partial_size
            # From numbers that stay in registers anyway.
            whole = (first <= before) & (before + tiles <= last)
            # Every chunk of F has the same sum of down's bias; the first one stores it.
            first_chunk = tl.program_id(1) == 0
            store_gradients(whole, e, out, gradients, sums, offs_f, offs_d, first_chunk, D, F)
        before += tiles
