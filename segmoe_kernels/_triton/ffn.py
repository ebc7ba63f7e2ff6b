"""One expert on rows: device functions that keep the hidden layer on chip."""

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import activate, activate_with_grad, dropout_scale


@triton.jit
def load_tile(ptr, e, rows, cols, num_rows, num_cols, stride_e, stride_row):
    """Return rows x cols of the matrix of expert e, 0 outside."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    # The expert goes into a scalar pointer: offsets inside one matrix fit 32 bits.
    base = ptr + e * stride_e
    return tl.load(base + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_bias(ptr, e, cols, num_cols, ACC: tl.constexpr):
    """Return the bias of expert e in ACC; zeros, never added, where there is none."""
    if ptr is not None:
        base = ptr + e * num_cols
        return tl.load(base + cols, mask=cols < num_cols, other=0.0).to(ACC)
    else:  # noqa: RET505  the branches are compile-time
        return tl.zeros((cols.shape[0],), dtype=ACC)


@triton.jit
def hidden_rows(
    x,  # (M, BLOCK_D)
    up,  # (BLOCK_F, BLOCK_D)
    gate,  # (BLOCK_F, BLOCK_D); anything where not GATED
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
    first_f=None,  # offs_f[0] where it's a multiple of BLOCK_F: cheaper dropout, same numbers
):
    """Return columns offs_f of the hidden layer after dropout, (M, BLOCK_F) in ACC."""
    # In 16 bits the rounding to x's dtype hides the error of the fast forms.
    FAST: tl.constexpr = x.dtype.primitive_bitwidth == 16
    hidden = tl.dot(x, tl.trans(up), input_precision=PRECISION, out_dtype=ACC)
    if UP_BIAS:
        hidden += up_bias[None, :]
    if GATED:
        opened = tl.dot(x, tl.trans(gate), input_precision=PRECISION, out_dtype=ACC)
        if GATE_BIAS:
            opened += gate_bias[None, :]
        hidden = activate(opened, ACTIVATION, FAST) * hidden
    else:
        hidden = activate(hidden, ACTIVATION, FAST)
    if seed_ptr is not None:
        hidden *= dropout_scale(tl.load(seed_ptr), row_ids, offs_f, F, dropout, ACC, first_f)
    return hidden


@triton.jit
def ffn_rows(
    x,  # (M, BLOCK_D)
    row_ids,  # (M,), what dropout counts by
    e,
    f_end,  # F, or 0 for rows without an expert
    up_ptr,
    gate_ptr,
    down_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    down_bias_ptr,
    seed_ptr,
    stride_up_e,
    stride_up_f,
    stride_gate_e,
    stride_gate_f,
    stride_down_e,
    stride_down_d,
    dropout,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return expert e of rows, (M, BLOCK_D) in ACC, BLOCK_F hidden columns at a time."""
    offs_d = tl.arange(0, BLOCK_D)
    out = tl.zeros((x.shape[0], BLOCK_D), dtype=ACC)
    WIDE: tl.constexpr = x.dtype.primitive_bitwidth > 16
    if down_bias_ptr is not None and not WIDE:
        # First, when the registers of the sum are free.
        bias = tl.load(down_bias_ptr + e * D + offs_d, mask=(offs_d < D) & (f_end > 0), other=0.0)
        out += bias.to(ACC)[None, :]
    for f0 in tl.range(0, f_end, BLOCK_F, disable_licm=True):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        up = load_tile(up_ptr, e, offs_f, offs_d, F, D, stride_up_e, stride_up_f)
        gate = up
        if gate_ptr is not None:
            gate = load_tile(gate_ptr, e, offs_f, offs_d, F, D, stride_gate_e, stride_gate_f)
        up_bias = load_bias(up_bias_ptr, e, offs_f, F, ACC)
        gate_bias = load_bias(gate_bias_ptr, e, offs_f, F, ACC)
        hidden = hidden_rows(
            x, up, gate, up_bias, gate_bias, seed_ptr, row_ids, offs_f, dropout, F,
            gate_ptr is not None, up_bias_ptr is not None, gate_bias_ptr is not None,
            ACTIVATION, ACC, PRECISION, f0,
        )  # fmt: skip
        down = load_tile(down_ptr, e, offs_d, offs_f, D, F, stride_down_e, stride_down_d)
        out = tl.dot(
            hidden.to(x.dtype), tl.trans(down), out, input_precision=PRECISION, out_dtype=ACC
        )
    if down_bias_ptr is not None and WIDE:
        bias = tl.load(down_bias_ptr + e * D + offs_d, mask=(offs_d < D) & (f_end > 0), other=0.0)
        out += bias.to(ACC)[None, :]
    return out


@triton.jit
def hidden_with_grads(
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
    first_f=None,  # as in hidden_rows
):
    """Return ``(hidden, dhidden, d_up_pre, d_gate_pre)``, (BLOCK_M, BLOCK_F) each, in ACC.

    hidden is after dropout; gradients lack the routing weight. d_gate_pre is d_up_pre where there
    is no gate.
    """
    FAST: tl.constexpr = x.dtype.primitive_bitwidth == 16
    dhidden = tl.dot(dy, down, input_precision=PRECISION, out_dtype=ACC)
    pre = tl.dot(x, tl.trans(up), input_precision=PRECISION, out_dtype=ACC)
    if UP_BIAS:
        pre += up_bias[None, :]
    if GATED:
        gate_pre = tl.dot(x, tl.trans(gate), input_precision=PRECISION, out_dtype=ACC)
        if GATE_BIAS:
            gate_pre += gate_bias[None, :]
        opened, slope = activate_with_grad(gate_pre, ACTIVATION, FAST)
        hidden = opened * pre
        slope = slope * pre
    else:
        hidden, slope = activate_with_grad(pre, ACTIVATION, FAST)
        opened = slope
    if seed_ptr is not None:
        scale = dropout_scale(tl.load(seed_ptr), row_ids, offs_f, F, dropout, ACC, first_f)
        hidden = hidden * scale
        slope = slope * scale
        opened = opened * scale
    return hidden, dhidden, dhidden * opened, dhidden * slope
