"""Kernels whose times others published, or nearly: what the model is held against."""

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    c_ptr,  # (M, N)
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A plain product in 16 bits, tiles of GROUP_M rows of tiles together."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    first = pid // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    inside = pid % (GROUP_M * columns)
    rows = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (rows % M)[:, None] * K + depth[None, :]
    b_ptrs = b_ptr + depth[:, None] * N + (cols % N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _k0 in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc.to(tl.bfloat16), mask=mask)


@triton.jit
def attention_kernel(
    q_ptr,  # (heads, length, D), as the next three
    k_ptr,
    v_ptr,
    out_ptr,
    length,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention without a mask, softmax in running sums, as FlashAttention-2 does it."""
    base = tl.program_id(1).to(tl.int64) * length * D
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    q = tl.load(q_ptr + base + offs_m[:, None] * D + offs_d[None, :])
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, D), tl.float32)
    for n0 in range(0, length, BLOCK_N):
        offs = (n0 + tl.arange(0, BLOCK_N))[:, None] * D + offs_d[None, :]
        scores = tl.dot(q, tl.trans(tl.load(k_ptr + base + offs)))
        new = tl.maximum(largest, tl.max(scores, 1) * scale)
        probs = tl.math.exp2(scores * scale - new[:, None])
        shrink = tl.math.exp2(largest - new)
        total = total * shrink + tl.sum(probs, 1)
        v = tl.load(v_ptr + base + offs)
        out = tl.dot(probs.to(tl.bfloat16), v, out * shrink[:, None])
        largest = new
    offs = base + offs_m[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + offs, (out / total[:, None]).to(tl.bfloat16))


@triton.jit
def count_kernel(
    ids_ptr,  # (slots,) int32
    counts_ptr,  # (programs + 1, E) int32
    num_slots,
    slots,
    E: tl.constexpr,
):
    """Count the ids of slots one after the other: two loads that wait for each other."""
    pid = tl.program_id(0)
    first = pid * slots
    counts_ptr += (pid + 1) * E
    for slot in range(slots):
        if first + slot < num_slots:
            expert = tl.load(ids_ptr + first + slot)
            count = tl.load(counts_ptr + expert)
            tl.store(counts_ptr + expert, count + 1)


@triton.jit
def place_kernel(
    ids_ptr,  # (slots,) int32
    sorted_ptr,  # (slots,) int32
    counts_ptr,  # (programs + 1, E) int32
    starts_ptr,  # (E + 1,) int32
    num_slots,
    slots,
    E: tl.constexpr,
):
    """Place slots one after the other."""
    pid = tl.program_id(0)
    first = pid * slots
    counts_ptr += pid * E
    for slot in range(first, tl.minimum(first + slots, num_slots)):
        expert = tl.load(ids_ptr + slot)
        count = tl.load(counts_ptr + expert)
        tl.store(sorted_ptr + count + tl.load(starts_ptr + expert), slot)
        tl.store(counts_ptr + expert, count + 1)
