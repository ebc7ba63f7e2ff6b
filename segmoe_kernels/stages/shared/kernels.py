"""Kernels around PyTorch's matrix products of the shared expert; `launch` launches them.

A row is a whole segment, ``P * D`` columns. M is the number of segments, W = P * D, H = P * F.
"""

import triton.language as tl

from segmoe_kernels._triton.activations import activate, activate_with_grad, dropout_scale
from segmoe_kernels._triton.launch import kernel


@kernel
def shared_rows_kernel(
    x_ptr,  # (B, T, D)
    vector_ptr,  # (W,) or None
    padding_mask_ptr,  # (B, T) bool or None
    rows_ptr,  # (M, W) or None, every element is written
    along_ptr,  # (M,) in ACC or None, every element is written: rows times vector
    num_rows,
    segments_per_sequence,
    length,
    stride_x_b,
    stride_x_t,
    W: tl.constexpr,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Lay BLOCK_M segments out as rows, 0 where a step is missing or masked.

    Grid: ``(cdiv(M, BLOCK_M),)``.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    sequence = (rows // segments_per_sequence).to(tl.int64)
    step = (rows % segments_per_sequence) * SEGMENT_SIZE
    # How many of the columns lie inside the sequence.
    limit = tl.where(mask_m, tl.minimum(length - step, SEGMENT_SIZE) * D, 0)
    base = x_ptr + sequence * stride_x_b + step.to(tl.int64) * stride_x_t
    flags = sequence * length + step
    along = tl.zeros((BLOCK_M,), dtype=ACC)
    for n0 in range(0, W, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        offs = cols + (cols // D).to(tl.int64) * (stride_x_t - D)
        real = cols[None, :] < limit[:, None]
        if padding_mask_ptr is not None:
            ptrs = (padding_mask_ptr + flags)[:, None] + (cols // D)[None, :]
            real &= tl.load(ptrs, mask=real, other=0) != 0
        x = tl.load(base[:, None] + offs[None, :], mask=real, other=0.0)
        if vector_ptr is not None:
            vector = tl.load(vector_ptr + cols, mask=cols < W, other=0.0).to(ACC)
            along += tl.sum(x.to(ACC) * vector[None, :], 1)
        if rows_ptr is not None:
            out = rows_ptr + rows.to(tl.int64)[:, None] * W + cols[None, :]
            tl.store(out, x, mask=mask_m[:, None] & (cols < W)[None, :])
    if along_ptr is not None:
        tl.store(along_ptr + rows, along, mask=mask_m)


@kernel
def shared_activate_kernel(
    pre_ptr,  # (M, H)
    gate_pre_ptr,  # (M, H) or None
    up_bias_ptr,  # (H,) or None
    gate_bias_ptr,  # (H,) or None
    seed_ptr,  # (1,) int64 or None
    hidden_ptr,  # (M, H), every element is written; may be pre itself
    num_rows,
    dropout,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Biases, activation, gating and dropout of BLOCK_M rows and BLOCK_N columns.

    Grid: ``(cdiv(M, BLOCK_M) * cdiv(H, BLOCK_N),)``. Computed in ACC, rounded at the store.
    """
    pid = tl.program_id(0)
    column_tiles: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    rows = (pid // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = (pid % column_tiles) * BLOCK_N
    cols = first_n + tl.arange(0, BLOCK_N)
    long_rows = rows.to(tl.int64)
    mask = (rows < num_rows)[:, None] & (cols < H)[None, :]
    offs = long_rows[:, None] * H + cols[None, :]

    FAST: tl.constexpr = hidden_ptr.dtype.element_ty.primitive_bitwidth == 16
    pre = tl.load(pre_ptr + offs, mask=mask, other=0.0).to(ACC)
    if up_bias_ptr is not None:
        pre += tl.load(up_bias_ptr + cols, mask=cols < H, other=0.0).to(ACC)[None, :]
    if gate_pre_ptr is not None:
        gate_pre = tl.load(gate_pre_ptr + offs, mask=mask, other=0.0).to(ACC)
        if gate_bias_ptr is not None:
            gate_pre += tl.load(gate_bias_ptr + cols, mask=cols < H, other=0.0).to(ACC)[None, :]
        hidden = activate(gate_pre, ACTIVATION, FAST) * pre
    else:
        hidden = activate(pre, ACTIVATION, FAST)
    if seed_ptr is not None:
        hidden *= dropout_scale(tl.load(seed_ptr), long_rows, cols, H, dropout, ACC, first_n)
    tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@kernel
def shared_activate_bwd_kernel(
    dhidden_ptr,  # (M, H): before the opened gate
    pre_ptr,  # (M, H)
    gate_pre_ptr,  # (M, H) or None
    up_bias_ptr,  # (H,) or None
    gate_bias_ptr,  # (H,) or None
    logits_ptr,  # (M,) in ACC
    from_bias_ptr,  # (M,) in ACC or None: <dy, down_bias>
    seed_ptr,  # (1,) int64 or None
    hidden_ptr,  # (M, H), every element is written, as in all: hidden times the opened gate
    dpre_ptr,  # (M, H); may be dhidden itself
    dgate_ptr,  # (M, H) or None
    dlogits_ptr,  # (M,) in ACC
    dbias_ptr,  # (programs, H), or (programs, 2 * H) with gate_pre, in ACC, or None
    num_rows,
    dropout,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Go back through dropout, gating and activation for BLOCK_M whole rows, and the shared gate.

    Grid: ``(cdiv(M, BLOCK_M),)``. Computed in ACC, rounded at the store.
    """
    pid = tl.program_id(0)
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    long_rows = rows.to(tl.int64)
    opened = 1.0 / (1.0 + tl.exp(-tl.load(logits_ptr + rows, mask=mask_m, other=0.0)))
    FAST: tl.constexpr = hidden_ptr.dtype.element_ty.primitive_bitwidth == 16
    dopened = tl.zeros((BLOCK_M,), dtype=ACC)
    if from_bias_ptr is not None:
        dopened += tl.load(from_bias_ptr + rows, mask=mask_m, other=0.0)
    for n0 in range(0, H, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        mask_n = cols < H
        mask = mask_m[:, None] & mask_n[None, :]
        offs = long_rows[:, None] * H + cols[None, :]
        dhidden = tl.load(dhidden_ptr + offs, mask=mask, other=0.0).to(ACC)
        pre = tl.load(pre_ptr + offs, mask=mask, other=0.0).to(ACC)
        if up_bias_ptr is not None:
            pre += tl.load(up_bias_ptr + cols, mask=mask_n, other=0.0).to(ACC)[None, :]
        scale = tl.full((BLOCK_M, BLOCK_N), 1.0, dtype=ACC)
        if seed_ptr is not None:
            scale *= dropout_scale(tl.load(seed_ptr), long_rows, cols, H, dropout, ACC, n0)
        if gate_pre_ptr is not None:
            gate_pre = tl.load(gate_pre_ptr + offs, mask=mask, other=0.0).to(ACC)
            if gate_bias_ptr is not None:
                bias = tl.load(gate_bias_ptr + cols, mask=mask_n, other=0.0)
                gate_pre += bias.to(ACC)[None, :]
            active, slope = activate_with_grad(gate_pre, ACTIVATION, FAST)
            hidden = active * pre * scale
            dpre = dhidden * scale * active * opened[:, None]
            dgate = dhidden * scale * pre * slope * opened[:, None]
            tl.store(dgate_ptr + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        else:
            active, slope = activate_with_grad(pre, ACTIVATION, FAST)
            hidden = active * scale
            dpre = dhidden * scale * slope * opened[:, None]
        # The gradient of opened, without the product that made the output.
        dopened += tl.sum(dhidden * hidden, 1)
        hidden *= opened[:, None]
        tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        tl.store(dpre_ptr + offs, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            gates: tl.constexpr = 1 if gate_pre_ptr is None else 2
            out = dbias_ptr + pid.to(tl.int64) * (gates * H) + cols
            tl.store(out, tl.sum(dpre, 0), mask=mask_n)
            if gate_pre_ptr is not None:
                tl.store(out + H, tl.sum(dgate, 0), mask=mask_n)
    tl.store(dlogits_ptr + rows, dopened * opened * (1.0 - opened), mask=mask_m)


@kernel
def shared_dx_kernel(
    drows_ptr,  # (M, W) contiguous
    dlogits_ptr,  # (M,) in ACC
    vector_ptr,  # (W,): weight of the shared gate
    padding_mask_ptr,  # (B, T) bool or None
    dx_ptr,  # (B, T, D) contiguous, every element is written
    num_steps,
    segments_per_sequence,
    length,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Take BLOCK_M steps back out of the rows and add the gate's share; 0 where masked.

    Grid: ``(cdiv(B * T, BLOCK_M) * cdiv(D, BLOCK_D),)``.
    """
    pid = tl.program_id(0).to(tl.int64)
    column_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    steps = (pid // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = steps < num_steps
    mask_d = (cols < D)[None, :]
    real = inside
    if padding_mask_ptr is not None:
        real &= tl.load(padding_mask_ptr + steps, mask=inside, other=0) != 0
    step = steps % length
    row = (steps // length) * segments_per_sequence + step // SEGMENT_SIZE
    place = (step % SEGMENT_SIZE)[:, None] * D + cols[None, :]
    mask = real[:, None] & mask_d

    vector = tl.load(vector_ptr + place, mask=mask, other=0.0).to(ACC)
    dlogit = tl.load(dlogits_ptr + row, mask=real, other=0.0)
    drows = tl.load(
        drows_ptr + (row * (SEGMENT_SIZE * D))[:, None] + place, mask=mask, other=0.0
    ).to(ACC)
    dx = drows + dlogit[:, None] * vector
    ptrs = dx_ptr + steps[:, None] * D + cols[None, :]
    tl.store(ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & mask_d)


@kernel
def shared_reduce_kernel(
    partials_ptr,  # (num_partials, H), or (num_partials, 2 * H) with the gate's columns behind
    up_bias_ptr,  # (H,) or None, every element is written
    gate_bias_ptr,  # (H,) or None, every element is written
    num_partials,
    partial_size,
    H: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add up the sums of BLOCK columns in a fixed order, BLOCK_R of them at a time.

    Grid: ``(cdiv(partial size, BLOCK),)``. Rounded at the store.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < partial_size
    acc = tl.zeros((BLOCK_R, BLOCK), dtype=ACC)
    for first in range(0, num_partials, BLOCK_R):
        slots = first + tl.arange(0, BLOCK_R)
        ptrs = partials_ptr + slots.to(tl.int64)[:, None] * partial_size + offs[None, :]
        acc += tl.load(ptrs, mask=(slots < num_partials)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(acc, 0)
    if up_bias_ptr is not None:
        tl.store(up_bias_ptr + offs, total.to(up_bias_ptr.dtype.element_ty), mask=offs < H)
    if gate_bias_ptr is not None:
        total = total.to(gate_bias_ptr.dtype.element_ty)
        tl.store(gate_bias_ptr + offs - H, total, mask=mask & (offs >= H))
