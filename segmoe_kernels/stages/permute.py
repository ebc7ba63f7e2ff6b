"""Stage 2 of 4, permute: group the slots by expert with a stable counting sort.

Data flow: ``topk_ids (S, top_k) -> counts per block (blocks, E + 1) -> [sums of runs of blocks] ->
sorted_to_slot (R,), slot_to_sorted (R,), expert_offsets (E + 1,)``. Group E collects the slots
without an expert. Nothing is sorted by comparison, nothing is atomic: a slot's place is the number
of slots before it in its group, found from the blocks' histograms and a sum inside the block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segmoe_kernels._triton.arguments import Places
from segmoe_kernels._triton.launch import cdiv, define_operator, kernel, padded
from segmoe_kernels.routing import Permutation

# Slots that one program places; `route` counts its blocks in the same number of segments.
SEGMENTS_PER_BLOCK = 32

# Up to here each program sums up all histograms: quadratic, but a launch less than runs of them.
MAX_BLOCKS_WITHOUT_SCAN = 1024


@triton.jit
def _group_of(ids, num_experts):
    """Return the expert of a slot, or E where its id names none."""
    return tl.where((ids < 0) | (ids > num_experts), num_experts, ids)


@kernel
def _permute_count_kernel(
    topk_ids_ptr,  # (R,) int32
    block_counts_ptr,  # (blocks, E + 1) int32, every row is written
    num_slots,
    num_experts,
    SLOTS_PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Count the slots of each group in a block.

    Grid: ``(blocks,)``; one program owns SLOTS_PER_BLOCK consecutive slots.
    """
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    counts = tl.zeros((GROUPS,), dtype=tl.int32)
    for start in range(0, SLOTS_PER_BLOCK, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        slots = pid * SLOTS_PER_BLOCK + inner
        mask = (inner < SLOTS_PER_BLOCK) & (slots < num_slots)
        ids = tl.load(topk_ids_ptr + slots, mask=mask, other=0)
        group = _group_of(ids, num_experts)
        counts += tl.sum(((group[:, None] == groups[None, :]) & mask[:, None]).to(tl.int32), 0)
    out = block_counts_ptr + pid * (num_experts + 1) + groups
    tl.store(out, counts, mask=groups <= num_experts)


@kernel
def _permute_scan_kernel(
    block_counts_ptr,  # (blocks, E + 1) int32
    block_starts_ptr,  # (blocks, E + 1) int32, every row is written
    sums_ptr,  # (cdiv(blocks, BLOCKS), E + 1) int32, every row is written
    num_blocks,
    num_experts,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Sum up BLOCKS histograms, and before each of them those that lie before it in the run.

    Grid: ``(cdiv(blocks, BLOCKS),)``.
    """
    run = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    mask_g = groups <= num_experts
    blocks = run * BLOCKS + tl.arange(0, BLOCKS)
    offs = blocks[:, None] * (num_experts + 1) + groups[None, :]
    mask = (blocks < num_blocks)[:, None] & mask_g[None, :]
    counts = tl.load(block_counts_ptr + offs, mask=mask, other=0)
    tl.store(block_starts_ptr + offs, tl.cumsum(counts, 0) - counts, mask=mask)
    tl.store(sums_ptr + run * (num_experts + 1) + groups, tl.sum(counts, 0), mask=mask_g)


@kernel
def _permute_place_kernel(
    topk_ids_ptr,  # (R,) int32
    sums_ptr,  # (runs, E + 1) int32, of BLOCKS_IN_RUN histograms each
    block_starts_ptr,  # (blocks, E + 1) int32, inside a run; None for runs of one
    out,  # Places
    num_slots,
    num_experts,
    num_runs,
    SLOTS_PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS_IN_RUN: tl.constexpr,
    RUNS: tl.constexpr,
) -> None:
    """Write both maps for the slots of a block.

    Grid: ``(blocks,)``; one program owns SLOTS_PER_BLOCK consecutive slots, CHUNK at a time, and
    sums up the runs before its own, RUNS at a time.
    """
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    mask_g = groups <= num_experts
    totals = tl.zeros((GROUPS,), dtype=tl.int32)
    before = tl.zeros((GROUPS,), dtype=tl.int32)
    for start in range(0, num_runs, RUNS):
        runs = start + tl.arange(0, RUNS)
        counts = tl.load(
            sums_ptr + runs.to(tl.int64)[:, None] * (num_experts + 1) + groups[None, :],
            mask=(runs < num_runs)[:, None] & mask_g[None, :],
            other=0,
        )
        totals += tl.sum(counts, 0)
        before += tl.sum(tl.where((runs < pid // BLOCKS_IN_RUN)[:, None], counts, 0), 0)
    offsets = tl.cumsum(totals, 0) - totals
    running = offsets + before
    if block_starts_ptr is not None:
        starts_ptr = block_starts_ptr + pid * (num_experts + 1) + groups
        running += tl.load(starts_ptr, mask=mask_g, other=0)
    first = pid == 0
    tl.store(out.expert_offsets_ptr + groups, offsets, mask=mask_g & first)
    tl.store(out.expert_counts_ptr + groups, totals, mask=(groups < num_experts) & first)
    for start in range(0, SLOTS_PER_BLOCK, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        slots = pid * SLOTS_PER_BLOCK + inner
        mask = (inner < SLOTS_PER_BLOCK) & (slots < num_slots)
        ids = tl.load(topk_ids_ptr + slots, mask=mask, other=0)
        group = _group_of(ids, num_experts)
        mine = ((group[:, None] == groups[None, :]) & mask[:, None]).to(tl.int32)
        places = running[None, :] + tl.cumsum(mine, 0) - mine
        rows = tl.sum(mine * places, 1)
        tl.store(out.sorted_to_slot_ptr + rows, slots.to(tl.int32), mask=mask)
        tl.store(out.slot_to_sorted_ptr + slots, rows, mask=mask)
        running += tl.sum(mine, 0)


def _permute(
    topk_ids: Tensor, block_counts: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    topk_ids = topk_ids.contiguous()
    num_slots, top_k = topk_ids.numel(), topk_ids.shape[1]
    outputs = _permute_fake(topk_ids, block_counts, num_experts)
    if num_slots == 0:
        for output in outputs:
            output.zero_()
        return outputs
    groups = padded(num_experts + 1)
    slots_per_block = SEGMENTS_PER_BLOCK * top_k
    # A chunk holds a (CHUNK, GROUPS) one-hot in registers.
    chunk = max(16, min(padded(slots_per_block), 8192 // groups))
    num_blocks = cdiv(topk_ids.shape[0], SEGMENTS_PER_BLOCK)
    tiles = {"SLOTS_PER_BLOCK": slots_per_block, "CHUNK": chunk, "GROUPS": groups}
    if block_counts is None:
        block_counts = topk_ids.new_empty(num_blocks, num_experts + 1)
        _permute_count_kernel[(num_blocks,)](
            topk_ids, block_counts, num_slots, num_experts, **tiles
        )
    at_once = max(16, 8192 // groups)
    sums, block_starts, num_runs = block_counts, None, num_blocks
    if num_blocks > MAX_BLOCKS_WITHOUT_SCAN:
        num_runs = cdiv(num_blocks, at_once)
        sums = topk_ids.new_empty(num_runs, num_experts + 1)
        block_starts = torch.empty_like(block_counts)
        _permute_scan_kernel[(num_runs,)](
            block_counts,
            block_starts,
            sums,
            num_blocks,
            num_experts,
            BLOCKS=at_once,
            GROUPS=groups,
            num_warps=8,
        )
    _permute_place_kernel[(num_blocks,)](
        topk_ids,
        sums,
        block_starts,
        Places(*outputs),
        num_slots,
        num_experts,
        num_runs,
        **tiles,
        BLOCKS_IN_RUN=1 if block_starts is None else at_once,
        RUNS=min(128, at_once) if block_starts is None else 16,
    )
    return outputs


def _permute_fake(
    topk_ids: Tensor,
    block_counts: Tensor | None,  # noqa: ARG001  schema
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = topk_ids.new_empty(topk_ids.numel())
    offsets = topk_ids.new_empty(num_experts + 1)
    return rows, torch.empty_like(rows), offsets, topk_ids.new_empty(num_experts)


_permute_op = define_operator("permute", _permute, _permute_fake)


def permute(topk_ids: Tensor, num_experts: int, block_counts: Tensor | None = None) -> Permutation:
    """Group the slots by expert: one or two launches behind `route`, one more alone.

    Args:
        topk_ids: (S, top_k) int32; outside [0, E) for a segment that is not routed.
        num_experts: E.
        block_counts: from `route`, or None.

    Returns:
        Permutation.
    """
    return Permutation(*_permute_op(topk_ids, block_counts, num_experts))
