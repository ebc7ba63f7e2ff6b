"""Kernels around PyTorch's matrix products of the shared expert; `launch` launches them.

A row is a whole segment, ``P * D`` columns. M is the number of segments, W = P * D, H = P * F.
"""

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import activate, activate_with_grad, dropout_scale
from segmoe_kernels._triton.launch import kernel
from segmoe_kernels._triton.partials import store_sum


@kernel
def shared_rows_kernel(
    x_rows,  # Rows (B, T, D)
    vector_ptr,  # (W,) or None
    padding_mask_ptr,  # (B, T) bool or None
    rows_ptr,  # (M, W) or None, every element is written
    along_ptr,  # (M,) in ACC or None, every element is written: rows times vector
    num_rows,
    segments_per_sequence,
    length,
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
    base = x_rows.ptr + sequence * x_rows.stride_b + step.to(tl.int64) * x_rows.stride_t
    flags = sequence * length + step
    along = tl.zeros((BLOCK_M,), dtype=ACC)
    for n0 in range(0, W, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        offs = cols + (cols // D).to(tl.int64) * (x_rows.stride_t - D)
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
    pre,
    hidden_ptr,  # (M, H), every element is written; may be pre.up_ptr itself
    dropout,
    num_rows,
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
    up = _load_pre(pre.up_ptr, pre.up_bias_ptr, offs, mask, cols, H, ACC)
    if pre.gate_ptr is not None:
        gate = _load_pre(pre.gate_ptr, pre.gate_bias_ptr, offs, mask, cols, H, ACC)
        hidden = activate(gate, ACTIVATION, FAST) * up
    else:
        hidden = activate(up, ACTIVATION, FAST)
    if dropout.seed_ptr is not None:
        seed = tl.load(dropout.seed_ptr)
        hidden *= dropout_scale(seed, long_rows, cols, H, dropout.probability, ACC, first_n, SIDE=1)
    store_sum(hidden_ptr, offs, hidden, mask)


@triton.jit
def _load_pre(ptr, bias_ptr, offs, mask, cols, H: tl.constexpr, ACC: tl.constexpr):
    """Return a tile of what the activation sees, with its bias, in ACC."""
    pre = tl.load(ptr + offs, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        pre += tl.load(bias_ptr + cols, mask=cols < H, other=0.0).to(ACC)[None, :]
    return pre


@kernel
def shared_activate_bwd_kernel(
    dhidden_ptr,  # (M, H): before the opened gate
    pre,
    logits_ptr,  # (M,) in ACC
    from_bias_ptr,  # (M,) in ACC or None: <dy, down_bias>
    kept,  # Kept, every element is written, as in all; dpre may be dhidden itself
    dlogits_ptr,  # (M,) in ACC
    dbias_ptr,  # (programs, H), or (programs, 2 * H) with a gate, in ACC, or None
    dropout,
    num_rows,
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
    FAST: tl.constexpr = kept.hidden_ptr.dtype.element_ty.primitive_bitwidth == 16
    dopened = tl.zeros((BLOCK_M,), dtype=ACC)
    if from_bias_ptr is not None:
        dopened += tl.load(from_bias_ptr + rows, mask=mask_m, other=0.0)
    for n0 in range(0, H, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        mask_n = cols < H
        mask = mask_m[:, None] & mask_n[None, :]
        offs = long_rows[:, None] * H + cols[None, :]
        dhidden = tl.load(dhidden_ptr + offs, mask=mask, other=0.0).to(ACC)
        up = _load_pre(pre.up_ptr, pre.up_bias_ptr, offs, mask, cols, H, ACC)
        scale = tl.full((BLOCK_M, BLOCK_N), 1.0, dtype=ACC)
        if dropout.seed_ptr is not None:
            seed = tl.load(dropout.seed_ptr)
            scale *= dropout_scale(seed, long_rows, cols, H, dropout.probability, ACC, n0, SIDE=1)
        if pre.gate_ptr is not None:
            gate = _load_pre(pre.gate_ptr, pre.gate_bias_ptr, offs, mask, cols, H, ACC)
            active, slope = activate_with_grad(gate, ACTIVATION, FAST)
            hidden = active * up * scale
            dpre = dhidden * scale * active * opened[:, None]
            dgate = dhidden * scale * up * slope * opened[:, None]
            store_sum(kept.dgate_ptr, offs, dgate, mask)
        else:
            active, slope = activate_with_grad(up, ACTIVATION, FAST)
            hidden = active * scale
            dpre = dhidden * scale * slope * opened[:, None]
        # The gradient of opened, without the product that made the output.
        dopened += tl.sum(dhidden * hidden, 1)
        hidden *= opened[:, None]
        store_sum(kept.hidden_ptr, offs, hidden, mask)
        store_sum(kept.dpre_ptr, offs, dpre, mask)
        if dbias_ptr is not None:
            gates: tl.constexpr = 1 if pre.gate_ptr is None else 2
            out = dbias_ptr + pid.to(tl.int64) * (gates * H) + cols
            tl.store(out, tl.sum(dpre, 0), mask=mask_n)
            if pre.gate_ptr is not None:
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
