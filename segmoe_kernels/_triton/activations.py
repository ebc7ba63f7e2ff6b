"""Activations and dropout, as device functions of the accumulator's dtype (float32 or float64).

With ``FAST`` an activation costs about half the instructions; it's meant for float32 values that
are rounded to 16 bits afterwards, which its error doesn't reach. NaN and infinities come out as
without it. Fused multiply-adds are spelled out, because newer Tritons don't fuse on their own.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The interpreter has no libdevice; it is chosen when functions are decorated, so here too.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _divide(x, y):
    """Return ``x / y`` to 2 ulp in one reciprocal and one product; 0 where ``y > 2**126``.

    ``/`` takes 6 instructions more on NVIDIA, where it scales its operands, and 10 on AMD.
    """
    if _INTERPRETED:
        return x / y
    else:  # noqa: RET505  the branches are compile-time
        return libdevice.fast_dividef(x, y)


@triton.jit
def _normal_cdf(x):
    """Return the distribution function of the normal law and ``exp(-x**2 / 2)``, float32.

    The form is Abramowitz & Stegun's 7.1.26, ``erfc(z) = (a1 t + a2 t**2 + ...) exp(-z**2)``, but
    with ``t = 1 / sqrt(1 + a |x| + b x**2)`` in place of ``1 / (1 + p z)``: a reciprocal square
    root is one instruction everywhere, and with the second parameter four terms do better than
    their five. All six numbers are a minimax fit on ``0 <= x <= 10``. Error: below 4e-7, and below
    1.4e-4 of the lower tail, down to x = -9, where ``1 + erf`` has no digit left from -5.5 on.
    """
    # sqrt(log2(e) / 2), so that exp(-x**2 / 2) == 2**-(w * w).
    w = tl.abs(x) * 0.8493218002880191
    t = tl.rsqrt(tl.fma(w, tl.fma(w, 0.16152836382389069, 0.7506858706474304), 1.0))
    terms = tl.fma(t, 0.1616821140050888, 0.06284377723932266)
    terms = t * tl.fma(t, tl.fma(t, terms, 0.14066442847251892), 0.13480941951274872)
    bell = tl.exp2(-(w * w))
    # |0 - tail| or |1 - tail|: choosing a constant leaves the difference to the multiply-add.
    return tl.abs(tl.fma(-terms, bell, tl.where(x < 0, 0.0, 1.0))), bell


@triton.jit
def _gelu_tanh_exponent(x):
    """Return ``-1.5957691216057308 * log2(e) * (x + 0.044715 * x**3)``."""
    return x * tl.fma(x * x, -0.1029432395800235, -2.302208198144325)


@triton.jit
def _activate_fast(x, ACTIVATION: tl.constexpr):
    """Return ``act(x)`` of float32, for a result that is rounded to 16 bits."""
    tl.static_assert(x.dtype == tl.float32, "FAST needs float32")
    if ACTIVATION == "gelu":
        cdf, _bell = _normal_cdf(x)
        return x * cdf
    elif ACTIVATION == "gelu_tanh":  # noqa: RET505  the branches are compile-time
        return _divide(x, 1.0 + tl.exp2(_gelu_tanh_exponent(x)))
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        return _divide(x, 1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def _activate_with_grad_fast(x, ACTIVATION: tl.constexpr):
    """Return ``(act(x), act'(x))`` of float32, for results that are rounded to 16 bits."""
    tl.static_assert(x.dtype == tl.float32, "FAST needs float32")
    if ACTIVATION == "gelu":
        cdf, bell = _normal_cdf(x)
        return x * cdf, tl.fma(x * 0.3989422804014327, bell, cdf)
    elif ACTIVATION == "gelu_tanh":  # noqa: RET505
        gate = _divide(1.0, 1.0 + tl.exp2(_gelu_tanh_exponent(x)))
        value = x * gate
        inner = tl.fma(x * x, 0.21406444881780073, 1.5957691216057308)
        return value, tl.fma(value * (1.0 - gate), inner, gate)
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        gate = _divide(1.0, 1.0 + tl.exp2(-1.4426950408889634 * x))
        value = x * gate
        return value, tl.fma(value, 1.0 - gate, gate)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr = False):
    """Return ``act(x)``.

    Args:
        x: float32 or float64.
        ACTIVATION: a name of `segmoe_kernels.activations.ACTIVATIONS`, or "none".
        FAST: x is float32 and what is made of the result is rounded to 16 bits.
    """
    if ACTIVATION == "none":
        return x
    elif ACTIVATION == "relu":  # noqa: RET505  the branches are compile-time
        # Not a maximum: a NaN must come through.
        return tl.where(x < 0, 0.0, x)
    elif FAST:
        return _activate_fast(x, ACTIVATION)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) == sigmoid(2 * u), which needs no tanh.
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        return x / (1.0 + tl.exp(-x))


@triton.jit
def activate_with_grad(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr = False):
    """Return ``(act(x), act'(x))``; arguments as of `activate`, without "none"."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0).to(x.dtype)
    elif FAST:  # noqa: RET505
        return _activate_with_grad_fast(x, ACTIVATION)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * gate, gate + x * gate * (1.0 - gate) * inner
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        gate = 1.0 / (1.0 + tl.exp(-x))
        return x * gate, gate + x * gate * (1.0 - gate)


@triton.jit
def read_option(value, ACC: tl.constexpr):
    """Return a float option in ACC; `launch.exact` passes those of float64 as their bits."""
    if ACC == tl.float64:  # noqa: SIM300  a parameter
        return value.to(tl.int64).to(tl.float64, bitcast=True)
    else:  # noqa: RET505  the branches are compile-time
        return value


@triton.jit
def dropout_scale(
    seed, rows, cols, width, p, ACC: tl.constexpr, first=None, SIDE: tl.constexpr = 4
):
    """Return 0 with probability p, else ``1 / (1 - p)``, (M, N) in ACC.

    An element depends on seed, row, column and width only, not on the tile it's computed in. p is
    met to within 2**-16: each element takes 16 bits of Philox 4x32 with 7 rounds, the fewest that
    pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    One call of Philox, whose counter is (column group, row's two halves, width), makes 8 elements:
    in each run of ``8 * SIDE`` columns, group g owns ``2 * (SIDE * i + g) + j``, in half j of word
    i. With 4 groups side by side those are the columns that one thread holds of a row of an mma or
    wgmma accumulator, with 1 those that it loads, so nothing moves between threads. No ``tl.join``:
    one before a dot costs the dot's operand a conversion (sm_80).

    Args:
        seed: int64 scalar.
        rows: (M,) int64, broadcast against cols.
        cols: (N,) int32.
        width: columns in a row; rows of another width get other numbers.
        p: scalar below 1, as `launch.exact` passes it.
        ACC: float32 or float64.
        first: where ``cols == first + arange(0, N)`` and N, a power of two and at least 16, divides
            first: that column. Without it the numbers are the same, but which elements share a
            call is left to the compiler: it sees that on NVIDIA, not on AMD.
        SIDE: groups side by side; other than 4 only with first.
    """
    M: tl.constexpr = rows.shape[0]
    N: tl.constexpr = cols.shape[0]
    if first is None:
        group = (cols // 32 * 4 + cols % 8 // 2).to(tl.uint32)
        word = (cols % 32 // 8)[None, :]
        half = (cols % 2)[None, :]
    else:
        tl.static_assert(N >= 16, "first needs 16 columns")
        # A tile of 16 columns throws half of the words away.
        WORDS: tl.constexpr = 4 if N >= 32 or SIDE == 1 else 2
        RUNS: tl.constexpr = N // (2 * SIDE * WORDS)
        group = (first // (8 * SIDE) * SIDE + tl.arange(0, SIDE * RUNS)).to(tl.uint32)
        word = tl.arange(0, WORDS)
        if WORDS == 2:
            word += first % 32 // 8
        word = tl.reshape(word, (1, 1, WORDS, 1, 1))
        half = tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 2))
    zeros = tl.zeros((M, group.shape[0]), dtype=tl.uint32)
    r0, r1, r2, r3 = tl.philox(
        seed,
        zeros + group[None, :],
        zeros + rows.to(tl.uint32)[:, None],
        zeros + (rows.to(tl.int64) >> 32).to(tl.uint32)[:, None],
        zeros + width,
        n_rounds=7,
    )
    if first is not None:
        r0 = tl.reshape(r0, (M, RUNS, 1, SIDE, 1))
        r1 = tl.reshape(r1, (M, RUNS, 1, SIDE, 1))
        r2 = tl.reshape(r2, (M, RUNS, 1, SIDE, 1))
        r3 = tl.reshape(r3, (M, RUNS, 1, SIDE, 1))
    bits = tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))
    bits = tl.reshape(bits << (16 - 16 * half).to(tl.uint32), (M, N))
    # The interpreter passes a Python float.
    p = read_option(p, ACC) + tl.zeros((1, 1), dtype=ACC)
    # Compared in the upper half. Never 2**32, which would wrap around and drop nothing.
    threshold = tl.minimum((p * 65536.0 + 0.5).to(tl.uint32), 65535) << 16
    return tl.where(bits >= threshold, 1.0 / (1.0 - p), 0.0)
