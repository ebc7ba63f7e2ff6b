"""Matrix products of the shared expert; `shared` launches them.

A row is a whole segment, ``P * D`` columns that lie in ``(B, T, D)``: rows are read from there and
written to there, never copied. M is the number of segments, W = P * D, H = P * F.
"""

from typing import Any

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import activate, dropout_scale


@triton.jit
def swizzled_tile(
    num_rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
) -> Any:
    """Return ``(row tile, column tile)``: GROUP_M tiles of rows share what they read in L2."""
    pid = tl.program_id(0)
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    first = pid // (GROUP_M * column_tiles) * GROUP_M
    height = tl.minimum(row_tiles - first, GROUP_M)
    inside = pid % (GROUP_M * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def find_segments(
    rows, num_rows, segments_per_sequence, length, SEGMENT_SIZE: tl.constexpr, D: tl.constexpr
) -> Any:
    """Return ``(mask, sequence, step, limit)`` of segments.

    Step is the first one; limit says how many of the P * D columns lie inside the sequence.
    """
    mask_m = rows < num_rows
    sequence = (rows // segments_per_sequence).to(tl.int64)
    step = (rows % segments_per_sequence) * SEGMENT_SIZE
    limit = tl.where(mask_m, tl.minimum(length - step, SEGMENT_SIZE) * D, 0)
    return mask_m, sequence, step, limit


@triton.jit
def load_segments(
    ptr,  # (B, T, D)
    padding_mask_ptr,  # (B, T) bool, contiguous, or None
    base,  # (M,) int64, where the segment starts in ptr
    flags,  # (M,) int64, where it starts in padding_mask_ptr
    limit,  # (M,)
    first,  # the first column
    stride_t,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """Return columns ``[first, first + BLOCK)`` of segments; 0 where a step is not real."""
    # 64 bits: steps of a transposed tensor can lie far apart. Columns of a step lie next to each
    # other, so that is all to add; a remainder by D would hide from the compiler what is aligned.
    jump = tl.full((), stride_t - D, dtype=tl.int64)
    cols = first + tl.arange(0, BLOCK)
    if D % BLOCK == 0:
        # The block lies in one step: one flag a row.
        step = first // D
        offs = cols + step * jump
        real = first < limit
        if padding_mask_ptr is not None:
            real &= tl.load(padding_mask_ptr + flags + step, mask=real, other=0) != 0
        mask = real[:, None]
    else:
        offs = cols + (cols // D) * jump
        mask = real_columns(padding_mask_ptr, flags, limit, cols, D)
    return tl.load((ptr + base)[:, None] + offs[None, :], mask=mask, other=0.0)


@triton.jit
def real_columns(padding_mask_ptr, flags, limit, cols, D: tl.constexpr) -> Any:
    """Return (M, N): whether a column of a segment belongs to a real step."""
    real = cols[None, :] < limit[:, None]
    if padding_mask_ptr is not None:
        ptrs = (padding_mask_ptr + flags)[:, None] + (cols // D)[None, :]
        real &= tl.load(ptrs, mask=real, other=0) != 0
    return real


@triton.jit
def _segments_loop(
    a_ptr,  # (B, T, D)
    b_ptr,  # (W, N) by strides
    b2_ptr,  # (W, N) by strides, or None
    vector_ptr,  # (W,); not read without WITH_VECTOR
    padding_mask_ptr,
    base,
    flags,
    limit,
    offs_n,
    stride_a_t,
    stride_b_k,
    stride_b_n,
    stride_b2_k,
    stride_b2_n,
    N: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    WITH_VECTOR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    """Return segments times b, b2 and vector: (BLOCK_M, BLOCK_N) twice, and (BLOCK_M,)."""
    mask_n = (offs_n < N)[None, :]
    columns_n = offs_n.to(tl.int64)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    along = tl.zeros((BLOCK_M, 16), dtype=ACC)
    for k0 in range(0, W, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        rows_k = offs_k.to(tl.int64)[:, None]
        mask = (offs_k < W)[:, None] & mask_n
        a = load_segments(a_ptr, padding_mask_ptr, base, flags, limit, k0, stride_a_t, D, BLOCK_K)
        b = tl.load(b_ptr + rows_k * stride_b_k + columns_n * stride_b_n, mask=mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if b2_ptr is not None:
            ptrs = b2_ptr + rows_k * stride_b2_k + columns_n * stride_b2_n
            b = tl.load(ptrs, mask=mask, other=0.0)
            acc2 = tl.dot(a, b, acc2, input_precision=PRECISION, out_dtype=ACC)
        if WITH_VECTOR:
            # The vector as the first of 16 columns, the least that the tensor cores take.
            v = tl.load(vector_ptr + offs_k, mask=offs_k < W, other=0.0)
            v = tl.where((tl.arange(0, 16) == 0)[None, :], v[:, None], tl.zeros_like(v)[:, None])
            along = tl.dot(a, v, along, input_precision=PRECISION, out_dtype=ACC)
    return acc, acc2, tl.sum(along, 1)


@triton.jit
def segments_product(
    a_ptr,  # (B, T, D)
    b_ptr,  # (W, N) by strides
    b2_ptr,  # (W, N) by strides, or None
    vector_ptr,  # (W,) or None
    padding_mask_ptr,
    base,
    flags,
    limit,
    offs_n,
    wants_vector,
    stride_a_t,
    stride_b_k,
    stride_b_n,
    stride_b2_k,
    stride_b2_n,
    N: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    """Return segments times b, b2 and, where wants_vector holds, vector.

    Two loops, so that only the programs that want the vector's product pay for it.
    """
    if vector_ptr is None:
        acc, acc2, along = _segments_loop(
            a_ptr, b_ptr, b2_ptr, vector_ptr, padding_mask_ptr, base, flags, limit, offs_n,
            stride_a_t, stride_b_k, stride_b_n, stride_b2_k, stride_b2_n, N, W, D, False, ACC,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif wants_vector:
        acc, acc2, along = _segments_loop(
            a_ptr, b_ptr, b2_ptr, vector_ptr, padding_mask_ptr, base, flags, limit, offs_n,
            stride_a_t, stride_b_k, stride_b_n, stride_b2_k, stride_b2_n, N, W, D, True, ACC,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        acc, acc2, along = _segments_loop(
            a_ptr, b_ptr, b2_ptr, vector_ptr, padding_mask_ptr, base, flags, limit, offs_n,
            stride_a_t, stride_b_k, stride_b_n, stride_b2_k, stride_b2_n, N, W, D, False, ACC,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc, acc2, along


# Columns that an epilogue holds at once, beside the sums: more would spill registers.
EPILOGUE_COLUMNS = tl.constexpr(32)


@triton.jit
def halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> Any:
    """Return the left and the right columns of x (BLOCK_M, BLOCK_N); nothing moves."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _store_hidden(
    acc,
    acc2,
    up_bias_ptr,
    gate_bias_ptr,
    seed_ptr,
    hidden_ptr,
    pre_ptr,
    gate_pre_ptr,
    rows,
    mask_m,
    first_n,
    dropout,
    H: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Epilogue of `shared_up_kernel` for BLOCK_N columns, a part of them after the other."""
    if BLOCK_N > EPILOGUE_COLUMNS:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        left2, right2 = halves(acc2, BLOCK_M, BLOCK_N)
        _store_hidden(
            left, left2, up_bias_ptr, gate_bias_ptr, seed_ptr, hidden_ptr, pre_ptr, gate_pre_ptr,
            rows, mask_m, first_n, dropout, H, GATED, ACTIVATION, ACC, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _store_hidden(
            right, right2, up_bias_ptr, gate_bias_ptr, seed_ptr, hidden_ptr, pre_ptr, gate_pre_ptr,
            rows, mask_m, first_n + BLOCK_N // 2, dropout, H, GATED, ACTIVATION, ACC, BLOCK_M,
            BLOCK_N // 2,
        )  # fmt: skip
    else:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < H
        if up_bias_ptr is not None:
            acc += tl.load(up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        if gate_bias_ptr is not None:
            acc2 += tl.load(gate_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        long_rows = rows.to(tl.int64)
        offs = long_rows[:, None] * H + offs_n[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + offs, acc.to(pre_ptr.dtype.element_ty), mask=mask)
        if gate_pre_ptr is not None:
            tl.store(gate_pre_ptr + offs, acc2.to(gate_pre_ptr.dtype.element_ty), mask=mask)
        FAST: tl.constexpr = hidden_ptr.dtype.element_ty.primitive_bitwidth == 16
        hidden = activate(acc2 if GATED else acc, ACTIVATION, FAST)
        if GATED:
            hidden *= acc
        if seed_ptr is not None:
            hidden *= dropout_scale(tl.load(seed_ptr), long_rows, offs_n, H, dropout, ACC, first_n)
        tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def shared_up_kernel(
    x_ptr,  # (B, T, D)
    up_ptr,  # (H, W), rows stride_up apart
    gate_proj_ptr,  # (H, W) or None
    up_bias_ptr,  # (H,) or None
    gate_bias_ptr,  # (H,) or None
    shared_gate_ptr,  # (W,)
    padding_mask_ptr,  # (B, T) bool or None
    seed_ptr,  # (1,) int64 or None
    hidden_ptr,  # (M, H), every element is written, as in all outputs
    pre_ptr,  # (M, H) or None: before the activation
    gate_pre_ptr,  # (M, H) or None
    logits_ptr,  # (M,) in ACC: of the shared gate
    num_rows,
    segments_per_sequence,
    length,
    stride_x_b,
    stride_x_t,
    stride_up,
    stride_gate,
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
    """Compute BLOCK_M segments and BLOCK_N columns of the hidden layer.

    Grid: ``(cdiv(M, BLOCK_M) * cdiv(H, BLOCK_N),)``. Sums in ACC; hidden and pre are rounded at
    the store. The programs of the first columns compute the gate's logits too.
    """
    row_tile, column_tile = swizzled_tile(num_rows, H, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, sequence, step, limit = find_segments(
        rows, num_rows, segments_per_sequence, length, SEGMENT_SIZE, D
    )
    base = sequence * stride_x_b + step.to(tl.int64) * stride_x_t
    flags = sequence * length + step
    offs_n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)

    acc, acc2, logit = segments_product(
        x_ptr, up_ptr, gate_proj_ptr, shared_gate_ptr, padding_mask_ptr, base, flags, limit,
        offs_n, column_tile == 0, stride_x_t, 1, stride_up, 1, stride_gate, H, W, D, ACC, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(logits_ptr + rows, logit, mask=mask_m & (column_tile == 0))

    first_n = column_tile * BLOCK_N
    _store_hidden(
        acc, acc2, up_bias_ptr, gate_bias_ptr, seed_ptr, hidden_ptr, pre_ptr, gate_pre_ptr, rows,
        mask_m, first_n, dropout, H, gate_proj_ptr is not None, ACTIVATION, ACC, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _store_steps(
    acc,
    bias_ptr,
    vector_ptr,
    expert_out_ptr,
    padding_mask_ptr,
    y_ptr,
    scale,
    dlogit,
    flags,
    limit,
    base,
    first_n,
    stride_out_k,
    stride_out_t,
    W: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Epilogue of `shared_steps_kernel`, a part of the columns after the other."""
    if BLOCK_N > EPILOGUE_COLUMNS:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _store_steps(
            left, bias_ptr, vector_ptr, expert_out_ptr, padding_mask_ptr, y_ptr, scale, dlogit,
            flags, limit, base, first_n, stride_out_k, stride_out_t, W, D, TOP_K, ACC, BLOCK_M,
            BLOCK_N // 2,
        )  # fmt: skip
        _store_steps(
            right, bias_ptr, vector_ptr, expert_out_ptr, padding_mask_ptr, y_ptr, scale, dlogit,
            flags, limit, base, first_n + BLOCK_N // 2, stride_out_k, stride_out_t, W, D, TOP_K,
            ACC, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < W
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        acc *= scale[:, None]
        if vector_ptr is not None:
            vector = tl.load(vector_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
            acc += dlogit[:, None] * vector[None, :]
        inside = offs_n[None, :] < limit[:, None]
        real = real_columns(padding_mask_ptr, flags, limit, offs_n, D)
        acc = tl.where(real, acc, 0.0)
        if expert_out_ptr is not None:
            jump = tl.full((), stride_out_t - D, dtype=tl.int64)
            offs = base[:, None] + (offs_n + (offs_n // D) * jump)[None, :]
            for _ in range(TOP_K):
                acc += tl.load(expert_out_ptr + offs, mask=inside, other=0.0).to(ACC)
                offs += stride_out_k
        # A segment is consecutive steps of a contiguous tensor, so its columns are too.
        ptrs = (y_ptr + flags * D)[:, None] + offs_n[None, :]
        tl.store(ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def shared_steps_kernel(
    a_ptr,  # (M, K) contiguous
    a2_ptr,  # (M, K) contiguous, or None
    b_ptr,  # (K, W) by strides
    b2_ptr,  # (K, W) by strides, comes with a2
    bias_ptr,  # (W,) or None
    logits_ptr,  # (M,) or None: rows are multiplied by its sigmoid
    dlogits_ptr,  # (M,) or None: this times vector is added
    vector_ptr,  # (W,), comes with dlogits
    expert_out_ptr,  # (top_k, B, T, D) or None: added
    padding_mask_ptr,  # (B, T) bool or None
    y_ptr,  # (B, T, D) contiguous, every element is written
    num_rows,
    segments_per_sequence,
    length,
    stride_b_k,
    stride_b_n,
    stride_b2_k,
    stride_b2_n,
    stride_out_k,
    stride_out_b,
    stride_out_t,
    K: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Compute ``a @ b + a2 @ b2`` for BLOCK_M segments and BLOCK_N columns, and write the steps.

    Forward: the down projection, then bias, gate and the routed experts. Backward: x's gradient.
    Grid: ``(cdiv(M, BLOCK_M) * cdiv(W, BLOCK_N),)``. Sums in ACC, rounded once, at the store.
    Masked steps get what expert_out holds there, else 0.
    """
    row_tile, column_tile = swizzled_tile(num_rows, W, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, sequence, step, limit = find_segments(
        rows, num_rows, segments_per_sequence, length, SEGMENT_SIZE, D
    )
    offs_n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < W
    columns_n = offs_n.to(tl.int64)[None, :]
    offs_a = rows.to(tl.int64)[:, None] * K

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        ptrs = a_ptr + offs_a + offs_k[None, :]
        a = tl.load(ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_b_k + columns_n * stride_b_n
        b = tl.load(ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if a2_ptr is not None:
        # A loop of its own: two products into one accumulator in one loop miscompile on sm_10x.
        for k0 in range(0, K, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            ptrs = a2_ptr + offs_a + offs_k[None, :]
            a = tl.load(ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            ptrs = b2_ptr + offs_k.to(tl.int64)[:, None] * stride_b2_k + columns_n * stride_b2_n
            b = tl.load(ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    scale = tl.full((BLOCK_M,), 1.0, dtype=ACC)
    if logits_ptr is not None:
        scale /= 1.0 + tl.exp(-tl.load(logits_ptr + rows, mask=mask_m, other=0.0))
    dlogit = scale
    if dlogits_ptr is not None:
        dlogit = tl.load(dlogits_ptr + rows, mask=mask_m, other=0.0)
    flags = sequence * length + step
    base = sequence * stride_out_b + step.to(tl.int64) * stride_out_t
    _store_steps(
        acc, bias_ptr, vector_ptr if dlogits_ptr is not None else None, expert_out_ptr,
        padding_mask_ptr, y_ptr, scale, dlogit, flags, limit, base, column_tile * BLOCK_N,
        stride_out_k, stride_out_t, W, D, TOP_K, ACC, BLOCK_M, BLOCK_N,
    )  # fmt: skip
