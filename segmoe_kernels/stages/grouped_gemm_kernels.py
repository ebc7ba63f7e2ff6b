"""Kernels of the grouped matrix products; `grouped_gemm` and `experts` launch them.

Rows are grouped by expert. A row lives either in a sorted matrix ``(M, K)`` or in the sequences
``(top_k, B, T, D)``, from where it is gathered and to where it is scattered through
``sorted_to_slot``; with ``CONCAT`` such a row is a whole segment, ``P * D`` wide.
"""

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import activate, activate_with_grad, dropout_scale
from segmoe_kernels._triton.launch import kernel
from segmoe_kernels._triton.partials import store_sum
from segmoe_kernels._triton.sequences import (
    find_group,
    find_split,
    find_steps,
    load_rows,
    place_steps,
    store_segments,
    store_steps,
)


@triton.jit
def _load_operand(
    ptr,
    padding_mask_ptr,
    rows,
    choice,
    sequence,
    step,
    mask_m,
    cols,
    width,
    length,
    stride_k,
    stride_b,
    stride_t,
    D: tl.constexpr,
    CONCAT: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Return (M, N) of a sorted matrix (stride_t apart), or gathered from the sequences."""
    if GATHER:
        return load_rows(
            ptr, padding_mask_ptr, choice, sequence, step, mask_m, cols, width, length,
            stride_k, stride_b, stride_t, D, CONCAT,
        )  # fmt: skip
    else:  # noqa: RET505  the branches are compile-time
        mask = mask_m[:, None] & (cols < width)[None, :]
        base = ptr + rows.to(tl.int64) * stride_t
        return tl.load(base[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _load_weight(
    ptr,  # (E, N, K) by strides
    expert,  # int64
    offs_n,
    offs_k,
    N: tl.constexpr,
    K: tl.constexpr,
    stride_e,
    stride_n,
    stride_k,
):
    """Return the tile (BLOCK_K, BLOCK_N) of an expert's matrix, transposed; 0 outside of it."""
    offs = expert * stride_e + offs_k[:, None] * stride_k
    mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
    return tl.load(ptr + offs + offs_n[None, :] * stride_n, mask=mask, other=0.0)


@triton.jit
def _swizzled_tile(COLUMN_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Return ``(row tile, column tile)`` of a program.

    GROUP_M tiles of rows, mostly of one expert, go through the columns together: their rows and the
    expert's matrix are read from L2.
    """
    pid = tl.program_id(0)
    row_tiles = tl.num_programs(0) // COLUMN_TILES
    first = pid // (GROUP_M * COLUMN_TILES) * GROUP_M
    height = tl.minimum(row_tiles - first, GROUP_M)
    inside = pid % (GROUP_M * COLUMN_TILES)
    return first + inside % height, inside // height


@kernel
def grouped_gemm_kernel(
    a_ptr,  # (M, K) sorted, or (top_k, B, T, D) gathered
    a2_ptr,  # shape of a, or None: a second product is added, a2 @ b2
    b_ptr,  # (E, N, K) by strides
    b2_ptr,  # the same, or None; without a2 it is the gate's weight
    bias_ptr,  # (E, N) or None
    bias2_ptr,  # (E, N) or None
    row_weights_ptr,  # (R,) by slot, or None
    y_ptr,  # (M, N) sorted, or (top_k, B, T, D) scattered; every row is written
    pre_ptr,  # (M, N) or None: a @ b before the activation
    pre2_ptr,  # (M, N) or None: the same of the gate
    sorted_to_slot_ptr,  # (R,) int32, or None where nothing needs the slot
    expert_offsets_ptr,  # (E + 1,) int32
    padding_mask_ptr,  # (B, T) bool or None
    seed_ptr,  # (1,) int64 or None
    num_slots,
    segments_per_sequence,
    length,
    num_experts,
    stride_a_k,
    stride_a_b,
    stride_a_t,
    stride_b_e,
    stride_b_n,
    stride_b_k,
    stride_b2_e,
    stride_b2_n,
    stride_b2_k,
    stride_y_k,
    dropout,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ROWS_PER_SLOT: tl.constexpr,
    CONCAT: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Multiply BLOCK_M rows of one expert by BLOCK_N columns of its matrix.

    Grid: ``((cdiv(M, BLOCK_M) + E) * cdiv(N, BLOCK_N),)``. Sums in ACC, rounded at the store.
    """
    row_tile, column_tile = _swizzled_tile((N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, row_start, row_end = find_group(
        row_tile, expert_offsets_ptr, num_experts, num_slots, ROWS_PER_SLOT, BLOCK_M, GROUPS
    )
    if expert > num_experts:
        return
    rows = row_start + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    slot = rows
    choice = rows
    sequence = rows
    step = rows
    if sorted_to_slot_ptr is not None:
        slot, choice, sequence, step = find_steps(
            rows, mask_m, sorted_to_slot_ptr, segments_per_sequence, TOP_K, SEGMENT_SIZE,
            ROWS_PER_SLOT,
        )  # fmt: skip
    first_n = column_tile * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    e = expert.to(tl.int64)
    routed = mask_m & (expert < num_experts)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    k_end = tl.where(expert < num_experts, K, 0)
    for k0 in range(0, k_end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        a = _load_operand(
            a_ptr, padding_mask_ptr, rows, choice, sequence, step, routed, offs_k, K, length,
            stride_a_k, stride_a_b, stride_a_t, D, CONCAT, GATHER,
        )  # fmt: skip
        b = _load_weight(b_ptr, e, offs_n, offs_k, N, K, stride_b_e, stride_b_n, stride_b_k)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if b2_ptr is not None and a2_ptr is None:
            b = _load_weight(b2_ptr, e, offs_n, offs_k, N, K, stride_b2_e, stride_b2_n, stride_b2_k)
            acc2 = tl.dot(a, b, acc2, input_precision=PRECISION, out_dtype=ACC)
    if a2_ptr is not None:
        # A loop of its own: two products into one accumulator in one loop miscompile on sm_10x.
        for k0 in range(0, k_end, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            a = _load_operand(
                a2_ptr, padding_mask_ptr, rows, choice, sequence, step, routed, offs_k, K, length,
                stride_a_k, stride_a_b, stride_a_t, D, CONCAT, GATHER,
            )  # fmt: skip
            b = _load_weight(b2_ptr, e, offs_n, offs_k, N, K, stride_b2_e, stride_b2_n, stride_b2_k)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    mask_b = mask_n & (k_end > 0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + e * N + offs_n, mask=mask_b, other=0.0).to(ACC)[None, :]
    if bias2_ptr is not None:
        acc2 += tl.load(bias2_ptr + e * N + offs_n, mask=mask_b, other=0.0).to(ACC)[None, :]
    offs = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask_mn = mask_m[:, None] & mask_n[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + offs, acc.to(pre_ptr.dtype.element_ty), mask=mask_mn)
    if pre2_ptr is not None:
        tl.store(pre2_ptr + offs, acc2.to(pre2_ptr.dtype.element_ty), mask=mask_mn)
    # In 16 bits the rounding of the result hides the error of the fast forms.
    FAST: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 16
    if b2_ptr is not None and a2_ptr is None:
        acc = activate(acc2, ACTIVATION, FAST) * acc
    else:
        acc = activate(acc, ACTIVATION, FAST)
    if seed_ptr is not None:
        row_ids = slot * ROWS_PER_SLOT + rows % ROWS_PER_SLOT
        acc *= dropout_scale(tl.load(seed_ptr), row_ids, offs_n, N, dropout, ACC, first_n)
    if row_weights_ptr is not None:
        acc *= tl.load(row_weights_ptr + slot, mask=routed, other=0.0).to(ACC)[:, None]
    if SCATTER:
        if CONCAT:
            store_segments(
                y_ptr, acc, padding_mask_ptr, choice, sequence, step, mask_m, offs_n, N, length,
                stride_y_k, D,
            )  # fmt: skip
        else:
            place = place_steps(
                padding_mask_ptr, choice, sequence, step, mask_m, stride_y_k // (length * D), length
            )
            store_steps(y_ptr, acc, place, offs_n, D)
    else:
        tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask_mn)


@kernel
def grouped_gemm_dhidden_kernel(
    dy_ptr,  # (top_k, B, T, D)
    down_ptr,  # (E, K, N): K the row's width, N = F
    pre_ptr,  # (M, N)
    gate_pre_ptr,  # (M, N) or None
    topk_weights_ptr,  # (S, top_k)
    down_bias_ptr,  # (E, K) or None
    hidden_ptr,  # (M, N), every row is written: hidden layer times the routing weight
    dpre_ptr,  # (M, N), every row is written
    dgate_ptr,  # (M, N) or None, every row is written
    drow_weights_ptr,  # (column tiles, R * ROWS_PER_SLOT) by slot, every element is written
    sorted_to_slot_ptr,  # (R,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    padding_mask_ptr,  # (B, T) bool or None
    seed_ptr,  # (1,) int64 or None
    num_slots,
    segments_per_sequence,
    length,
    num_experts,
    stride_dy_k,
    stride_dy_b,
    stride_dy_t,
    stride_down_e,
    stride_down_k,
    dropout,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ROWS_PER_SLOT: tl.constexpr,
    CONCAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Gradient of BLOCK_M rows and BLOCK_N columns of the hidden layer, through the activation.

    Grid: as `grouped_gemm_kernel`. Each column tile gives its share of the routing weights'
    gradient, ``<dhidden, hidden>``, to its own row of drow_weights.
    """
    row_tile, column_tile = _swizzled_tile((N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, row_start, row_end = find_group(
        row_tile, expert_offsets_ptr, num_experts, num_slots, ROWS_PER_SLOT, BLOCK_M, GROUPS
    )
    if expert > num_experts:
        return
    rows = row_start + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    slot, choice, sequence, step = find_steps(
        rows, mask_m, sorted_to_slot_ptr, segments_per_sequence, TOP_K, SEGMENT_SIZE, ROWS_PER_SLOT
    )
    first_n = column_tile * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    e = expert.to(tl.int64)
    routed = mask_m & (expert < num_experts)

    dhidden = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    dweight = tl.zeros((BLOCK_M,), dtype=ACC)
    k_end = tl.where(expert < num_experts, K, 0)
    # Where registers read dy too, Triton 3.7 pipelines with one buffer too few for wgmma: the next
    # rows would be loaded over those that it still reads.
    for k0 in tl.range(0, k_end, BLOCK_K, num_stages=1 if down_bias_ptr is not None else None):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        dy = load_rows(
            dy_ptr, padding_mask_ptr, choice, sequence, step, routed, offs_k, K, length,
            stride_dy_k, stride_dy_b, stride_dy_t, D, CONCAT,
        )  # fmt: skip
        w = _load_weight(down_ptr, e, offs_n, offs_k, N, K, stride_down_e, 1, stride_down_k)
        dhidden = tl.dot(dy, w, dhidden, input_precision=PRECISION, out_dtype=ACC)
        if down_bias_ptr is not None:
            bias = tl.load(
                down_bias_ptr + e * K + offs_k, mask=mask_k & (column_tile == 0), other=0.0
            )
            # Rounded before the sum: fused with it, the lanes of a row would have different bits.
            dweight += tl.sum(tl.fma(dy.to(ACC), bias.to(ACC)[None, :], 0.0), 1)

    offs = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask_mn = mask_m[:, None] & mask_n[None, :]
    mask_in = routed[:, None] & mask_n[None, :]
    pre = tl.load(pre_ptr + offs, mask=mask_in, other=0.0).to(ACC)
    row_ids = slot * ROWS_PER_SLOT + rows % ROWS_PER_SLOT
    scale = tl.full((BLOCK_M, BLOCK_N), 1.0, dtype=ACC)
    if seed_ptr is not None:
        scale *= dropout_scale(tl.load(seed_ptr), row_ids, offs_n, N, dropout, ACC, first_n)
    weights = tl.load(topk_weights_ptr + slot, mask=routed, other=0.0).to(ACC)[:, None]
    FAST: tl.constexpr = hidden_ptr.dtype.element_ty.primitive_bitwidth == 16
    if gate_pre_ptr is not None:
        gate_pre = tl.load(gate_pre_ptr + offs, mask=mask_in, other=0.0).to(ACC)
        opened, slope = activate_with_grad(gate_pre, ACTIVATION, FAST)
        hidden = opened * pre * scale
        dgate = dhidden * scale * pre * slope * weights
        tl.store(dgate_ptr + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask_mn)
        dpre = dhidden * scale * opened * weights
    else:
        hidden, slope = activate_with_grad(pre, ACTIVATION, FAST)
        hidden = hidden * scale
        dpre = dhidden * scale * slope * weights
    hidden = tl.where(mask_in, hidden, 0.0)
    dweight += tl.sum(tl.fma(dhidden, hidden, 0.0), 1)
    tl.store(dpre_ptr + offs, dpre.to(dpre_ptr.dtype.element_ty), mask=mask_mn)
    hidden = (hidden * weights).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + offs, hidden, mask=mask_mn)
    out = drow_weights_ptr + column_tile.to(tl.int64) * num_slots * ROWS_PER_SLOT + row_ids
    tl.store(out, dweight, mask=mask_m)


@kernel
def grouped_gemm_dw_kernel(
    a_ptr,  # (M, N) sorted, or (top_k, B, T, D) gathered
    b_ptr,  # (M, K) sorted, or (top_k, B, T, D) gathered
    row_weights_ptr,  # (R,) by slot, or None: scales rows of a in the bias gradient
    dw_ptr,  # (E, N, K), written where one split has all rows of an expert
    dbias_ptr,  # (E, N) or None, likewise
    partials_ptr,  # (splits + E - 1, N * K + N), slots that are read are written
    sorted_to_slot_ptr,  # (R,) int32, or None where both are sorted
    expert_offsets_ptr,  # (E + 1,) int32
    padding_mask_ptr,  # (B, T) bool or None
    segments_per_sequence,
    length,
    num_experts,
    num_splits,
    partial_size,
    stride_a_k,
    stride_a_b,
    stride_a_t,
    stride_b_k,
    stride_b_b,
    stride_b_t,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ROWS_PER_SLOT: tl.constexpr,
    CONCAT: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # one expert for each split
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Sums of ``a.T @ b`` over the rows of each expert, and of a for the bias.

    Grid: ``(splits * cdiv(N, BLOCK_N) * cdiv(K, BLOCK_K),)``. Split i owns tiles
    ``[i * tiles // splits, ...)`` of the rows; its sum for expert e goes to slot ``i + e``, or
    where it belongs if it is the whole. With WHOLE split e owns the tiles of expert e.
    """
    # The programs of a split lie next to each other: they read the same rows.
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    k_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    split = tl.program_id(0) // (n_tiles * k_tiles)
    inside = tl.program_id(0) % (n_tiles * k_tiles)
    first_n = inside // (GROUP_M * k_tiles) * GROUP_M
    height = tl.minimum(n_tiles - first_n, GROUP_M)
    n_tile = first_n + inside % (GROUP_M * k_tiles) % height
    k_tile = inside % (GROUP_M * k_tiles) // height
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    if WHOLE:
        first_expert, end_expert = split, split + 1
        first, last, before = split * 0, split * 0 + 2147483647, split * 0
    else:
        first, last, first_expert, end_expert, before = find_split(
            split, num_splits, expert_offsets_ptr, num_experts, ROWS_PER_SLOT, BLOCK_M, GROUPS
        )
    for expert in tl.range(first_expert, end_expert, disable_licm=True):
        lo = tl.load(expert_offsets_ptr + expert) * ROWS_PER_SLOT
        hi = tl.load(expert_offsets_ptr + expert + 1) * ROWS_PER_SLOT
        tiles = (hi - lo + BLOCK_M - 1) // BLOCK_M
        start = tl.maximum(first, before)
        stop = tl.minimum(last, before + tiles)
        # The gradient of an expert without rows is 0.
        if WHOLE or start < stop:
            dw = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
            dbias = tl.zeros((BLOCK_N,), dtype=ACC)
            # As in `grouped_gemm_dhidden_kernel`: the bias reads a in registers.
            for tile in tl.range(start, stop, num_stages=1 if HAS_BIAS else None):
                rows = lo + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
                mask_m = rows < hi
                slot = rows
                choice = rows
                sequence = rows
                step = rows
                if sorted_to_slot_ptr is not None:
                    slot, choice, sequence, step = find_steps(
                        rows, mask_m, sorted_to_slot_ptr, segments_per_sequence, TOP_K,
                        SEGMENT_SIZE, ROWS_PER_SLOT,
                    )  # fmt: skip
                a = _load_operand(
                    a_ptr, padding_mask_ptr, rows, choice, sequence, step, mask_m, offs_n, N,
                    length, stride_a_k, stride_a_b, stride_a_t, D, CONCAT, GATHER_A,
                )  # fmt: skip
                b = _load_operand(
                    b_ptr, padding_mask_ptr, rows, choice, sequence, step, mask_m, offs_k, K,
                    length, stride_b_k, stride_b_b, stride_b_t, D, CONCAT, GATHER_B,
                ).to(a.dtype)  # fmt: skip
                dw = tl.dot(tl.trans(a), b, dw, input_precision=PRECISION, out_dtype=ACC)
                if HAS_BIAS:
                    a = a.to(ACC)
                    if row_weights_ptr is not None:
                        weights = tl.load(row_weights_ptr + slot, mask=mask_m, other=0.0)
                        a = tl.fma(a, weights.to(ACC)[:, None], 0.0)
                    dbias += tl.sum(a, 0)
            out = partials_ptr + (split + expert).to(tl.int64) * partial_size
            # From numbers that stay in registers anyway.
            whole = True if WHOLE else (first <= before) & (before + tiles <= last)
            e = (split * 0 + expert).to(tl.int64)
            mask_n = offs_n < N
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            offs = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
            first_k = mask_n & (k_tile == 0)
            if whole:
                store_sum(dw_ptr + e * N * K, offs, dw, mask)
                if HAS_BIAS:
                    store_sum(dbias_ptr + e * N, offs_n, dbias, first_k)
            else:
                store_sum(out, offs, dw, mask)
                if HAS_BIAS:
                    store_sum(out + N * K, offs_n, dbias, first_k)
        before += tiles
