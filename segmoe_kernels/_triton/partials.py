"""Sums over rows that several programs share: weight gradients, in a fixed order, without atomics.

A kernel cuts the tiles of all experts' rows into splits. A split that has all tiles of an expert
stores that expert's gradient where it belongs; the others store shares, in float32, into slots of
their own, ``split + expert``, which `reduce_partials` adds up; with float64 weights, in float64.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from segmoe_kernels._triton.launch import accumulator, kernel, padded
from segmoe_kernels._triton.sequences import expert_tiles, split_starts
from segmoe_kernels._triton.tiles import NUM_SMS


def new_partials(
    outputs: Sequence[Tensor | None], num_splits: int, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """Room for the shares of a kernel: (splits + E - 1, elements of an expert's gradients).

    Args:
        outputs: the gradients, (E, ...) each, in the order in which a slot holds them.
        num_splits: of the kernel; with one no share is stored.
        num_experts: E.
        dtype: of the sums.

    Returns:
        A tensor that is not filled.
    """
    given = [out for out in outputs if out is not None]
    size = sum(out[0].numel() for out in given)
    slots = num_splits + num_experts - 1 if num_splits > 1 else 0
    return given[0].new_empty(slots, size, dtype=dtype)


def reduce_partials(
    partials: Tensor,
    outputs: Sequence[Tensor | None],
    expert_offsets: Tensor,
    num_splits: int,
    rows_per_slot: int,
    block_m: int,
) -> None:
    """Add up partial weight gradients into ``outputs``, where no split alone has written them.

    Args:
        partials: from `new_partials`.
        outputs: up to six tensors (E, ...), contiguous; None for an absent one.
        expert_offsets: (E + 1,) int32.
        num_splits: of the kernel that wrote partials.
        rows_per_slot: of that kernel.
        block_m: of that kernel.
    """
    num_experts = expert_offsets.shape[0] - 1
    outputs = [*outputs, *[None] * (6 - len(outputs))]
    sizes = [0 if out is None else out[0].numel() for out in outputs]
    # Programs find their splits, which costs more than to add them up: few where there are many.
    block = 2048 if num_experts * partials.shape[1] >= 2048 * NUM_SMS else 512
    grid = (triton.cdiv(partials.shape[1], block), num_experts)
    reduce_partials_kernel[grid](
        partials,
        *outputs,
        expert_offsets,
        num_experts,
        num_splits,
        partials.shape[1],
        *sizes,
        ROWS_PER_SLOT=rows_per_slot,
        BLOCK_M=block_m,
        GROUPS=padded(num_experts),
        ACC=accumulator(partials.dtype),
        SPLITS=8,  # their loads are in flight at once
        BLOCK=block,
    )


@triton.jit
def store_sum(ptr, offs, value, mask):
    """Store a sum in the dtype of its place."""
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_gradients(
    whole,  # whether these are sums over all rows of the expert
    e,
    slot_ptr,  # room for a share: up | down | gate | up bias | down bias | gate bias
    gradients,
    sums,  # Gradients of values: (BLOCK_D, BLOCK_F), and (BLOCK_F,) or (BLOCK_D,) for biases
    offs_fd,  # where elements of dup and dgate go in a matrix
    offs_df,  # those of ddown
    offs_f,
    offs_d,
    mask_fd,
    mask_df,
    mask_f,
    mask_down_bias,
    D: tl.constexpr,
    F: tl.constexpr,
):
    """Store the gradients of one expert's weights where they belong, or as a split's share."""
    if whole:
        store_sum(gradients.up + e * F * D, offs_fd, sums.up, mask_fd)
        store_sum(gradients.down + e * F * D, offs_df, sums.down, mask_df)
        if gradients.gate is not None:
            store_sum(gradients.gate + e * F * D, offs_fd, sums.gate, mask_fd)
        if gradients.up_bias is not None:
            store_sum(gradients.up_bias + e * F, offs_f, sums.up_bias, mask_f)
            store_sum(gradients.down_bias + e * D, offs_d, sums.down_bias, mask_down_bias)
            if gradients.gate is not None:
                store_sum(gradients.gate_bias + e * F, offs_f, sums.gate_bias, mask_f)
    else:
        store_sum(slot_ptr, offs_fd, sums.up, mask_fd)
        slot_ptr += F * D
        store_sum(slot_ptr, offs_df, sums.down, mask_df)
        slot_ptr += F * D
        if gradients.gate is not None:
            store_sum(slot_ptr, offs_fd, sums.gate, mask_fd)
            slot_ptr += F * D
        if gradients.up_bias is not None:
            store_sum(slot_ptr, offs_f, sums.up_bias, mask_f)
            store_sum(slot_ptr + F, offs_d, sums.down_bias, mask_down_bias)
            if gradients.gate is not None:
                store_sum(slot_ptr + F + D, offs_f, sums.gate_bias, mask_f)


@kernel
def reduce_partials_kernel(
    partials_ptr,  # (splits + E - 1, n0 + ... + n5)
    out0_ptr,  # (E, n0), here and in the others what no split alone has written
    out1_ptr,  # (E, n1) or None
    out2_ptr,
    out3_ptr,
    out4_ptr,
    out5_ptr,
    expert_offsets_ptr,  # (E + 1,) int32
    num_experts,
    num_splits,
    partial_size,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    ROWS_PER_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add up the splits of one expert, SPLITS at a time, in a fixed order; zeros without a row.

    Grid: ``(cdiv(partial_size, BLOCK), E)``. The tiles of a split are computed as in the kernels
    that wrote the partial sums. An expert whose tiles one split had is complete already.
    """
    me = tl.program_id(1)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < partial_size
    experts = tl.arange(0, GROUPS)
    tiles = expert_tiles(expert_offsets_ptr, num_experts, ROWS_PER_SLOT, BLOCK_M, GROUPS)
    mine_start = tl.sum(tl.where(experts < me, tiles, 0), 0)
    mine_stop = tl.sum(tl.where(experts <= me, tiles, 0), 0)
    total = tl.sum(tiles, 0)
    acc = tl.zeros((BLOCK,), dtype=ACC)
    shared = total >= 0
    # Splits that may have tiles of this expert, give or take one at either end.
    some = tl.maximum(total, 1)
    begin = tl.maximum(mine_start.to(tl.int64) * num_splits // some - 1, 0)
    end = tl.minimum(mine_stop.to(tl.int64) * num_splits // some + 2, num_splits)
    for first_split in range(begin.to(tl.int32), end.to(tl.int32), SPLITS):
        splits = first_split + tl.arange(0, SPLITS)
        first = tl.maximum(split_starts(splits, num_splits, tiles, num_experts), mine_start)
        last = tl.minimum(split_starts(splits + 1, num_splits, tiles, num_experts), mine_stop)
        mine = (splits < end) & (first < last)
        whole = mine & (first == mine_start) & (last == mine_stop)
        shared &= tl.sum(whole.to(tl.int32), 0) == 0
        ptrs = partials_ptr + (splits + me).to(tl.int64)[:, None] * partial_size + offs[None, :]
        acc += tl.sum(tl.load(ptrs, mask=mine[:, None] & mask[None, :] & shared, other=0.0), 0)
    expert = me.to(tl.int64)
    # An offset that no part has.
    offs = tl.where(shared, offs, partial_size)
    _store_part(out0_ptr, acc, offs, expert, n0)
    offs -= n0
    if out1_ptr is not None:
        _store_part(out1_ptr, acc, offs, expert, n1)
    offs -= n1
    if out2_ptr is not None:
        _store_part(out2_ptr, acc, offs, expert, n2)
    offs -= n2
    if out3_ptr is not None:
        _store_part(out3_ptr, acc, offs, expert, n3)
    offs -= n3
    if out4_ptr is not None:
        _store_part(out4_ptr, acc, offs, expert, n4)
    offs -= n4
    if out5_ptr is not None:
        _store_part(out5_ptr, acc, offs, expert, n5)


@triton.jit
def _store_part(out_ptr, value, offs, expert, n):
    """Store the elements of value whose offset lies in ``[0, n)`` to row ``expert`` of out."""
    mask = (offs >= 0) & (offs < n)
    tl.store(out_ptr + expert * n + offs, value.to(out_ptr.dtype.element_ty), mask=mask)
