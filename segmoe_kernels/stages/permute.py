"""Stage 2 of 4, permute: group the slots by expert with a stable counting sort.

Data flow: ``topk_ids (S, top_k) -> counts per block (blocks, E + 1) -> sorted_to_slot (R,),
slot_to_sorted (R,), expert_offsets (E + 1,)``. Group E collects the slots without an expert.
Nothing is sorted by comparison, nothing is atomic: a slot's place is the number of slots before it
in its group, found from the blocks' histograms and a sum inside the block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segmoe_kernels._triton.arguments import Places
from segmoe_kernels._triton.launch import cdiv, define_operator, kernel, padded
from segmoe_kernels._triton.tiles import SEGMENTS_AT_ONCE, segments_per_block
from segmoe_kernels.routing import Permutation


@triton.jit
def _group_of(ids, num_experts):
    """Return the expert of a slot, or E where its id names none."""
    return tl.where((ids < 0) | (ids > num_experts), num_experts, ids)


@kernel
def _permute_count_kernel(
    topk_ids_ptr,  # (R,) int32
    block_counts_ptr,  # (blocks, E + 1) int32, every row is written
    num_slots,
    slots_per_block,
    num_experts,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Count the slots of each group in a block.

    Grid: ``(blocks,)``; one program owns slots_per_block consecutive slots.
    """
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    counts = tl.zeros((GROUPS,), dtype=tl.int32)
    for start in range(0, slots_per_block, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        slots = pid * slots_per_block + inner
        mask = (inner < slots_per_block) & (slots < num_slots)
        ids = tl.load(topk_ids_ptr + slots, mask=mask, other=0)
        group = _group_of(ids, num_experts)
        counts += tl.sum(((group[:, None] == groups[None, :]) & mask[:, None]).to(tl.int32), 0)
    out = block_counts_ptr + pid * (num_experts + 1) + groups
    tl.store(out, counts, mask=groups <= num_experts)


@kernel
def _permute_place_kernel(
    topk_ids_ptr,  # (R,) int32
    block_counts_ptr,  # (blocks, E + 1) int32
    out,  # Places
    num_slots,
    slots_per_block,
    num_experts,
    num_blocks,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Write both maps for the slots of a block.

    Grid: ``(blocks,)``; one program owns slots_per_block consecutive slots, CHUNK at a time, and
    sums up all histograms, BLOCKS at a time.
    """
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    mask_g = groups <= num_experts
    totals = tl.zeros((GROUPS,), dtype=tl.int32)
    before = tl.zeros((GROUPS,), dtype=tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        counts = tl.load(
            block_counts_ptr + blocks.to(tl.int64)[:, None] * (num_experts + 1) + groups[None, :],
            mask=(blocks < num_blocks)[:, None] & mask_g[None, :],
            other=0,
        )
        totals += tl.sum(counts, 0)
        before += tl.sum(tl.where((blocks < pid)[:, None], counts, 0), 0)
    offsets = tl.cumsum(totals, 0) - totals
    running = offsets + before
    first = pid == 0
    tl.store(out.expert_offsets_ptr + groups, offsets, mask=mask_g & first)
    tl.store(out.expert_counts_ptr + groups, totals, mask=(groups < num_experts) & first)
    for start in range(0, slots_per_block, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        slots = pid * slots_per_block + inner
        mask = (inner < slots_per_block) & (slots < num_slots)
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
    at_once = max(16, 8192 // groups)
    # A chunk holds a (CHUNK, GROUPS) one-hot in registers.
    tiles = {"CHUNK": min(padded(SEGMENTS_AT_ONCE * top_k), at_once), "GROUPS": groups}
    segments = segments_per_block(topk_ids.shape[0], num_experts)
    num_blocks = cdiv(topk_ids.shape[0], segments)
    if block_counts is None:
        block_counts = topk_ids.new_empty(num_blocks, num_experts + 1)
        _permute_count_kernel[(num_blocks,)](
            topk_ids, block_counts, num_slots, segments * top_k, num_experts, **tiles
        )
    _permute_place_kernel[(num_blocks,)](
        topk_ids,
        block_counts,
        Places(*outputs),
        num_slots,
        segments * top_k,
        num_experts,
        num_blocks,
        **tiles,
        BLOCKS=min(128, at_once),
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
    """Group the slots by expert: a launch behind `route`, two alone.

    Args:
        topk_ids: (S, top_k) int32; outside [0, E) for a segment that is not routed.
        num_experts: E.
        block_counts: from `route`, or None.

    Returns:
        Permutation.
    """
    return Permutation(*_permute_op(topk_ids, block_counts, num_experts))
