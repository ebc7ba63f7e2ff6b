"""Backward kernels of the shared expert's plan "fused"; `shared` launches them.

A row is a whole segment, as in `shared_kernels`. x's gradient comes from `shared_steps_kernel`.
"""

from typing import Any

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import activate_with_grad, dropout_scale
from segmoe_kernels.stages.shared_kernels import (
    EPILOGUE_COLUMNS,
    find_segments,
    halves,
    load_segments,
    segments_product,
    swizzled_tile,
)


@triton.jit
def hidden_gradient(
    dhidden,
    pre,
    gate_pre,
    scale,
    opened,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
) -> Any:
    """Return ``(hidden, dpre, dgate, share)`` from the gradient of the hidden layer.

    dhidden is taken before the gate ``opened`` (M, 1); hidden and the gradients are returned
    behind it. ``share`` (M,) is the columns' part of ``<dhidden, hidden>``, before it: the gradient
    of ``opened``, without the product that made the output.
    """
    if GATED:
        active, slope = activate_with_grad(gate_pre, ACTIVATION, FAST)
        hidden = active * pre * scale
        dpre = dhidden * scale * active
        dgate = dhidden * scale * pre * slope
    else:
        active, slope = activate_with_grad(pre, ACTIVATION, FAST)
        hidden = active * scale
        dpre = dhidden * scale * slope
        dgate = dpre
    return hidden * opened, dpre * opened, dgate * opened, tl.sum(dhidden * hidden, 1)


@triton.jit
def _store_hidden_gradient(
    dhidden,
    pre_ptr,
    gate_pre_ptr,
    seed_ptr,
    hidden_ptr,
    dpre_ptr,
    dgate_ptr,
    dbias_ptr,
    opened,
    rows,
    mask_m,
    first_n,
    dropout,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Epilogue of `shared_dhidden_kernel`, a part of the columns after the other: the shares."""
    if BLOCK_N > EPILOGUE_COLUMNS:
        left, right = halves(dhidden, BLOCK_M, BLOCK_N)
        share = _store_hidden_gradient(
            left, pre_ptr, gate_pre_ptr, seed_ptr, hidden_ptr, dpre_ptr, dgate_ptr, dbias_ptr,
            opened, rows, mask_m, first_n, dropout, H, ACTIVATION, ACC, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        share += _store_hidden_gradient(
            right, pre_ptr, gate_pre_ptr, seed_ptr, hidden_ptr, dpre_ptr, dgate_ptr, dbias_ptr,
            opened, rows, mask_m, first_n + BLOCK_N // 2, dropout, H, ACTIVATION, ACC, BLOCK_M,
            BLOCK_N // 2,
        )  # fmt: skip
    else:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < H
        long_rows = rows.to(tl.int64)
        offs = long_rows[:, None] * H + offs_n[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        pre = tl.load(pre_ptr + offs, mask=mask, other=0.0).to(ACC)
        gate_pre = pre
        if gate_pre_ptr is not None:
            gate_pre = tl.load(gate_pre_ptr + offs, mask=mask, other=0.0).to(ACC)
        scale = tl.full((BLOCK_M, BLOCK_N), 1.0, dtype=ACC)
        if seed_ptr is not None:
            scale *= dropout_scale(tl.load(seed_ptr), long_rows, offs_n, H, dropout, ACC, first_n)
        hidden, dpre, dgate, share = hidden_gradient(
            dhidden, pre, gate_pre, scale, opened[:, None], gate_pre_ptr is not None, ACTIVATION,
            hidden_ptr.dtype.element_ty.primitive_bitwidth == 16,
        )  # fmt: skip
        tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        tl.store(dpre_ptr + offs, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if gate_pre_ptr is not None:
            tl.store(dgate_ptr + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + offs_n, tl.sum(dpre, 0), mask=mask_n)
            if gate_pre_ptr is not None:
                tl.store(dbias_ptr + H + offs_n, tl.sum(dgate, 0), mask=mask_n)
    return share


@triton.jit
def shared_dhidden_kernel(
    dy_ptr,  # (B, T, D)
    down_ptr,  # (W, H), rows stride_down apart
    down_bias_ptr,  # (W,) or None
    pre_ptr,  # (M, H)
    gate_pre_ptr,  # (M, H) or None
    logits_ptr,  # (M,)
    padding_mask_ptr,  # (B, T) bool or None
    seed_ptr,  # (1,) int64 or None
    hidden_ptr,  # (M, H): hidden layer times the opened gate
    dpre_ptr,  # (M, H)
    dgate_ptr,  # (M, H) or None
    shares_ptr,  # (column tiles, M) in ACC: of the opened gate's gradient
    dbias_ptr,  # (row tiles, H), or (row tiles, 2 * H) with gate_pre, in ACC, or None
    num_rows,
    segments_per_sequence,
    length,
    stride_dy_b,
    stride_dy_t,
    stride_down,
    dropout,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Gradient of BLOCK_M segments and BLOCK_N columns of the hidden layer, through the activation.

    Grid: ``(cdiv(M, BLOCK_M) * cdiv(H, BLOCK_N),)``. Every element of the outputs is written.
    The programs of the first columns add ``<dy, down_bias>`` to their shares.
    """
    row_tile, column_tile = swizzled_tile(num_rows, H, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, sequence, step, limit = find_segments(
        rows, num_rows, segments_per_sequence, length, SEGMENT_SIZE, D
    )
    base = sequence * stride_dy_b + step.to(tl.int64) * stride_dy_t
    flags = sequence * length + step
    offs_n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)

    dhidden, _, from_bias = segments_product(
        dy_ptr, down_ptr, None, down_bias_ptr, padding_mask_ptr, base, flags, limit, offs_n,
        column_tile == 0, stride_dy_t, stride_down, 1, 0, 0, H, W, D, ACC, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    opened = 1.0 / (1.0 + tl.exp(-tl.load(logits_ptr + rows, mask=mask_m, other=0.0)))
    if dbias_ptr is not None:
        gates: tl.constexpr = 1 if gate_pre_ptr is None else 2
        dbias_ptr += row_tile.to(tl.int64) * (gates * H)
    share = _store_hidden_gradient(
        dhidden, pre_ptr, gate_pre_ptr, seed_ptr, hidden_ptr, dpre_ptr, dgate_ptr, dbias_ptr,
        opened, rows, mask_m, column_tile * BLOCK_N, dropout, H, ACTIVATION, ACC, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    shares = shares_ptr + column_tile.to(tl.int64) * num_rows + rows
    tl.store(shares, share + from_bias, mask=mask_m)


@triton.jit
def shared_dlogit_kernel(
    shares_ptr,  # (column tiles, M)
    logits_ptr,  # (M,)
    dlogits_ptr,  # (M,), every element is written
    opened_ptr,  # (M,) or None: the gate behind its sigmoid
    num_rows,
    num_shares,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Add up the shares of BLOCK_M gates in ascending order, and go through the sigmoid.

    Grid: ``(cdiv(M, BLOCK_M),)``.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    dopened = tl.zeros((BLOCK_M,), dtype=ACC)
    ptrs = shares_ptr + rows.to(tl.int64)
    for _ in range(num_shares):
        dopened += tl.load(ptrs, mask=mask_m, other=0.0)
        ptrs += num_rows
    opened = 1.0 / (1.0 + tl.exp(-tl.load(logits_ptr + rows, mask=mask_m, other=0.0)))
    tl.store(dlogits_ptr + rows, dopened * opened * (1.0 - opened), mask=mask_m)
    if opened_ptr is not None:
        tl.store(opened_ptr + rows, opened, mask=mask_m)


@triton.jit
def _rows_loop(
    a_ptr,
    b_ptr,
    vector_ptr,
    padding_mask_ptr,
    first_tile,
    last_tile,
    column,
    offs_h,
    num_rows,
    segments_per_sequence,
    length,
    stride_a_b,
    stride_a_t,
    H: tl.constexpr,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    WITH_VECTOR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    """Return ``a.T @ b`` (BLOCK_N, BLOCK_K) and ``a.T @ vector`` (BLOCK_N,) over tiles of rows."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    # Without 16-bit tensor cores a tile's product with the vector is summed by itself: running on
    # from tile to tile, the sum of all rows would round at each of them.
    WIDE: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth > 16
    along = tl.zeros((BLOCK_N, 1 if WIDE else 16), dtype=ACC)
    rows = first_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = rows % segments_per_sequence
    sequence = (rows // segments_per_sequence).to(tl.int64)
    step = index * SEGMENT_SIZE
    base = sequence * stride_a_b + step.to(tl.int64) * stride_a_t
    flags = sequence * length + step
    # Places advance by sums: two divisions for each row and tile would outweigh the product.
    sequences = tl.full((), BLOCK_M // segments_per_sequence, dtype=tl.int64)
    segments = tl.full((), BLOCK_M % segments_per_sequence, dtype=tl.int32)
    steps = segments.to(tl.int64) * SEGMENT_SIZE
    all_steps = tl.full((), segments_per_sequence * SEGMENT_SIZE, dtype=tl.int64)
    mask_h = (offs_h < H)[None, :]
    for _ in range(first_tile, last_tile):
        mask_m = rows < num_rows
        limit = tl.minimum(length - index * SEGMENT_SIZE, SEGMENT_SIZE) * D
        limit = tl.where(mask_m, limit, 0)
        a = load_segments(
            a_ptr, padding_mask_ptr, base, flags, limit, column, stride_a_t, D, BLOCK_N
        )
        ptrs = b_ptr + rows.to(tl.int64)[:, None] * H + offs_h[None, :]
        b = tl.load(ptrs, mask=mask_m[:, None] & mask_h, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION, out_dtype=ACC)
        if WITH_VECTOR:
            v = tl.load(vector_ptr + rows, mask=mask_m, other=0.0).to(a.dtype)
            if WIDE:
                along += tl.sum(a * v[:, None], 0)[:, None]
            else:
                first = (tl.arange(0, 16) == 0)[None, :]
                v = tl.where(first, v[:, None], tl.zeros_like(v)[:, None])
                along = tl.dot(tl.trans(a), v, along, input_precision=PRECISION, out_dtype=ACC)
        rows += BLOCK_M
        index += segments
        base += sequences * stride_a_b + steps * stride_a_t
        flags += sequences * length + steps
        next_sequence = index >= segments_per_sequence
        index = tl.where(next_sequence, index - segments_per_sequence, index)
        base += tl.where(next_sequence, stride_a_b - all_steps * stride_a_t, 0)
        flags += tl.where(next_sequence, length - all_steps, 0)
    return acc, tl.sum(along, 1)


@triton.jit
def _rows_product(
    a_ptr,
    b_ptr,
    vector_ptr,
    padding_mask_ptr,
    first_tile,
    last_tile,
    column,
    offs_h,
    wants_vector,
    num_rows,
    segments_per_sequence,
    length,
    stride_a_b,
    stride_a_t,
    H: tl.constexpr,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    """Choose the loop, as `segments_product` does."""
    if vector_ptr is None:
        acc, along = _rows_loop(
            a_ptr, b_ptr, vector_ptr, padding_mask_ptr, first_tile, last_tile, column, offs_h,
            num_rows, segments_per_sequence, length, stride_a_b, stride_a_t, H, D, SEGMENT_SIZE,
            False, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif wants_vector:
        acc, along = _rows_loop(
            a_ptr, b_ptr, vector_ptr, padding_mask_ptr, first_tile, last_tile, column, offs_h,
            num_rows, segments_per_sequence, length, stride_a_b, stride_a_t, H, D, SEGMENT_SIZE,
            True, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        acc, along = _rows_loop(
            a_ptr, b_ptr, vector_ptr, padding_mask_ptr, first_tile, last_tile, column, offs_h,
            num_rows, segments_per_sequence, length, stride_a_b, stride_a_t, H, D, SEGMENT_SIZE,
            False, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc, along


@triton.jit
def shared_dw_kernel(
    a_ptr,  # (B, T, D): x or dy
    b_ptr,  # (M, H)
    vector_ptr,  # (M,) or None, rounded to the dtype of a
    padding_mask_ptr,  # (B, T) bool or None
    weight_ptr,  # (splits, W, H) in ACC or, of one split, in the dtype of a; slots lie slot_stride
    # apart, and every element is written
    along_ptr,  # (splits, W) likewise, or None
    num_rows,
    segments_per_sequence,
    length,
    num_splits,
    slot_stride,
    stride_a_b,
    stride_a_t,
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Sum ``a.T @ b`` over a run of segments, (W, H), and ``a.T @ vector``, (W,).

    Grid: ``(splits, cdiv(W, BLOCK_N), cdiv(H, BLOCK_K))``. Split i owns tiles
    ``[i * tiles // splits, ...)`` of the rows, and slot i. With TRANSPOSED the matrix is stored as
    (H, W). The programs of the first columns of b compute the vector's product.
    """
    split = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N
    offs_w = column + tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    first_tile = (split * tiles // num_splits).to(tl.int32)
    last_tile = ((split + 1) * tiles // num_splits).to(tl.int32)
    mask_w = offs_w < W

    acc, along = _rows_product(
        a_ptr, b_ptr, vector_ptr, padding_mask_ptr, first_tile, last_tile, column, offs_h,
        tl.program_id(2) == 0, num_rows, segments_per_sequence, length, stride_a_b, stride_a_t,
        H, D, SEGMENT_SIZE, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if vector_ptr is not None:
        along = along.to(along_ptr.dtype.element_ty)
        mask = mask_w & (tl.program_id(2) == 0)
        tl.store(along_ptr + split * slot_stride + offs_w, along, mask=mask)
    acc = acc.to(weight_ptr.dtype.element_ty)
    weight_ptr += split * slot_stride
    mask_h = offs_h < H
    if TRANSPOSED:
        offs = offs_h.to(tl.int64)[:, None] * W + offs_w[None, :]
        tl.store(weight_ptr + offs, tl.trans(acc), mask=mask_h[:, None] & mask_w[None, :])
    else:
        offs = offs_w.to(tl.int64)[:, None] * H + offs_h[None, :]
        tl.store(weight_ptr + offs, acc, mask=mask_w[:, None] & mask_h[None, :])


@triton.jit
def shared_reduce_kernel(
    partials_ptr,  # (splits, n0 + ... + n4)
    out0_ptr,  # (n0,), every element is written, as in the others
    out1_ptr,  # (n1,) or None
    out2_ptr,
    out3_ptr,
    out4_ptr,
    num_splits,
    partial_size,
    n0,
    n1,
    n2,
    n3,
    n4,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add up the slots of BLOCK elements in a fixed order, BLOCK_R of them at a time.

    Grid: ``(cdiv(partial size, BLOCK),)``. Rounded at the store.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < partial_size
    acc = tl.zeros((BLOCK_R, BLOCK), dtype=ACC)
    for first in range(0, num_splits, BLOCK_R):
        slots = first + tl.arange(0, BLOCK_R)
        ptrs = partials_ptr + slots.to(tl.int64)[:, None] * partial_size + offs[None, :]
        acc += tl.load(ptrs, mask=(slots < num_splits)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(acc, 0)
    _store_part(out0_ptr, total, offs, n0)
    offs -= n0
    _store_part(out1_ptr, total, offs, n1)
    offs -= n1
    _store_part(out2_ptr, total, offs, n2)
    offs -= n2
    _store_part(out3_ptr, total, offs, n3)
    offs -= n3
    _store_part(out4_ptr, total, offs, n4)


@triton.jit
def _store_part(out_ptr, value, offs, n):
    """Store the elements of value whose offset lies in ``[0, n)``; None has none."""
    if out_ptr is not None:
        mask = (offs >= 0) & (offs < n)
        tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)
