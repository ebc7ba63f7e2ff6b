"""Activations and dropout, as device functions of the accumulator's dtype (float32 or float64)."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return ``act(x)``; ``ACTIVATION`` is a name of `validation.ACTIVATIONS`, or "none"."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # noqa: RET505  the branches are compile-time
        # 0.5 * (1 + tanh(u)) == sigmoid(2 * u), which needs no tanh.
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        # Not a maximum: a NaN must come through.
        return tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return x


@triton.jit
def activate_with_grad(x, ACTIVATION: tl.constexpr):
    """Return ``(act(x), act'(x))``."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":  # noqa: RET505
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * gate, gate + x * gate * (1.0 - gate) * inner
    elif ACTIVATION == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        return x * gate, gate + x * gate * (1.0 - gate)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0).to(x.dtype)


@triton.jit
def dropout_scale(seed, rows, cols, width, p):
    """Return 0 with probability p, else ``1 / (1 - p)``; depends on seed, row and column only.

    Args:
        seed: int64 scalar.
        rows: (M,) int64, broadcast against cols.
        cols: (N,) int32.
        width: columns in a row.
        p: float32 scalar.
    """
    # 64-bit counters: rows * width passes 2**32 at real sizes, and Philox takes both halves.
    counters = rows[:, None] * width + cols[None, :]
    return tl.where(tl.rand(seed, counters) >= p, 1.0 / (1.0 - p), 0.0)
