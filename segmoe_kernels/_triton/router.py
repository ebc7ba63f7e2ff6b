"""What the router computes: device functions for pooling, logits, the choice, and its gradient."""

import triton
import triton.language as tl

from segmoe_kernels._triton.activations import dropout_scale, read_option
from segmoe_kernels._triton.sequences import real_steps


@triton.jit
def step_range(
    padding_mask_ptr,
    sequence,
    first_step,
    mask_s,
    length,
    SEGMENT_SIZE: tl.constexpr,
):
    """Return ``(count, first, last)`` of the real steps of segments, as offsets in the segment."""
    count = tl.zeros_like(first_step).to(tl.int32)
    first = tl.full(first_step.shape, SEGMENT_SIZE - 1, dtype=tl.int32)
    last = tl.zeros_like(count)
    for p in range(SEGMENT_SIZE):
        real = real_steps(padding_mask_ptr, sequence, first_step + p, mask_s, length)
        count += real.to(tl.int32)
        first = tl.minimum(first, tl.where(real, p, SEGMENT_SIZE - 1))
        last = tl.maximum(last, tl.where(real, p, 0))
    return count, first, last


@triton.jit
def load_steps(
    x_ptr,
    padding_mask_ptr,
    sequence,
    step,
    mask_s,
    offs_d,
    length,
    stride_x_b,
    stride_x_t,
    D: tl.constexpr,
):
    """Return ``(x, real)``: one step of each segment, (BLOCK_S, BLOCK_D), 0 where not real."""
    real = real_steps(padding_mask_ptr, sequence, step, mask_s, length)
    rows = sequence.to(tl.int64) * stride_x_b + step.to(tl.int64) * stride_x_t
    ptrs = x_ptr + rows[:, None] + offs_d[None, :]
    return tl.load(ptrs, mask=real[:, None] & (offs_d < D)[None, :], other=0.0), real


@triton.jit
def pool(
    x_ptr,
    padding_mask_ptr,
    sequence,
    first_step,
    mask_s,
    count,
    first,
    last,
    offs_d,
    length,
    stride_x_b,
    stride_x_t,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    POOLING: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return columns offs_d of the pooled segments, (BLOCK_S, BLOCK_D) in ACC; not for "concat"."""
    start = float("-inf") if POOLING == "max" else 0.0
    pooled = tl.full((first_step.shape[0], offs_d.shape[0]), start, dtype=ACC)
    for p in range(SEGMENT_SIZE):
        x, real = load_steps(
            x_ptr, padding_mask_ptr, sequence, first_step + p, mask_s, offs_d, length, stride_x_b,
            stride_x_t, D,
        )  # fmt: skip
        x = x.to(ACC)
        if POOLING == "mean":
            pooled += x
        elif POOLING == "max":
            # Written out because tl.maximum drops a NaN, which must come through.
            better = real[:, None] & ((x > pooled) | (x != x))
            pooled = tl.where(better, x, pooled)
        elif POOLING == "first":
            pooled += tl.where((first == p)[:, None], x, 0.0)
        else:
            pooled += tl.where((last == p)[:, None], x, 0.0)
    if POOLING == "mean":
        pooled = pooled / tl.maximum(count, 1).to(ACC)[:, None]
    if POOLING == "max":
        pooled = tl.where((count > 0)[:, None], pooled, 0.0)
    return pooled


@triton.jit
def score_segments(
    x_ptr,
    router_weight_ptr,
    router_start_ptr,
    padding_mask_ptr,
    segment,  # (BLOCK_S,)
    mask_s,
    segments_per_sequence,
    length,
    num_experts,
    stride_x_b,
    stride_x_t,
    stride_w_e,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    POOLING: tl.constexpr,
    ACC: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return ``(logits, routed)`` of segments: (BLOCK_S, EXPERTS) in ACC, 0 where not routed."""
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    sequence = segment // segments_per_sequence
    index = segment % segments_per_sequence
    own_step = index * SEGMENT_SIZE
    # A causal router looks at the segment before; the first one has none.
    mask_x = mask_s
    first_step = own_step
    if router_start_ptr is not None:
        mask_x = mask_s & (index > 0)
        first_step = own_step - SEGMENT_SIZE
    count = tl.full(segment.shape, 1, dtype=tl.int32)
    first = tl.zeros(segment.shape, dtype=tl.int32)
    last = first
    if POOLING != "concat":
        count, first, last = step_range(
            padding_mask_ptr, sequence, first_step, mask_x, length, SEGMENT_SIZE
        )
    routed = mask_s
    if padding_mask_ptr is not None:
        own_count, _first, _last = step_range(
            padding_mask_ptr, sequence, own_step, mask_s, length, SEGMENT_SIZE
        )
        routed = mask_s & (own_count > 0)

    logits = tl.zeros((segment.shape[0], EXPERTS), dtype=ACC)
    for d0 in range(0, D, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        # Where registers hold the operand, Triton 3.7 pipelines without a wait for wgmma: the next
        # steps would be loaded into registers that it still reads.
        for p in tl.range(
            SEGMENT_SIZE if POOLING == "concat" else 1,
            num_stages=1 if router_start_ptr is not None else None,
        ):
            if POOLING == "concat":
                pooled, _real = load_steps(
                    x_ptr, padding_mask_ptr, sequence, first_step + p, mask_x, offs_d, length,
                    stride_x_b, stride_x_t, D,
                )  # fmt: skip
            else:
                pooled = pool(
                    x_ptr, padding_mask_ptr, sequence, first_step, mask_x, count, first, last,
                    offs_d, length, stride_x_b, stride_x_t, D, SEGMENT_SIZE, POOLING, ACC,
                )  # fmt: skip
                # All but a mean are numbers of x's.
                if POOLING != "mean":
                    pooled = pooled.to(x_ptr.dtype.element_ty)
            if router_start_ptr is not None:
                start = tl.load(router_start_ptr + p * D + offs_d, mask=mask_d, other=0.0)
                start = start.to(pooled.dtype)
                pooled = tl.where((index == 0)[:, None], start[None, :], pooled)
            w = tl.load(
                router_weight_ptr + experts[:, None] * stride_w_e + p * D + offs_d[None, :],
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
    seed_ptr,  # (1,) int64 or None
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
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        probs *= dropout_scale(seed, segment, experts, num_experts, dropout, logits.dtype)
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
    seed_ptr,  # (1,) int64 or None
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Return the gradient of the logits; the probabilities are computed anew from them."""
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    temperature = read_option(temperature, logits.dtype)
    probs = _softmax(logits / temperature, mask_e)
    scale = tl.full(logits.shape, 1.0, dtype=logits.dtype)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        scale *= dropout_scale(seed, segment, experts, num_experts, dropout, logits.dtype)
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
