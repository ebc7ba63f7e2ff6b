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
    x,  # Rows
    at,  # Steps
    mask_m,
    cols,
    width,
    slots,
    length,
    LAYOUT: tl.constexpr,
):
    """Return (M, N) of a sorted matrix, or gathered from the sequences."""
    if x.stride_k is not None:
        return load_rows(x, at, mask_m, cols, width, slots, length, LAYOUT)
    else:  # noqa: RET505  the branches are compile-time
        mask = mask_m[:, None] & (cols < width)[None, :]
        base = x.ptr + at.rows.to(tl.int64) * x.stride_t
        return tl.load(base[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _load_factor(factor, expert, offs_n, offs_k, N: tl.constexpr, K: tl.constexpr):
    """Return the tile (BLOCK_K, BLOCK_N) of an expert's matrix, transposed; 0 outside of it."""
    offs = expert * factor.stride_e + offs_k[:, None] * factor.stride_k
    mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
    return tl.load(factor.ptr + offs + offs_n[None, :] * factor.stride_n, mask=mask, other=0.0)


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
    a_rows,  # Rows
    a2_rows,  # Rows as a; if there, a second product is added, a2 @ second
    first,  # Factor
    second,  # Factor, if there; without a2 it is the gate's weight
    row_weights_ptr,  # (R,) by slot, or None
    y,  # Rows: a sorted matrix, or sequences to which rows are scattered; every row is written
    slots,  # sorted_to_slot_ptr is None where nothing needs the slot
    dropout,
    num_slots,
    segments_per_sequence,
    length,
    num_experts,
    N: tl.constexpr,
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
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
    GATED: tl.constexpr = second.ptr is not None and a2_rows.ptr is None
    ROWS_PER_SLOT: tl.constexpr = LAYOUT.rows_per_slot
    row_tile, column_tile = _swizzled_tile((N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, row_start, row_end = find_group(
        row_tile, slots.expert_offsets_ptr, num_experts, num_slots, ROWS_PER_SLOT, BLOCK_M, GROUPS
    )
    if expert > num_experts:
        return
    rows = row_start + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    at = find_steps(rows, mask_m, slots, segments_per_sequence, LAYOUT)
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
        a = _load_operand(a_rows, at, routed, offs_k, K, slots, length, LAYOUT)
        b = _load_factor(first, e, offs_n, offs_k, N, K)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if GATED:
            b = _load_factor(second, e, offs_n, offs_k, N, K)
            acc2 = tl.dot(a, b, acc2, input_precision=PRECISION, out_dtype=ACC)
    if a2_rows.ptr is not None:
        # A loop of its own: two products into one accumulator in one loop miscompile on sm_10x.
        for k0 in range(0, k_end, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            a = _load_operand(a2_rows, at, routed, offs_k, K, slots, length, LAYOUT)
            b = _load_factor(second, e, offs_n, offs_k, N, K)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    mask_b = mask_n & (k_end > 0)
    if first.bias_ptr is not None:
        acc += tl.load(first.bias_ptr + e * N + offs_n, mask=mask_b, other=0.0).to(ACC)[None, :]
    if GATED and second.bias_ptr is not None:
        bias = tl.load(second.bias_ptr + e * N + offs_n, mask=mask_b, other=0.0)
        acc2 += bias.to(ACC)[None, :]
    offs = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask_mn = mask_m[:, None] & mask_n[None, :]
    if first.pre_ptr is not None:
        store_sum(first.pre_ptr, offs, acc, mask_mn)
    if GATED and second.pre_ptr is not None:
        store_sum(second.pre_ptr, offs, acc2, mask_mn)
    # In 16 bits the rounding of the result hides the error of the fast forms.
    FAST: tl.constexpr = y.ptr.dtype.element_ty.primitive_bitwidth == 16
    acc = activate(acc2, ACTIVATION, FAST) * acc if GATED else activate(acc, ACTIVATION, FAST)
    if dropout.seed_ptr is not None:
        row_ids = at.slot * ROWS_PER_SLOT + rows % ROWS_PER_SLOT
        acc *= dropout_scale(
            tl.load(dropout.seed_ptr), row_ids, offs_n, N, dropout.probability, ACC, first_n
        )
    if row_weights_ptr is not None:
        acc *= tl.load(row_weights_ptr + at.slot, mask=routed, other=0.0).to(ACC)[:, None]
    _store_rows(y, acc, at, mask_m, offs_n, N, slots, length, LAYOUT)


@triton.jit
def _store_rows(
    y,  # Rows
    value,
    at,  # Steps
    mask_m,
    cols,
    width: tl.constexpr,
    slots,
    length,
    LAYOUT: tl.constexpr,
):
    """Store (M, N) to a sorted matrix, or scatter it to the sequences."""
    D: tl.constexpr = LAYOUT.d_model
    if y.stride_k is None:
        offs = at.rows.to(tl.int64)[:, None] * width + cols[None, :]
        store_sum(y.ptr, offs, value, mask_m[:, None] & (cols < width)[None, :])
    elif LAYOUT.concat:
        store_segments(y.ptr, value, at, mask_m, cols, width, slots, length, y.stride_k, D)
    else:
        place = place_steps(at, mask_m, slots, y.stride_k // (length * D), length)
        store_steps(y.ptr, value, place, cols, D)


@kernel
def grouped_gemm_dhidden_kernel(
    dy_rows,  # Rows (top_k, B, T, D)
    down,  # Factor (E, N, K), by strides the transpose of down: K the row's width, N = F
    down_bias_ptr,  # (E, K) or None
    pre_ptr,  # (M, N)
    gate_pre_ptr,  # (M, N) or None
    topk_weights_ptr,  # (S, top_k)
    kept,  # Kept, every row is written
    drow_weights_ptr,  # (column tiles, R * rows_per_slot) by slot, every element is written
    slots,
    dropout,
    num_slots,
    segments_per_sequence,
    length,
    num_experts,
    N: tl.constexpr,
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
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
    ROWS_PER_SLOT: tl.constexpr = LAYOUT.rows_per_slot
    row_tile, column_tile = _swizzled_tile((N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, row_start, row_end = find_group(
        row_tile, slots.expert_offsets_ptr, num_experts, num_slots, ROWS_PER_SLOT, BLOCK_M, GROUPS
    )
    if expert > num_experts:
        return
    rows = row_start + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    at = find_steps(rows, mask_m, slots, segments_per_sequence, LAYOUT)
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
        dy = load_rows(dy_rows, at, routed, offs_k, K, slots, length, LAYOUT)
        w = _load_factor(down, e, offs_n, offs_k, N, K)
        dhidden = tl.dot(dy, w, dhidden, input_precision=PRECISION, out_dtype=ACC)
        if down_bias_ptr is not None:
            mask_bias = (offs_k < K) & (column_tile == 0)
            bias = tl.load(down_bias_ptr + e * K + offs_k, mask=mask_bias, other=0.0)
            # Rounded before the sum: fused with it, the lanes of a row would have different bits.
            dweight += tl.sum(tl.fma(dy.to(ACC), bias.to(ACC)[None, :], 0.0), 1)

    offs = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask_mn = mask_m[:, None] & mask_n[None, :]
    mask_in = routed[:, None] & mask_n[None, :]
    pre = tl.load(pre_ptr + offs, mask=mask_in, other=0.0).to(ACC)
    row_ids = at.slot * ROWS_PER_SLOT + rows % ROWS_PER_SLOT
    scale = tl.full((BLOCK_M, BLOCK_N), 1.0, dtype=ACC)
    if dropout.seed_ptr is not None:
        seed, p = tl.load(dropout.seed_ptr), dropout.probability
        scale *= dropout_scale(seed, row_ids, offs_n, N, p, ACC, first_n)
    weights = tl.load(topk_weights_ptr + at.slot, mask=routed, other=0.0).to(ACC)[:, None]
    FAST: tl.constexpr = kept.hidden_ptr.dtype.element_ty.primitive_bitwidth == 16
    if gate_pre_ptr is not None:
        gate_pre = tl.load(gate_pre_ptr + offs, mask=mask_in, other=0.0).to(ACC)
        opened, slope = activate_with_grad(gate_pre, ACTIVATION, FAST)
        hidden = opened * pre
        store_sum(kept.dgate_ptr, offs, dhidden * scale * pre * slope * weights, mask_mn)
        dpre = dhidden * scale * opened * weights
    else:
        hidden, slope = activate_with_grad(pre, ACTIVATION, FAST)
        dpre = dhidden * scale * slope * weights
    hidden = tl.where(mask_in, hidden * scale, 0.0)
    dweight += tl.sum(tl.fma(dhidden, hidden, 0.0), 1)
    store_sum(kept.dpre_ptr, offs, dpre, mask_mn)
    store_sum(kept.hidden_ptr, offs, hidden * weights, mask_mn)
    out = drow_weights_ptr + column_tile.to(tl.int64) * num_slots * ROWS_PER_SLOT + row_ids
    tl.store(out, dweight, mask=mask_m)


@triton.jit
def _split_tile(n_tiles: tl.constexpr, k_tiles: tl.constexpr, GROUP_M: tl.constexpr):
    """Return ``(split, tile of N, tile of K)`` of a program.

    The programs of a split lie next to each other: they read the same rows.
    """
    split = tl.program_id(0) // (n_tiles * k_tiles)
    inside = tl.program_id(0) % (n_tiles * k_tiles)
    first_n = inside // (GROUP_M * k_tiles) * GROUP_M
    height = tl.minimum(n_tiles - first_n, GROUP_M)
    n_tile = first_n + inside % (GROUP_M * k_tiles) % height
    return split, n_tile, inside % (GROUP_M * k_tiles) // height


@kernel
def grouped_gemm_dw_kernel(
    a_rows,  # Rows of N columns
    b_rows,  # Rows of K columns
    row_weights_ptr,  # (R,) by slot, or None: scales rows of a in the bias gradient
    dw_ptr,  # (E, N, K), written where one split has all rows of an expert
    dbias_ptr,  # (E, N) or None, likewise
    partials_ptr,  # (splits + E - 1, N * K + N), slots that are read are written
    slots,  # sorted_to_slot_ptr is None where both are sorted
    segments_per_sequence,
    length,
    num_experts,
    num_splits,
    partial_size,
    N: tl.constexpr,
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
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
    ROWS_PER_SLOT: tl.constexpr = LAYOUT.rows_per_slot
    HAS_BIAS: tl.constexpr = dbias_ptr is not None
    split, n_tile, k_tile = _split_tile(
        (N + BLOCK_N - 1) // BLOCK_N, (K + BLOCK_K - 1) // BLOCK_K, GROUP_M
    )
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    if WHOLE:
        first_expert, end_expert = split, split + 1
        first, last, before = split * 0, split * 0 + 2147483647, split * 0
    else:
        first, last, first_expert, end_expert, before = find_split(
            split, num_splits, slots.expert_offsets_ptr, num_experts, ROWS_PER_SLOT, BLOCK_M, GROUPS
        )
    for expert in tl.range(first_expert, end_expert, disable_licm=True):
        lo = tl.load(slots.expert_offsets_ptr + expert) * ROWS_PER_SLOT
        hi = tl.load(slots.expert_offsets_ptr + expert + 1) * ROWS_PER_SLOT
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
                at = find_steps(rows, mask_m, slots, segments_per_sequence, LAYOUT)
                a = _load_operand(a_rows, at, mask_m, offs_n, N, slots, length, LAYOUT)
                b = _load_operand(b_rows, at, mask_m, offs_k, K, slots, length, LAYOUT)
                b = b.to(a.dtype)
                dw = tl.dot(tl.trans(a), b, dw, input_precision=PRECISION, out_dtype=ACC)
                if HAS_BIAS:
                    a = a.to(ACC)
                    if row_weights_ptr is not None:
                        weights = tl.load(row_weights_ptr + at.slot, mask=mask_m, other=0.0)
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
