"""Stage 3 of 4, kernels for widths whose row fits a program: the hidden layer stays on chip.

Rows are steps, grouped by expert through ``sorted_to_slot``. Forward: one kernel reads x once and
writes the weighted outputs. Backward: one kernel recomputes the hidden layer for the gradients of x
and of the routing weights, one for the weight gradients, which are split over rows into partial
sums and added up in a fixed order by `grouped_gemm`.
"""

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import activate, activate_with_grad, dropout_scale
from segmoe_kernels._triton.sequences import (
    find_group,
    find_steps,
    load_rows,
    place_steps,
    store_steps,
)


@triton.jit
def _load_tile(ptr, e, rows, cols, num_rows, num_cols, stride_e, stride_row):
    """Return rows x cols of the matrix of expert e, 0 outside."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    # The expert goes into a scalar pointer: offsets inside one matrix fit 32 bits.
    base = ptr + e * stride_e
    return tl.load(base + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _load_bias(ptr, e, cols, num_cols, ACC: tl.constexpr):
    """Return the bias of expert e in ACC; zeros, never added, where there is none."""
    if ptr is not None:
        base = ptr + e * num_cols
        return tl.load(base + cols, mask=cols < num_cols, other=0.0).to(ACC)
    else:  # noqa: RET505  the branches are compile-time
        return tl.zeros((cols.shape[0],), dtype=ACC)


@triton.jit
def expert_ffn_fwd_kernel(
    x_ptr,  # (top_k, B, T, D)
    topk_weights_ptr,  # (S, top_k)
    up_ptr,  # (E, F, D)
    gate_ptr,  # (E, F, D) or None
    down_ptr,  # (E, D, F)
    up_bias_ptr,  # (E, F) or None
    gate_bias_ptr,  # (E, F) or None
    down_bias_ptr,  # (E, D) or None
    out_ptr,  # (top_k, B, T, D) contiguous, every row is written
    sorted_to_slot_ptr,  # (R,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    padding_mask_ptr,  # (B, T) bool or None
    seed_ptr,  # (1,) int64 or None
    num_slots,
    segments_per_sequence,
    length,
    num_experts,
    stride_x_k,
    stride_x_b,
    stride_x_t,
    stride_up_e,
    stride_up_f,
    stride_gate_e,
    stride_gate_f,
    stride_down_e,
    stride_down_d,
    num_sequences,
    dropout,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
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
    pid = tl.program_id(0)
    expert, row_start, row_end = find_group(
        pid, expert_offsets_ptr, num_experts, num_slots, SEGMENT_SIZE, BLOCK_M, GROUPS
    )
    if expert > num_experts:
        return
    rows = row_start + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    slot, choice, sequence, step = find_steps(
        rows, mask_m, sorted_to_slot_ptr, segments_per_sequence, TOP_K, SEGMENT_SIZE, SEGMENT_SIZE
    )
    offs_d = tl.arange(0, BLOCK_D)
    e = expert.to(tl.int64)
    routed = mask_m & (expert < num_experts)
    x = load_rows(
        x_ptr, padding_mask_ptr, choice, sequence, step, routed, offs_d, D, length,
        stride_x_k, stride_x_b, stride_x_t, D, False,
    )  # fmt: skip
    weights = tl.load(topk_weights_ptr + slot, mask=routed, other=0.0).to(ACC)
    row_ids = slot * SEGMENT_SIZE + rows % SEGMENT_SIZE
    row, inside, real = place_steps(
        padding_mask_ptr, choice, sequence, step, mask_m, num_sequences, length
    )

    out = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    # Rows without an expert have no hidden layer: their outputs are 0.
    f_end = tl.where(expert < num_experts, F, 0)
    for f0 in range(0, f_end, BLOCK_F):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        w = _load_tile(up_ptr, e, offs_f, offs_d, F, D, stride_up_e, stride_up_f)
        hidden = tl.dot(x, tl.trans(w), input_precision=PRECISION, out_dtype=ACC)
        if up_bias_ptr is not None:
            hidden += _load_bias(up_bias_ptr, e, offs_f, F, ACC)[None, :]
        if gate_ptr is not None:
            w = _load_tile(gate_ptr, e, offs_f, offs_d, F, D, stride_gate_e, stride_gate_f)
            gate = tl.dot(x, tl.trans(w), input_precision=PRECISION, out_dtype=ACC)
            if gate_bias_ptr is not None:
                gate += _load_bias(gate_bias_ptr, e, offs_f, F, ACC)[None, :]
            hidden = activate(gate, ACTIVATION) * hidden
        else:
            hidden = activate(hidden, ACTIVATION)
        if seed_ptr is not None:
            hidden *= dropout_scale(tl.load(seed_ptr), row_ids, offs_f, F, dropout)
        w = _load_tile(down_ptr, e, offs_d, offs_f, D, F, stride_down_e, stride_down_d)
        out = tl.dot(hidden.to(x.dtype), tl.trans(w), out, input_precision=PRECISION, out_dtype=ACC)
    if down_bias_ptr is not None:
        bias = tl.load(down_bias_ptr + e * D + offs_d, mask=(offs_d < D) & (f_end > 0), other=0.0)
        out += bias.to(ACC)[None, :]
    store_steps(out_ptr, out * weights[:, None], row, inside, real, offs_d, D)


@triton.jit
def _hidden_with_grads(
    x,  # (BLOCK_M, BLOCK_D)
    dy,  # (BLOCK_M, BLOCK_D), not yet times the routing weight
    up,  # (BLOCK_F, BLOCK_D)
    gate,  # (BLOCK_F, BLOCK_D); anything where not GATED
    down,  # (BLOCK_D, BLOCK_F)
    up_bias,  # (BLOCK_F,); anything where not UP_BIAS
    gate_bias,  # (BLOCK_F,); anything where not GATE_BIAS
    seed_ptr,  # (1,) int64 or None
    row_ids,
    offs_f,
    dropout,
    F: tl.constexpr,
    GATED: tl.constexpr,
    UP_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ``(hidden, dhidden, d_up_pre, d_gate_pre)``, (BLOCK_M, BLOCK_F) each, in ACC.

    hidden is after dropout; gradients lack the routing weight. d_gate_pre is d_up_pre where there
    is no gate.
    """
    dhidden = tl.dot(dy, down, input_precision=PRECISION, out_dtype=ACC)
    pre = tl.dot(x, tl.trans(up), input_precision=PRECISION, out_dtype=ACC)
    if UP_BIAS:
        pre += up_bias[None, :]
    if GATED:
        gate_pre = tl.dot(x, tl.trans(gate), input_precision=PRECISION, out_dtype=ACC)
        if GATE_BIAS:
            gate_pre += gate_bias[None, :]
        opened, slope = activate_with_grad(gate_pre, ACTIVATION)
        hidden = opened * pre
        slope = slope * pre
    else:
        hidden, slope = activate_with_grad(pre, ACTIVATION)
        opened = slope
    if seed_ptr is not None:
        scale = dropout_scale(tl.load(seed_ptr), row_ids, offs_f, F, dropout).to(ACC)
        hidden = hidden * scale
        slope = slope * scale
        opened = opened * scale
    return hidden, dhidden, dhidden * opened, dhidden * slope


@triton.jit
def expert_ffn_dx_kernel(
    x_ptr,  # (top_k, B, T, D)
    dy_ptr,  # (top_k, B, T, D)
    topk_weights_ptr,  # (S, top_k)
    up_ptr,  # (E, F, D)
    gate_ptr,  # (E, F, D) or None
    down_ptr,  # (E, D, F)
    up_bias_ptr,  # (E, F) or None
    gate_bias_ptr,  # (E, F) or None
    down_bias_ptr,  # (E, D) or None
    dx_ptr,  # (top_k, B, T, D) contiguous or None, every row is written
    drow_weights_ptr,  # (R, P) by slot, every element is written
    sorted_to_slot_ptr,  # (R,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    padding_mask_ptr,  # (B, T) bool or None
    seed_ptr,  # (1,) int64 or None
    num_slots,
    segments_per_sequence,
    length,
    num_experts,
    stride_x_k,
    stride_x_b,
    stride_x_t,
    stride_dy_k,
    stride_dy_b,
    stride_dy_t,
    stride_up_e,
    stride_up_f,
    stride_gate_e,
    stride_gate_f,
    stride_down_e,
    stride_down_d,
    num_sequences,
    dropout,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
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
    pid = tl.program_id(0)
    expert, row_start, row_end = find_group(
        pid, expert_offsets_ptr, num_experts, num_slots, SEGMENT_SIZE, BLOCK_M, GROUPS
    )
    if expert > num_experts:
        return
    rows = row_start + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    slot, choice, sequence, step = find_steps(
        rows, mask_m, sorted_to_slot_ptr, segments_per_sequence, TOP_K, SEGMENT_SIZE, SEGMENT_SIZE
    )
    offs_d = tl.arange(0, BLOCK_D)
    e = expert.to(tl.int64)
    routed = mask_m & (expert < num_experts)
    x = load_rows(
        x_ptr, padding_mask_ptr, choice, sequence, step, routed, offs_d, D, length,
        stride_x_k, stride_x_b, stride_x_t, D, False,
    )  # fmt: skip
    dy = load_rows(
        dy_ptr, padding_mask_ptr, choice, sequence, step, routed, offs_d, D, length,
        stride_dy_k, stride_dy_b, stride_dy_t, D, False,
    )  # fmt: skip
    weights = tl.load(topk_weights_ptr + slot, mask=routed, other=0.0).to(ACC)
    row_ids = slot * SEGMENT_SIZE + rows % SEGMENT_SIZE
    row, inside, real = place_steps(
        padding_mask_ptr, choice, sequence, step, mask_m, num_sequences, length
    )

    dx = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    dweight = tl.zeros((BLOCK_M,), dtype=ACC)
    f_end = tl.where(expert < num_experts, F, 0)
    for f0 in range(0, f_end, BLOCK_F):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        up = _load_tile(up_ptr, e, offs_f, offs_d, F, D, stride_up_e, stride_up_f)
        down = _load_tile(down_ptr, e, offs_d, offs_f, D, F, stride_down_e, stride_down_d)
        gate = up
        if gate_ptr is not None:
            gate = _load_tile(gate_ptr, e, offs_f, offs_d, F, D, stride_gate_e, stride_gate_f)
        up_bias = _load_bias(up_bias_ptr, e, offs_f, F, ACC)
        gate_bias = _load_bias(gate_bias_ptr, e, offs_f, F, ACC)
        hidden, dhidden, dpre, dgate = _hidden_with_grads(
            x, dy, up, gate, down, up_bias, gate_bias, seed_ptr, row_ids, offs_f, dropout, F,
            gate_ptr is not None, up_bias_ptr is not None, gate_bias_ptr is not None,
            ACTIVATION, ACC, PRECISION,
        )  # fmt: skip
        dweight += tl.sum(dhidden * hidden, 1)
        if dx_ptr is not None:
            dpre = (dpre * weights[:, None]).to(x.dtype)
            dx = tl.dot(dpre, up, dx, input_precision=PRECISION, out_dtype=ACC)
            if gate_ptr is not None:
                dgate = (dgate * weights[:, None]).to(x.dtype)
                dx = tl.dot(dgate, gate, dx, input_precision=PRECISION, out_dtype=ACC)
    if down_bias_ptr is not None:
        bias = tl.load(down_bias_ptr + e * D + offs_d, mask=(offs_d < D) & (f_end > 0), other=0.0)
        dweight += tl.sum(dy.to(ACC) * bias.to(ACC)[None, :], 1)
    tl.store(drow_weights_ptr + row_ids, dweight, mask=mask_m)
    if dx_ptr is not None:
        store_steps(dx_ptr, dx, row, inside, real, offs_d, D)


@triton.jit
def expert_ffn_dw_kernel(
    x_ptr,  # (top_k, B, T, D)
    dy_ptr,  # (top_k, B, T, D)
    topk_weights_ptr,  # (S, top_k)
    up_ptr,  # (E, F, D)
    gate_ptr,  # (E, F, D) or None
    down_ptr,  # (E, D, F)
    up_bias_ptr,  # (E, F) or None
    gate_bias_ptr,  # (E, F) or None
    partials_ptr,  # (splits + E - 1, up | down | gate | biases), slots that are read are written
    sorted_to_slot_ptr,  # (R,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    padding_mask_ptr,  # (B, T) bool or None
    seed_ptr,  # (1,) int64 or None
    segments_per_sequence,
    length,
    num_experts,
    num_splits,
    partial_size,
    stride_x_k,
    stride_x_b,
    stride_x_t,
    stride_dy_k,
    stride_dy_b,
    stride_dy_t,
    stride_up_e,
    stride_up_f,
    stride_gate_e,
    stride_gate_f,
    stride_down_e,
    stride_down_d,
    dropout,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Partial weight gradients of a run of tiles, for BLOCK_F hidden columns.

    Grid: ``(splits, cdiv(F, BLOCK_F))``. Split i owns tiles ``[i * tiles // splits, ...)`` of all
    rows grouped by expert; its sum for expert e goes to slot ``i + e``, which no other pair uses.
    """
    split = tl.program_id(0)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_d = tl.arange(0, BLOCK_D)
    mask_f = offs_f < F
    mask_d = offs_d < D
    total = split * 0
    for expert in range(num_experts):
        lo = tl.load(expert_offsets_ptr + expert) * SEGMENT_SIZE
        hi = tl.load(expert_offsets_ptr + expert + 1) * SEGMENT_SIZE
        total += (hi - lo + BLOCK_M - 1) // BLOCK_M
    # 64 bits: the product of splits and tiles.
    first = (split.to(tl.int64) * total // num_splits).to(tl.int32)
    last = ((split + 1).to(tl.int64) * total // num_splits).to(tl.int32)
    before = split * 0
    for expert in range(num_experts):
        lo = tl.load(expert_offsets_ptr + expert) * SEGMENT_SIZE
        hi = tl.load(expert_offsets_ptr + expert + 1) * SEGMENT_SIZE
        tiles = (hi - lo + BLOCK_M - 1) // BLOCK_M
        start = tl.maximum(first, before)
        stop = tl.minimum(last, before + tiles)
        if start < stop:
            e = (split * 0 + expert).to(tl.int64)
            up = _load_tile(up_ptr, e, offs_f, offs_d, F, D, stride_up_e, stride_up_f)
            down = _load_tile(down_ptr, e, offs_d, offs_f, D, F, stride_down_e, stride_down_d)
            gate = up
            if gate_ptr is not None:
                gate = _load_tile(gate_ptr, e, offs_f, offs_d, F, D, stride_gate_e, stride_gate_f)
            up_bias = _load_bias(up_bias_ptr, e, offs_f, F, ACC)
            gate_bias = _load_bias(gate_bias_ptr, e, offs_f, F, ACC)
            dup = tl.zeros((BLOCK_F, BLOCK_D), dtype=ACC)
            ddown = tl.zeros((BLOCK_D, BLOCK_F), dtype=ACC)
            dgate = tl.zeros((BLOCK_F, BLOCK_D), dtype=ACC)
            dup_bias = tl.zeros((BLOCK_F,), dtype=ACC)
            dgate_bias = tl.zeros((BLOCK_F,), dtype=ACC)
            ddown_bias = tl.zeros((BLOCK_D,), dtype=ACC)
            for tile in range(start, stop):
                rows = lo + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
                mask_m = rows < hi
                slot, choice, sequence, step = find_steps(
                    rows, mask_m, sorted_to_slot_ptr, segments_per_sequence, TOP_K, SEGMENT_SIZE,
                    SEGMENT_SIZE,
                )  # fmt: skip
                x = load_rows(
                    x_ptr, padding_mask_ptr, choice, sequence, step, mask_m, offs_d, D, length,
                    stride_x_k, stride_x_b, stride_x_t, D, False,
                )  # fmt: skip
                dy = load_rows(
                    dy_ptr, padding_mask_ptr, choice, sequence, step, mask_m, offs_d, D, length,
                    stride_dy_k, stride_dy_b, stride_dy_t, D, False,
                )  # fmt: skip
                weights = tl.load(topk_weights_ptr + slot, mask=mask_m, other=0.0).to(ACC)
                row_ids = slot * SEGMENT_SIZE + rows % SEGMENT_SIZE
                hidden, _dhidden, dpre, dgate_pre = _hidden_with_grads(
                    x, dy, up, gate, down, up_bias, gate_bias, seed_ptr, row_ids, offs_f, dropout,
                    F, gate_ptr is not None, up_bias_ptr is not None, gate_bias_ptr is not None,
                    ACTIVATION, ACC, PRECISION,
                )  # fmt: skip
                hidden = (hidden * weights[:, None]).to(x.dtype)
                dpre = dpre * weights[:, None]
                dup = tl.dot(
                    tl.trans(dpre.to(x.dtype)), x, dup, input_precision=PRECISION, out_dtype=ACC
                )
                ddown = tl.dot(
                    tl.trans(dy), hidden, ddown, input_precision=PRECISION, out_dtype=ACC
                )
                if gate_ptr is not None:
                    dgate_pre = dgate_pre * weights[:, None]
                    dgate = tl.dot(
                        tl.trans(dgate_pre.to(x.dtype)), x, dgate, input_precision=PRECISION,
                        out_dtype=ACC,
                    )  # fmt: skip
                if HAS_BIAS:
                    dup_bias += tl.sum(dpre, 0)
                    ddown_bias += tl.sum(dy.to(ACC) * weights[:, None], 0)
                    if gate_ptr is not None:
                        dgate_bias += tl.sum(dgate_pre, 0)
            out = partials_ptr + (split + expert).to(tl.int64) * partial_size
            mask_fd = mask_f[:, None] & mask_d[None, :]
            offs_fd = offs_f[:, None] * D + offs_d[None, :]
            tl.store(out + offs_fd, dup, mask=mask_fd)
            out += F * D
            tl.store(
                out + offs_d[:, None] * F + offs_f[None, :], ddown,
                mask=mask_d[:, None] & mask_f[None, :],
            )  # fmt: skip
            out += F * D
            if gate_ptr is not None:
                tl.store(out + offs_fd, dgate, mask=mask_fd)
                out += F * D
            if HAS_BIAS:
                tl.store(out + offs_f, dup_bias, mask=mask_f)
                out += F
                # Every chunk of F has the same sum; the first one stores it.
                tl.store(out + offs_d, ddown_bias, mask=mask_d & (tl.program_id(1) == 0))
                out += D
                if gate_ptr is not None:
                    tl.store(out + offs_f, dgate_bias, mask=mask_f)
        before += tiles
