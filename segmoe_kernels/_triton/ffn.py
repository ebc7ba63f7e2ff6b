"""One expert on rows: device functions that keep the hidden layer on chip."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import activate, activate_with_grad, dropout_scale


class Chunk(NamedTuple):
    """Parameters of BLOCK_F hidden columns of one expert, loaded.

    What an expert doesn't have is anything: Triton 3.6 returns no None from a function.
    """

    up: Any  # (BLOCK_F, BLOCK_D)
    gate: Any  # (BLOCK_F, BLOCK_D)
    down: Any  # (BLOCK_D, BLOCK_F)
    up_bias: Any  # (BLOCK_F,) in ACC
    gate_bias: Any  # (BLOCK_F,) in ACC


@triton.jit
def load_matrix(matrix, e, rows, cols, num_rows, num_cols):
    """Return rows x cols of the matrix of expert e, 0 outside."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    # The expert goes into a scalar pointer: offsets inside one matrix fit 32 bits.
    base = matrix.ptr + e * matrix.stride_e
    return tl.load(base + rows[:, None] * matrix.stride_row + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_bias(ptr, e, cols, num_cols, ACC: tl.constexpr):
    """Return the bias of expert e in ACC; zeros, never added, where there is none."""
    if ptr is not None:
        base = ptr + e * num_cols
        return tl.load(base + cols, mask=cols < num_cols, other=0.0).to(ACC)
    else:  # noqa: RET505  the branches are compile-time
        return tl.zeros((cols.shape[0],), dtype=ACC)


@triton.jit
def load_chunk(
    experts, e, offs_f, offs_d, D: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr,
    DOWN: tl.constexpr,
):  # fmt: skip
    """Return the `Chunk` of columns offs_f of expert e; forward loads down where it's needed."""
    up = load_matrix(experts.up, e, offs_f, offs_d, F, D)
    down = up
    if DOWN:
        down = load_matrix(experts.down, e, offs_d, offs_f, D, F)
    gate = up
    if experts.gate is not None:
        gate = load_matrix(experts.gate, e, offs_f, offs_d, F, D)
    up_bias = load_bias(experts.up_bias_ptr, e, offs_f, F, ACC)
    gate_bias = load_bias(experts.gate_bias_ptr, e, offs_f, F, ACC)
    return Chunk(up, gate, down, up_bias, gate_bias)


@triton.jit
def hidden_rows(
    x,  # (M, BLOCK_D)
    experts,
    chunk,
    dropout,
    row_ids,
    offs_f,
    first_f,  # offs_f[0], a multiple of BLOCK_F: cheaper dropout, same numbers
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return columns offs_f of the hidden layer after dropout, (M, BLOCK_F) in ACC."""
    # In 16 bits the rounding to x's dtype hides the error of the fast forms.
    FAST: tl.constexpr = x.dtype.primitive_bitwidth == 16
    hidden = tl.dot(x, tl.trans(chunk.up), input_precision=PRECISION, out_dtype=ACC)
    if experts.up_bias_ptr is not None:
        hidden += chunk.up_bias[None, :]
    if experts.gate is not None:
        opened = tl.dot(x, tl.trans(chunk.gate), input_precision=PRECISION, out_dtype=ACC)
        if experts.gate_bias_ptr is not None:
            opened += chunk.gate_bias[None, :]
        hidden = activate(opened, ACTIVATION, FAST) * hidden
    else:
        hidden = activate(hidden, ACTIVATION, FAST)
    if dropout.seed_ptr is not None:
        hidden *= dropout_scale(
            tl.load(dropout.seed_ptr), row_ids, offs_f, F, dropout.probability, ACC, first_f
        )
    return hidden


@triton.jit
def ffn_rows(
    x,  # (M, BLOCK_D)
    row_ids,  # (M,), what dropout counts by
    e,
    f_end,  # F, or 0 for rows without an expert
    experts,
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
    bias_ptr = experts.down_bias_ptr
    if bias_ptr is not None and not WIDE:
        # First, when the registers of the sum are free.
        bias = tl.load(bias_ptr + e * D + offs_d, mask=(offs_d < D) & (f_end > 0), other=0.0)
        out += bias.to(ACC)[None, :]
    for f0 in tl.range(0, f_end, BLOCK_F, disable_licm=True):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        chunk = load_chunk(experts, e, offs_f, offs_d, D, F, ACC, False)
        hidden = hidden_rows(
            x, experts, chunk, dropout, row_ids, offs_f, f0, F, ACTIVATION, ACC, PRECISION
        )
        down = load_matrix(experts.down, e, offs_d, offs_f, D, F)
        out = tl.dot(
            hidden.to(x.dtype), tl.trans(down), out, input_precision=PRECISION, out_dtype=ACC
        )
    if bias_ptr is not None and WIDE:
        bias = tl.load(bias_ptr + e * D + offs_d, mask=(offs_d < D) & (f_end > 0), other=0.0)
        out += bias.to(ACC)[None, :]
    return out


@triton.jit
def hidden_with_grads(
    x,  # (BLOCK_M, BLOCK_D)
    dy,  # (BLOCK_M, BLOCK_D), not yet times the routing weight
    experts,
    chunk,
    dropout,
    row_ids,
    offs_f,
    first_f,  # as in hidden_rows
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ``(hidden, dhidden, d_up_pre, d_gate_pre)``, (BLOCK_M, BLOCK_F) each, in ACC.

    hidden is after dropout; gradients lack the routing weight. d_gate_pre is d_up_pre where there
    is no gate.
    """
    FAST: tl.constexpr = x.dtype.primitive_bitwidth == 16
    dhidden = tl.dot(dy, chunk.down, input_precision=PRECISION, out_dtype=ACC)
    pre = tl.dot(x, tl.trans(chunk.up), input_precision=PRECISION, out_dtype=ACC)
    if experts.up_bias_ptr is not None:
        pre += chunk.up_bias[None, :]
    if experts.gate is not None:
        gate_pre = tl.dot(x, tl.trans(chunk.gate), input_precision=PRECISION, out_dtype=ACC)
        if experts.gate_bias_ptr is not None:
            gate_pre += chunk.gate_bias[None, :]
        opened, slope = activate_with_grad(gate_pre, ACTIVATION, FAST)
        hidden = opened * pre
        slope = slope * pre
    else:
        hidden, slope = activate_with_grad(pre, ACTIVATION, FAST)
        opened = slope
    if dropout.seed_ptr is not None:
        scale = dropout_scale(
            tl.load(dropout.seed_ptr), row_ids, offs_f, F, dropout.probability, ACC, first_f
        )
        hidden = hidden * scale
        slope = slope * scale
        opened = opened * scale
    return hidden, dhidden, dhidden * opened, dhidden * slope
