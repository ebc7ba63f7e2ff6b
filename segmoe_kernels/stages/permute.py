"""Stage 2 of 4, permute: group the slots by expert with a stable counting sort.

Data flow: ``topk_ids (S, top_k) -> counts per block (blocks, E + 1) -> their exclusive sums ->
sorted_to_slot (R,), slot_to_sorted (R,), expert_offsets (E + 1,)``. Group E collects the slots
without an expert. Nothing is sorted by comparison, nothing is atomic: a slot's place is the number
of slots before it in its group, found from the blocks' histograms and a sum inside the block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segmoe_kernels._triton.launch import define_operator, padded
from segmoe_kernels.routing import Permutation

# Slots that one program places; `route` counts its blocks in the same number of segments.
SEGMENTS_PER_BLOCK = 32

# Up to here each program sums all histograms itself: quadratic, but a launch less.
MAX_BLOCKS_WITHOUT_SCAN = 512


@triton.jit
def _group_of(ids, num_experts):
    """Return the expert of a slot, or E where its id names none."""
    return tl.where((ids < 0) | (ids > num_experts), num_experts, ids)


@triton.jit
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


@triton.jit
def _permute_scan_kernel(
    block_counts_ptr,  # (blocks, E + 1) int32
    block_starts_ptr,  # (blocks, E + 1) int32, every row is written
    expert_offsets_ptr,  # (E + 1,) int32, every element is written
    expert_counts_ptr,  # (E,) int32, every element is written
    num_blocks,
    num_experts,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Turn histograms into the first sorted row of each (block, group).

    Grid: ``(1,)``; the program reads all histograms twice, BLOCKS at a time.
    """
    groups = tl.arange(0, GROUPS)
    mask_g = groups <= num_experts
    totals = tl.zeros((GROUPS,), dtype=tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        offs = blocks.to(tl.int64)[:, None] * (num_experts + 1) + groups[None, :]
        mask = (blocks < num_blocks)[:, None] & mask_g[None, :]
        totals += tl.sum(tl.load(block_counts_ptr + offs, mask=mask, other=0), 0)
    running = tl.cumsum(totals, 0) - totals
    tl.store(expert_offsets_ptr + groups, running, mask=mask_g)
    tl.store(expert_counts_ptr + groups, totals, mask=groups < num_experts)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        offs = blocks.to(tl.int64)[:, None] * (num_experts + 1) + groups[None, :]
        mask = (blocks < num_blocks)[:, None] & mask_g[None, :]
        counts = tl.load(block_counts_ptr + offs, mask=mask, other=0)
        starts = running[None, :] + tl.cumsum(counts, 0) - counts
        tl.store(block_starts_ptr + offs, starts, mask=mask)
        running += tl.sum(counts, 0)


@triton.jit
def _permute_place_kernel(
    topk_ids_ptr,  # (R,) int32
    block_counts_ptr,  # (blocks, E + 1) int32
    block_starts_ptr,  # (blocks, E + 1) int32 from the scan, or None
    sorted_to_slot_ptr,  # (R,) int32, every element is written
    slot_to_sorted_ptr,  # (R,) int32, every element is written
    expert_offsets_ptr,  # (E + 1,) int32, every element is written unless scanned
    expert_counts_ptr,  # (E,) int32, likewise
    num_slots,
    num_experts,
    num_blocks,
    SLOTS_PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Write both maps for the slots of a block.

    Grid: ``(blocks,)``; one program owns SLOTS_PER_BLOCK consecutive slots, CHUNK at a time. With
    few blocks each program sums the histograms before its own, which saves a launch.
    """
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    mask_g = groups <= num_experts
    if block_starts_ptr is not None:
        starts_ptr = block_starts_ptr + pid * (num_experts + 1) + groups
        running = tl.load(starts_ptr, mask=mask_g, other=0)
    else:
        totals = tl.zeros((GROUPS,), dtype=tl.int32)
        before = tl.zeros((GROUPS,), dtype=tl.int32)
        for start in range(0, num_blocks, BLOCKS):
            blocks = start + tl.arange(0, BLOCKS)
            counts = tl.load(
                block_counts_ptr
                + blocks.to(tl.int64)[:, None] * (num_experts + 1)
                + groups[None, :],
                mask=(blocks < num_blocks)[:, None] & mask_g[None, :],
                other=0,
            )
            totals += tl.sum(counts, 0)
            before += tl.sum(tl.where((blocks < pid)[:, None], counts, 0), 0)
        offsets = tl.cumsum(totals, 0) - totals
        running = offsets + before
        first = pid == 0
        tl.store(expert_offsets_ptr + groups, offsets, mask=mask_g & first)
        tl.store(expert_counts_ptr + groups, totals, mask=(groups < num_experts) & first)
    for start in range(0, SLOTS_PER_BLOCK, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        slots = pid * SLOTS_PER_BLOCK + inner
        mask = (inner < SLOTS_PER_BLOCK) & (slots < num_slots)
        ids = tl.load(topk_ids_ptr + slots, mask=mask, other=0)
        group = _group_of(ids, num_experts)
        mine = ((group[:, None] == groups[None, :]) & mask[:, None]).to(tl.int32)
        places = running[None, :] + tl.cumsum(mine, 0) - mine
        rows = tl.sum(mine * places, 1)
        tl.store(sorted_to_slot_ptr + rows, slots.to(tl.int32), mask=mask)
        tl.store(slot_to_sorted_ptr + slots, rows, mask=mask)
        running += tl.sum(mine, 0)


def _permute(
    topk_ids: Tensor, block_counts: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    topk_ids = topk_ids.contiguous()
    num_slots, top_k = topk_ids.numel(), topk_ids.shape[1]
    sorted_to_slot, slot_to_sorted, expert_offsets, expert_counts = _permute_fake(
        topk_ids, block_counts, num_experts
    )
    groups = padded(num_experts + 1)
    slots_per_block = SEGMENTS_PER_BLOCK * top_k
    # A chunk holds a (CHUNK, GROUPS) one-hot in registers.
    chunk = max(16, min(padded(slots_per_block), 8192 // groups))
    num_blocks = triton.cdiv(topk_ids.shape[0], SEGMENTS_PER_BLOCK)
    tiles = {"SLOTS_PER_BLOCK": slots_per_block, "CHUNK": chunk, "GROUPS": groups}
    if block_counts is None:
        shape = (num_blocks, num_experts + 1)
        block_counts = torch.empty(shape, dtype=torch.int32, device=topk_ids.device)
        if num_slots:
            _permute_count_kernel[(num_blocks,)](
                topk_ids, block_counts, num_slots, num_experts, **tiles
            )
    blocks_at_once = max(16, min(padded(num_blocks), 8192 // groups))
    block_starts = None
    if num_blocks > MAX_BLOCKS_WITHOUT_SCAN or num_blocks == 0:
        block_starts = torch.empty_like(block_counts)
        _permute_scan_kernel[(1,)](
            block_counts,
            block_starts,
            expert_offsets,
            expert_counts,
            num_blocks,
            num_experts,
            BLOCKS=blocks_at_once,
            GROUPS=groups,
            num_warps=8,
        )
    if num_slots:
        _permute_place_kernel[(num_blocks,)](
            topk_ids,
            block_counts,
            block_starts,
            sorted_to_slot,
            slot_to_sorted,
            expert_offsets,
            expert_counts,
            num_slots,
            num_experts,
            num_blocks,
            **tiles,
            BLOCKS=blocks_at_once,
        )
    return sorted_to_slot, slot_to_sorted, expert_offsets, expert_counts


def _permute_fake(
    topk_ids: Tensor,
    block_counts: Tensor | None,  # noqa: ARG001  schema
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = topk_ids.new_empty(topk_ids.numel())
    offsets = topk_ids.new_empty(num_experts + 1)
    return rows, torch.empty_like(rows), offsets, topk_ids.new_empty(num_experts)


_permute_op = define_operator(
    "permute(Tensor topk_ids, Tensor? block_counts, int num_experts) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _permute,
    _permute_fake,
)


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
