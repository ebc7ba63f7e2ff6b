"""What the router computes: device functions for pooling, logits, the choice, and its gradient."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import dropout_scale, read_option
from segmoe_kernels._triton.sequences import real_steps


class Segments(NamedTuple):
    """BLOCK_S segments of sequences."""

    sequence: Any
    first_step: Any
    mask: Any  # False for what isn't one


class Span(NamedTuple):
    """The real steps of BLOCK_S segments, as offsets in the segment."""

    count: Any
    first: Any
    last: Any


@triton.jit
def step_range(padding_mask_ptr, segments, length, SEGMENT_SIZE: tl.constexpr):
    """Return the `Span` of segments."""
    count = tl.zeros_like(segments.first_step).to(tl.int32)
    first = tl.full(segments.first_step.shape, SEGMENT_SIZE - 1, dtype=tl.int32)
    last = tl.zeros_like(count)
    for p in range(SEGMENT_SIZE):
        step = segments.first_step + p
        real = real_steps(padding_mask_ptr, segments.sequence, step, segments.mask, length)
        count += real.to(tl.int32)
        first = tl.minimum(first, tl.where(real, p, SEGMENT_SIZE - 1))
        last = tl.maximum(last, tl.where(real, p, 0))
    return Span(count, first, last)


@triton.jit
def load_steps(x, padding_mask_ptr, segments, p, offs_d, length, D: tl.constexpr):
    """Return ``(x, real)``: step p of each segment, (BLOCK_S, BLOCK_D), 0 where not real."""
    step = segments.first_step + p
    real = real_steps(padding_mask_ptr, segments.sequence, step, segments.mask, length)
    rows = segments.sequence.to(tl.int64) * x.stride_b + step.to(tl.int64) * x.stride_t
    ptrs = x.ptr + rows[:, None] + offs_d[None, :]
    return tl.load(ptrs, mask=real[:, None] & (offs_d < D)[None, :], other=0.0), real


@triton.jit
def pool(
    x,  # Rows (B, T, D)
    padding_mask_ptr,
    segments,
    span,
    offs_d,
    length,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    POOLING: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return columns offs_d of the pooled segments, (BLOCK_S, BLOCK_D) in ACC; not for "concat"."""
    start = float("-inf") if POOLING == "max" else 0.0
    pooled = tl.full((segments.first_step.shape[0], offs_d.shape[0]), start, dtype=ACC)
    for p in range(SEGMENT_SIZE):
        value, real = load_steps(x, padding_mask_ptr, segments, p, offs_d, length, D)
        value = value.to(ACC)
        if POOLING == "mean":
            pooled += value
        elif POOLING == "max":
            # Written out because tl.maximum drops a NaN, which must come through.
            better = real[:, None] & ((value > pooled) | (value != value))
            pooled = tl.where(better, value, pooled)
        elif POOLING == "first":
            pooled += tl.where((span.first == p)[:, None], value, 0.0)
        else:
            tl.static_assert(POOLING == "last", "unknown pooling")
            pooled += tl.where((span.last == p)[:, None], value, 0.0)
    if POOLING == "mean":
        pooled = pooled / tl.maximum(span.count, 1).to(ACC)[:, None]
    if POOLING == "max":
        pooled = tl.where((span.count > 0)[:, None], pooled, 0.0)
    return pooled


@triton.jit
def unpool_step(
    dpooled,  # (BLOCK_S, BLOCK_D)
    pooled,
    x,  # (BLOCK_S, BLOCK_D), step p
    real,
    p,
    span,
    open_max,  # (BLOCK_S, BLOCK_D) bool: no step before took the gradient of the maximum
    POOLING: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return ``(dx, open_max)``: what step p gets of the gradient of `pool`."""
    if POOLING == "mean":
        dx = dpooled / tl.maximum(span.count, 1).to(ACC)[:, None]
    elif POOLING == "max":
        value = x.to(ACC)
        same = (value == pooled) | ((value != value) & (pooled != pooled))
        hit = open_max & same & real[:, None]
        open_max = open_max & (hit == 0)
        dx = tl.where(hit, dpooled, 0.0)
    elif POOLING == "first":
        dx = tl.where((span.first == p)[:, None], dpooled, 0.0)
    else:
        tl.static_assert(POOLING == "last", "unknown pooling")
        dx = tl.where((span.last == p)[:, None], dpooled, 0.0)
    return dx, open_max


@triton.jit
def score_segments(
    x,  # Rows (B, T, D)
    padding_mask_ptr,
    router,
    segment,  # (BLOCK_S,)
    mask_s,
    segments_per_sequence,
    length,
    num_experts,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    POOLING: tl.constexpr,
    ACC: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return ``(logits, routed)`` of segments: (BLOCK_S, EXPERTS) in ACC, 0 where not routed."""
    CAUSAL: tl.constexpr = router.start_ptr is not None
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    sequence = segment // segments_per_sequence
    index = segment % segments_per_sequence
    own = Segments(sequence, index * SEGMENT_SIZE, mask_s)
    # A causal router looks at the segment before; the first one has none.
    seen = own
    if CAUSAL:
        seen = Segments(sequence, own.first_step - SEGMENT_SIZE, mask_s & (index > 0))
    if POOLING != "concat":
        span = step_range(padding_mask_ptr, seen, length, SEGMENT_SIZE)
    routed = mask_s
    if padding_mask_ptr is not None:
        routed = mask_s & (step_range(padding_mask_ptr, own, length, SEGMENT_SIZE).count > 0)

    logits = tl.zeros((segment.shape[0], EXPERTS), dtype=ACC)
    for d0 in range(0, D, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        # Where registers hold the operand, Triton 3.7 pipelines without a wait for wgmma: the next
        # steps would be loaded into registers that it still reads.
        for p in tl.range(
            SEGMENT_SIZE if POOLING == "concat" else 1, num_stages=1 if CAUSAL else None
        ):
            if POOLING == "concat":
                pooled, _real = load_steps(x, padding_mask_ptr, seen, p, offs_d, length, D)
            else:
                pooled = pool(
                    x, padding_mask_ptr, seen, span, offs_d, length, D, SEGMENT_SIZE, POOLING, ACC
                )
                # All but a mean are numbers of x's.
                if POOLING != "mean":
                    pooled = pooled.to(x.ptr.dtype.element_ty)
            if CAUSAL:
                start = tl.load(router.start_ptr + p * D + offs_d, mask=mask_d, other=0.0)
                start = start.to(pooled.dtype)
                pooled = tl.where((index == 0)[:, None], start[None, :], pooled)
            w = tl.load(
                router.weight_ptr + experts[:, None] * router.stride_row + p * D + offs_d[None, :],
                mask=mask_e[:, None] & mask_d[None, :],
                other=0.0,
            ).to(pooled.dtype)
            logits = tl.dot(pooled, tl.trans(w), logits, input_precision="ieee", out_dtype=ACC)
    return tl.where(routed[:, None], logits, 0.0), routed


@triton.jit
def choose_experts(
    logits,  # (BLOCK_S, EXPERTS)
    routed,
    segment,
    num_experts,
    temperature,
    dropout,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Return ``(probs, weights, rank)``, (BLOCK_S, EXPERTS) each; chosen is ``rank < TOP_K``.

    TOP_K times the largest that is left, the lowest index among equals; a NaN is largest. A
    segment that is not routed has ranks too, and probabilities of 0.
    """
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    temperature = read_option(temperature, logits.dtype)
    probs = _softmax(logits / temperature, mask_e)
    if dropout.seed_ptr is not None:
        seed, p = tl.load(dropout.seed_ptr), dropout.probability
        probs *= dropout_scale(seed, segment, experts, num_experts, p, logits.dtype)
    probs = tl.where(routed[:, None], probs, 0.0)
    key = tl.where(mask_e[None, :], tl.where(probs != probs, float("inf"), probs), -1.0)
    rank = tl.full(logits.shape, TOP_K, dtype=tl.int32)
    for k in range(TOP_K):
        best = tl.max(key, 1)
        chosen = tl.min(tl.where(key == best[:, None], experts[None, :], EXPERTS), 1)
        hit = experts[None, :] == chosen[:, None]
        rank = tl.where(hit, k, rank)
        key = tl.where(hit, -2.0, key)
    weights = probs
    if RENORMALIZE:
        total = tl.sum(tl.where(rank < TOP_K, probs, 0.0), 1)
        weights = probs / tl.where(total < 1e-6, 1e-6, total)[:, None]
    return probs, weights, rank


@triton.jit
def _softmax(logits, mask_e):
    """Softmax over axis 1; columns outside mask_e are 0."""
    logits = tl.where(mask_e[None, :], logits, float("-inf"))
    exp = tl.exp(logits - tl.max(logits, 1)[:, None])
    return exp / tl.sum(exp, 1)[:, None]


@triton.jit
def differentiate_choice(
    logits,  # (M, EXPERTS)
    selected,  # (M, EXPERTS) bool
    dweights,  # (M, EXPERTS), anything where not selected
    dprobs,  # (M, EXPERTS)
    segment,  # (M,) int64
    num_experts,
    temperature,
    dropout,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Return the gradient of the logits; the probabilities are computed anew from them."""
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    temperature = read_option(temperature, logits.dtype)
    probs = _softmax(logits / temperature, mask_e)
    scale = tl.full(logits.shape, 1.0, dtype=logits.dtype)
    if dropout.seed_ptr is not None:
        seed, p = tl.load(dropout.seed_ptr), dropout.probability
        scale *= dropout_scale(seed, segment, experts, num_experts, p, logits.dtype)
    if RENORMALIZE:
        kept = tl.where(selected, probs * scale, 0.0)
        total = tl.sum(kept, 1)
        clamped = tl.where(total < 1e-6, 1e-6, total)
        weights = kept / clamped[:, None]
        mean = tl.sum(dweights * weights, 1)
        # Below the clamp the divisor is a constant.
        mean = tl.where(total < 1e-6, 0.0, mean)
        dweights = (dweights - mean[:, None]) / clamped[:, None]
    dprobs = (dprobs + tl.where(selected, dweights, 0.0)) * scale
    inner = tl.sum(tl.where(mask_e[None, :], probs * dprobs, 0.0), 1)
    return probs * (dprobs - inner[:, None]) / temperature
