"""Kernels of plan "block", forward: one program routes a run of segments and runs their experts.

Launched by `block`.
"""

import triton
import triton.language as tl

from segmoe_kernels._triton.ffn import ffn_rows, hidden_rows, load_bias, load_tile
from segmoe_kernels._triton.launch import kernel
from segmoe_kernels._triton.router import choose_experts, router_weights, score_segments
from segmoe_kernels._triton.sequences import load_rows, place_steps, store_steps


@triton.jit
def _route_and_list(
    x_ptr,
    router_weight_ptr,
    router_start_ptr,
    padding_mask_ptr,
    router_seed_ptr,
    logits_ptr,
    probs_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    lists_ptr,
    list_size,
    num_segments,
    segments_per_block,
    segments_per_sequence,
    length,
    num_experts,
    stride_x_b,
    stride_x_t,
    stride_w_e,
    temperature,
    router_dropout,
    D: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    POOLING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Route the program's segments and list the slots of each expert, in order.

    Returns ``(counts, unrouted)``: (EXPERTS,) int32 slots of each expert, and the number of
    segments without one, which make up list E.
    """
    pid = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    base = pid * segments_per_block * TOP_K
    end = tl.minimum((pid + 1) * segments_per_block, num_segments)
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    unrouted = tl.sum(counts, 0)
    for start in range(0, segments_per_block, BLOCK_S):
        segment = pid * segments_per_block + start + tl.arange(0, BLOCK_S)
        mask_s = segment < end
        logits, routed = score_segments(
            x_ptr, router_weight_ptr, router_start_ptr, padding_mask_ptr, segment, mask_s,
            segments_per_sequence, length, num_experts, stride_x_b, stride_x_t, stride_w_e,
            D, SEGMENT_SIZE, POOLING, ACC, EXPERTS, BLOCK_K,
        )  # fmt: skip
        probs, weights, rank = choose_experts(
            logits, routed, segment, num_experts, temperature, router_dropout, router_seed_ptr,
            TOP_K, RENORMALIZE, EXPERTS,
        )  # fmt: skip
        selected = rank < TOP_K
        listed = selected & routed[:, None]
        offs = segment[:, None] * num_experts + experts[None, :]
        mask_se = mask_s[:, None] & mask_e[None, :]
        tl.store(logits_ptr + offs, logits, mask=mask_se)
        tl.store(probs_ptr + offs, probs, mask=mask_se)
        slot = segment[:, None] * TOP_K + rank
        mask_chosen = mask_s[:, None] & selected
        tl.store(topk_weights_ptr + slot, weights, mask=mask_chosen)
        ids = tl.where(routed[:, None], experts[None, :], -1)
        tl.store(topk_ids_ptr + slot, ids, mask=mask_chosen)

        mine = listed.to(tl.int32)
        place = counts[None, :] + tl.cumsum(mine, 0) - mine
        entry = slot.to(tl.int32)
        if TOP_K > 1:
            # The lowest expert of a segment writes its rows, those after it add to them.
            lowest = tl.min(tl.where(listed, experts[None, :], EXPERTS), 1)
            entry = entry * 2 + (experts[None, :] == lowest[:, None]).to(tl.int32)
        rows = experts.to(tl.int64)[None, :] * list_size + base + place
        tl.store(lists_ptr + rows, entry, mask=listed & mask_e[None, :])
        counts += tl.sum(mine, 0)
        if padding_mask_ptr is not None:
            absent = (mask_s & (routed == 0)).to(tl.int32)
            place = unrouted + tl.cumsum(absent, 0) - absent
            rows = (pid * 0 + num_experts) * list_size + base + place
            entry = (segment * TOP_K).to(tl.int32)
            if TOP_K > 1:
                entry = entry * 2 + 1
            tl.store(lists_ptr + rows, entry, mask=absent > 0)
            unrouted += tl.sum(absent, 0)
    return counts, unrouted


@kernel
def block_fwd_kernel(
    x_ptr,  # (B, T, D)
    router_weight_ptr,  # (E, W)
    router_start_ptr,  # (W,) or None
    padding_mask_ptr,  # (B, T) bool or None
    router_seed_ptr,  # (1,) int64 or None
    seed_ptr,  # (1,) int64 or None
    up_ptr,  # (E, F, D)
    gate_ptr,  # (E, F, D) or None
    down_ptr,  # (E, D, F)
    up_bias_ptr,  # (E, F) or None
    gate_bias_ptr,  # (E, F) or None
    down_bias_ptr,  # (E, D) or None
    y_ptr,  # (B, T, D) contiguous, every row is written
    logits_ptr,  # (S, E), every row is written
    probs_ptr,  # (S, E), every row is written
    topk_weights_ptr,  # (S, TOP_K), every row is written
    topk_ids_ptr,  # (S, TOP_K) int32, every row is written
    block_counts_ptr,  # (blocks, E) int32, every row is written
    lists_ptr,  # (E + 1, list_size) int32, workspace: what is read is written
    list_size,
    num_segments,
    segments_per_block,
    segments_per_sequence,
    length,
    num_experts,
    num_sequences,
    stride_x_b,
    stride_x_t,
    stride_w_e,
    stride_up_e,
    stride_up_f,
    stride_gate_e,
    stride_gate_f,
    stride_down_e,
    stride_down_d,
    temperature,
    router_dropout,
    dropout,
    D: tl.constexpr,
    F: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    POOLING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUTER_ACC: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Route a run of segments, then run the experts over their rows; x comes from DRAM once.

    Grid: ``(blocks,)``. Program b routes segments ``[b * segments_per_block, ...)``, BLOCK_S at a
    time, and runs the experts over its own lists, BLOCK_M rows at a time; they add to the rows of a
    segment one after the other, in the order of their indices. Sums in ACC; the hidden layer and
    each addition to y are rounded to the weights' dtype.
    """
    pid = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, EXPERTS)
    counts, unrouted = _route_and_list(
        x_ptr, router_weight_ptr, router_start_ptr, padding_mask_ptr, router_seed_ptr, logits_ptr,
        probs_ptr, topk_weights_ptr, topk_ids_ptr, lists_ptr, list_size, num_segments,
        segments_per_block, segments_per_sequence, length, num_experts, stride_x_b, stride_x_t,
        stride_w_e, temperature, router_dropout, D, SEGMENT_SIZE, TOP_K, POOLING, RENORMALIZE,
        ROUTER_ACC, EXPERTS, BLOCK_S, BLOCK_K,
    )  # fmt: skip
    # Read back one by one: they need not stay in registers.
    counts_ptr = block_counts_ptr + pid * num_experts
    tl.store(counts_ptr + experts, counts, mask=experts < num_experts)
    # The lists and weights that other threads stored are read from here on.
    tl.debug_barrier()

    offs_d = tl.arange(0, BLOCK_D)
    offs_f = tl.arange(0, BLOCK_F)
    base = lists_ptr + pid * segments_per_block * TOP_K
    # What doesn't change in a loop is computed anew where it's used, here and in the other loops
    # marked so: hoisted, the descriptors of wgmma's operands alone fill all registers.
    for expert in tl.range(0, num_experts, disable_licm=True):
        num_rows = tl.load(counts_ptr + expert) * SEGMENT_SIZE
        if num_rows > 0:
            e = pid * 0 + expert
            if BLOCK_F >= F:
                # The hidden layer is one chunk: its weights stay on chip for all rows.
                up = load_tile(up_ptr, e, offs_f, offs_d, F, D, stride_up_e, stride_up_f)
                down = load_tile(down_ptr, e, offs_d, offs_f, D, F, stride_down_e, stride_down_d)
                gate = up
                if gate_ptr is not None:
                    gate = load_tile(
                        gate_ptr, e, offs_f, offs_d, F, D, stride_gate_e, stride_gate_f
                    )
                up_bias = load_bias(up_bias_ptr, e, offs_f, F, ACC)
                gate_bias = load_bias(gate_bias_ptr, e, offs_f, F, ACC)
            for row0 in tl.range(0, num_rows, BLOCK_M, disable_licm=True):
                rows = row0 + tl.arange(0, BLOCK_M)
                mask_m = rows < num_rows
                slot, adds, sequence, step = _find_listed(
                    base + e * list_size, rows, mask_m, segments_per_sequence, TOP_K, SEGMENT_SIZE
                )
                x = load_rows(
                    x_ptr, padding_mask_ptr, slot, sequence, step, mask_m, offs_d, D, length,
                    0, stride_x_b, stride_x_t, D, False,
                ).to(up_ptr.dtype.element_ty)  # fmt: skip
                row_ids = slot * SEGMENT_SIZE + rows % SEGMENT_SIZE
                if BLOCK_F >= F:
                    hidden = hidden_rows(
                        x, up, gate, up_bias, gate_bias, seed_ptr, row_ids, offs_f, dropout, F,
                        gate_ptr is not None, up_bias_ptr is not None, gate_bias_ptr is not None,
                        ACTIVATION, ACC, PRECISION, 0,
                    )  # fmt: skip
                    out = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
                    if down_bias_ptr is not None:
                        out += load_bias(down_bias_ptr, e, offs_d, D, ACC)[None, :]
                    out = tl.dot(
                        hidden.to(x.dtype), tl.trans(down), out, input_precision=PRECISION,
                        out_dtype=ACC,
                    )  # fmt: skip
                else:
                    out = ffn_rows(
                        x, row_ids, e, F, up_ptr, gate_ptr, down_ptr, up_bias_ptr, gate_bias_ptr,
                        down_bias_ptr, seed_ptr, stride_up_e, stride_up_f, stride_gate_e,
                        stride_gate_f, stride_down_e, stride_down_d, dropout, D, F, ACTIVATION,
                        ACC, PRECISION, BLOCK_F, BLOCK_D,
                    )  # fmt: skip
                    # Where rows go is found anew, behind a barrier and from a number that the
                    # compiler can't know: it would hold addresses and slots in registers.
                    tl.debug_barrier()
                    rows = tl.minimum(row0, tl.load(counts_ptr + expert) * SEGMENT_SIZE)
                    rows += tl.arange(0, BLOCK_M)
                    mask_m = rows < num_rows
                    slot, adds, sequence, step = _find_listed(
                        base + e * list_size, rows, mask_m, segments_per_sequence, TOP_K,
                        SEGMENT_SIZE,
                    )  # fmt: skip
                weights = tl.load(topk_weights_ptr + slot, mask=mask_m, other=0.0).to(ACC)
                place = place_steps(
                    padding_mask_ptr, 0, sequence, step, mask_m, num_sequences, length
                )
                out = out * weights[:, None]
                if TOP_K > 1:
                    ptrs = (y_ptr + place.to(tl.int64) * D)[:, None] + offs_d[None, :]
                    mask = (adds & (place >= 0))[:, None] & (offs_d < D)[None, :]
                    out += tl.load(ptrs, mask=mask, other=0.0).to(ACC)
                store_steps(y_ptr, out, place, offs_d, D)
        if TOP_K > 1:
            # The next expert adds to rows that other threads wrote.
            tl.debug_barrier()
    if padding_mask_ptr is not None:
        # Segments without an expert: every step is masked, hence 0.
        num_rows = unrouted * SEGMENT_SIZE
        list_ptr = base + (pid * 0 + num_experts) * list_size
        for row0 in range(0, num_rows, BLOCK_M):
            rows = row0 + tl.arange(0, BLOCK_M)
            mask_m = rows < num_rows
            _slot, _adds, sequence, step = _find_listed(
                list_ptr, rows, mask_m, segments_per_sequence, TOP_K, SEGMENT_SIZE
            )
            place = place_steps(padding_mask_ptr, 0, sequence, step, mask_m, num_sequences, length)
            zeros = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
            store_steps(y_ptr, zeros, place, offs_d, D)


@triton.jit
def _find_listed(
    list_ptr,
    rows,
    mask_m,
    segments_per_sequence,
    TOP_K: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
):
    """Return ``(slot, adds, sequence, step)`` of rows of a list, SEGMENT_SIZE for each entry."""
    slot = tl.load(list_ptr + rows // SEGMENT_SIZE, mask=mask_m, other=0)
    adds = slot < 0
    if TOP_K > 1:
        adds = (slot & 1) == 0
        slot = slot >> 1
    segment = slot // TOP_K
    step = (segment % segments_per_sequence) * SEGMENT_SIZE + rows % SEGMENT_SIZE
    return slot, adds, segment // segments_per_sequence, step


@kernel
def block_prepare_kernel(
    logits_ptr,  # (S, E)
    topk_ids_ptr,  # (S, TOP_K) int32
    router_seed_ptr,  # (1,) int64 or None
    topk_weights_ptr,  # (S, TOP_K), every row is written
    block_counts_ptr,  # (blocks, E + 1) int32, every row is written
    num_segments,
    num_experts,
    temperature,
    router_dropout,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Make anew what backward needs of the routing and forward did not keep.

    Grid: ``(cdiv(S, BLOCK_S),)``.
    """
    pid = tl.program_id(0).to(tl.int64)
    segment = pid * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = segment < num_segments
    experts = tl.arange(0, EXPERTS)
    mask_e = experts < num_experts
    selected = tl.zeros((BLOCK_S, EXPERTS), dtype=tl.int1)
    for k in range(TOP_K):
        ids = tl.load(topk_ids_ptr + segment * TOP_K + k, mask=mask_s, other=-1)
        selected |= experts[None, :] == ids[:, None]
    logits = tl.load(
        logits_ptr + segment[:, None] * num_experts + experts[None, :],
        mask=mask_s[:, None] & mask_e[None, :],
        other=0.0,
    )
    weights = router_weights(
        logits, selected, segment, num_experts, temperature, router_dropout, router_seed_ptr,
        RENORMALIZE, EXPERTS,
    )  # fmt: skip
    for k in range(TOP_K):
        slot = segment * TOP_K + k
        ids = tl.load(topk_ids_ptr + slot, mask=mask_s, other=-1)
        weight = tl.sum(tl.where(experts[None, :] == ids[:, None], weights, 0.0), 1)
        tl.store(topk_weights_ptr + slot, weight, mask=mask_s)
    counts = tl.sum(selected.to(tl.int32), 0)
    row = block_counts_ptr + pid * (num_experts + 1)
    tl.store(row + experts, counts, mask=mask_e)
    slots = tl.sum(mask_s.to(tl.int32), 0) * TOP_K
    tl.store(row + num_experts, slots - tl.sum(counts, 0))
