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

from segmoe_kernels._triton.launch import accumulator, cdiv, kernel, padded
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
        outputs: tensors (E, ...), contiguous; None for an absent one.
        expert_offsets: (E + 1,) int32.
        num_splits: of the kernel that wrote partials.
        rows_per_slot: of that kernel.
        block_m: of that kernel.
    """
    num_experts = expert_offsets.shape[0] - 1
    sizes = tuple(0 if out is None else out[0].numel() for out in outputs)
    # Programs find their splits, which costs more than to add them up: few where there are many.
    block = 2048 if num_experts * partials.shape[1] >= 2048 * NUM_SMS else 512
    grid = (cdiv(partials.shape[1], block), num_experts)
    reduce_partials_kernel[grid](
        partials,
        tuple(outputs),
        sizes,
        expert_offsets,
        num_experts,
        num_splits,
        partials.shape[1],
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
    offs_f,
    offs_d,
    first_chunk,  # whether to store the gradient of down's bias
    D: tl.constexpr,
    F: tl.constexpr,
):
    """Store the gradients of one expert's weights where they belong, or as a split's share."""
    mask_f = offs_f < F
    mask_d = offs_d < D
    mask = mask_d[:, None] & mask_f[None, :]
    offs_fd = offs_f[None, :] * D + offs_d[:, None]
    offs_df = offs_d[:, None] * F + offs_f[None, :]
    mask_down_bias = mask_d & first_chunk
    if whole:
        store_sum(gradients.up + e * F * D, offs_fd, sums.up, mask)
        store_sum(gradients.down + e * F * D, offs_df, sums.down, mask)
        if gradients.gate is not None:
            store_sum(gradients.gate + e * F * D, offs_fd, sums.gate, mask)
        if gradients.up_bias is not None:
            store_sum(gradients.up_bias + e * F, offs_f, sums.up_bias, mask_f)
            store_sum(gradients.down_bias + e * D, offs_d, sums.down_bias, mask_down_bias)
            if gradients.gate is not None:
                store_sum(gradients.gate_bias + e * F, offs_f, sums.gate_bias, mask_f)
    else:
        store_sum(slot_ptr, offs_fd, sums.up, mask)
        slot_ptr += F * D
        store_sum(slot_ptr, offs_df, sums.down, mask)
        slot_ptr += F * D
        if gradients.gate is not None:
            store_sum(slot_ptr, offs_fd, sums.gate, mask)
            slot_ptr += F * D
        if gradients.up_bias is not None:
            store_sum(slot_ptr, offs_f, sums.up_bias, mask_f)
            store_sum(slot_ptr + F, offs_d, sums.down_bias, mask_down_bias)
            if gradients.gate is not None:
                store_sum(slot_ptr + F + D, offs_f, sums.gate_bias, mask_f)


@kernel
def reduce_partials_kernel(
    partials_ptr,  # (splits + E - 1, sum of sizes)
    outputs,  # (E, size) each or None; written is what no split alone has written
    sizes,
    expert_offsets_ptr,  # (E + 1,) int32
    num_experts,
    num_splits,
    partial_size,
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
    # An offset that no part has.
    offs = tl.where(shared, offs, partial_size)
    _store_parts(outputs, sizes, acc, offs, me.to(tl.int64))


@triton.jit
def _store_parts(outputs, sizes, value, offs, row):
    """Store value to ``row`` of outputs, whose columns lie one behind the other's in ``offs``."""
    # Triton 3.6 doesn't count a tuple with a None.
    for i in tl.static_range(len(sizes)):
        if outputs[i] is not None:
            mask = (offs >= 0) & (offs < sizes[i])
            store_sum(outputs[i] + row * sizes[i], offs, value, mask)
        offs -= sizes[i]


def sum_splits(partials: Tensor, *outputs: Tensor | None) -> None:
    """Add up ``partials (splits, ...)`` in a fixed order.

    Args:
        partials: (splits, ...).
        *outputs: contiguous, every element is written; they share the columns evenly. None for
            one that nobody wants.
    """
    num_splits, size = partials.shape[0], partials[0].numel()
    sum_splits_kernel[(cdiv(size, 64),)](
        partials,
        outputs,
        (size // len(outputs),) * len(outputs),
        num_splits,
        size,
        ACC=accumulator(partials.dtype),
        SPLITS=32,
        BLOCK=64,
    )


@kernel
def sum_splits_kernel(
    partials_ptr,  # (splits, size)
    outputs,  # (size of its own,) each or None
    sizes,
    num_splits,
    size,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add up partial sums in a fixed order, SPLITS at a time.

    Grid: ``(cdiv(size, BLOCK),)``. Sums in ACC, rounded at the store.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=ACC)
    # Some at once: loads in flight, not one behind the other.
    for start in range(0, num_splits, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        ptrs = partials_ptr + splits.to(tl.int64)[:, None] * size + offs[None, :]
        mask = (splits < num_splits)[:, None] & (offs < size)[None, :]
        acc += tl.sum(tl.load(ptrs, mask=mask, other=0.0), 0)
    _store_parts(outputs, sizes, acc, offs, 0)
