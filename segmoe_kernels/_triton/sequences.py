"""Where rows live: device functions that find the expert of a tile and the steps of its rows."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Steps(NamedTuple):
    """Where BLOCK_M rows live, in int32; all are the rows themselves where they are sorted."""

    rows: Any  # in sorted order
    slot: Any
    choice: Any
    sequence: Any
    step: Any  # a row's first time step


@triton.jit
def find_group(
    pid,
    expert_offsets_ptr,  # (E + 1,) int32
    num_experts,
    num_slots,
    ROWS_PER_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return ``(group, first row, end row)`` of tile ``pid`` over rows grouped by expert.

    Group E holds the slots without an expert; a tile behind the last one gets a group above E.
    Rows are steps: ``ROWS_PER_SLOT`` consecutive ones for each slot. Tiles start anew with each
    group, so their number is at most ``cdiv(rows, BLOCK_M) + E``. Rows are counted in 32 bits,
    which launchers check; a register in two is saved, and only addresses need 64.
    """
    groups = tl.arange(0, GROUPS)
    lo = tl.load(expert_offsets_ptr + groups, mask=groups <= num_experts, other=num_slots)
    hi = tl.load(expert_offsets_ptr + groups + 1, mask=groups < num_experts, other=num_slots)
    tiles = ((hi - lo) * ROWS_PER_SLOT + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, 0)
    group = tl.sum((ends <= pid).to(tl.int32), 0)
    here = groups == group
    first_tile = tl.sum(tl.where(here, ends - tiles, 0), 0)
    row_start = tl.sum(tl.where(here, lo, 0), 0) * ROWS_PER_SLOT
    row_end = tl.sum(tl.where(here, hi, 0), 0) * ROWS_PER_SLOT
    return group, row_start + (pid - first_tile) * BLOCK_M, row_end


@triton.jit
def expert_tiles(
    expert_offsets_ptr,  # (E + 1,) int32
    num_experts,
    ROWS_PER_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return the number of tiles of each expert's rows, (GROUPS,) int32; 0 behind the last one."""
    experts = tl.arange(0, GROUPS)
    mask = experts < num_experts
    lo = tl.load(expert_offsets_ptr + experts, mask=mask, other=0)
    hi = tl.load(expert_offsets_ptr + experts + 1, mask=mask, other=0)
    return ((hi - lo) * ROWS_PER_SLOT + BLOCK_M - 1) // BLOCK_M


@triton.jit
def split_starts(splits, num_splits, tiles, num_experts):
    """Return the first tiles of splits (N,), of ``tiles`` (GROUPS,) of all experts; int32.

    Splits have the same number of tiles, give or take one. With at most as many splits as experts,
    one that would start near the first tile of an expert, within a quarter of its length, starts
    there: then fewer experts are shared, whose sums would take a way through memory.
    """
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    # splits * total // num_splits, whose product 32 bits don't hold.
    start = splits * (total // num_splits) + splits * (total % num_splits) // num_splits
    distance = tl.abs(ends[None, :] - start[:, None])
    closest = distance == tl.min(distance, 1)[:, None]
    nearest = tl.min(tl.where(closest, ends[None, :], 2147483647), 1)
    # Where the first expert starts no other ends.
    nearest = tl.where(start < tl.abs(nearest - start), 0, nearest)
    near = 4 * tl.abs(nearest - start).to(tl.int64) * num_splits <= total
    return tl.where(near & (num_splits <= num_experts), nearest, start)


@triton.jit
def find_split(
    split,
    num_splits,
    expert_offsets_ptr,  # (E + 1,) int32
    num_experts,
    ROWS_PER_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return ``(first, last, first_expert, end_expert, before)`` of one split of all tiles.

    The split owns tiles ``[first, last)`` of all experts' rows, one expert's behind the other's;
    they belong to experts ``[first_expert, end_expert)``, before which lie ``before`` tiles.
    """
    experts = tl.arange(0, GROUPS)
    tiles = expert_tiles(expert_offsets_ptr, num_experts, ROWS_PER_SLOT, BLOCK_M, GROUPS)
    both = tl.arange(0, 2)
    starts = split_starts(split + both, num_splits, tiles, num_experts)
    first = tl.sum(tl.where(both == 0, starts, 0), 0)
    last = tl.sum(tl.where(both == 1, starts, 0), 0)
    ends = tl.cumsum(tiles, 0)
    some = (tiles > 0) & (ends > first) & (ends - tiles < last)
    first_expert = tl.min(tl.where(some, experts, GROUPS), 0)
    end_expert = tl.max(tl.where(some, experts + 1, 0), 0)
    before = tl.sum(tl.where(experts < first_expert, tiles, 0), 0)
    return first, last, first_expert, end_expert, before


@triton.jit
def find_steps(
    rows,  # (M,) int32, sorted rows
    mask_m,
    slots,
    segments_per_sequence,
    LAYOUT: tl.constexpr,
):
    """Return the `Steps` of sorted rows.

    Where every step is a segment launchers make one sequence of all: nothing is divided.
    """
    if slots.sorted_to_slot_ptr is None:
        return Steps(rows, rows, rows, rows, rows)
    else:  # noqa: RET505  the branches are compile-time
        ptrs = slots.sorted_to_slot_ptr + rows // LAYOUT.rows_per_slot
        slot = tl.load(ptrs, mask=mask_m, other=0)
        segment = slot // LAYOUT.top_k
        if LAYOUT.segment_size == 1:
            return Steps(rows, slot, slot % LAYOUT.top_k, segment * 0, segment)
        step = segment % segments_per_sequence * LAYOUT.segment_size
        step += rows % LAYOUT.rows_per_slot
        return Steps(rows, slot, slot % LAYOUT.top_k, segment // segments_per_sequence, step)


@triton.jit
def real_steps(
    padding_mask_ptr,  # (B, T) bool, contiguous, or None
    sequence,
    step,
    mask,
    length,
):
    """Return mask narrowed to steps inside the sequence that are not padding.

    Where sequences and steps have 32 bits, so has the number of rows.
    """
    real = mask & (step < length)
    if padding_mask_ptr is not None:
        flags = padding_mask_ptr + (sequence * length + step)
        real &= tl.load(flags, mask=real, other=0) != 0
    return real


@triton.jit
def load_rows(
    x,  # Rows
    at,  # Steps
    mask_m,
    cols,  # (N,), up to D, or P * D where rows are whole segments
    width,
    slots,
    length,
    LAYOUT: tl.constexpr,
):
    """Return rows of sequences, (M, N); 0 where a step is missing or masked.

    With ``concat`` a row is a whole segment and its columns run over the steps.
    """
    D: tl.constexpr = LAYOUT.d_model
    base = at.choice.to(tl.int64) * x.stride_k + at.sequence.to(tl.int64) * x.stride_b
    base += at.step.to(tl.int64) * x.stride_t
    if LAYOUT.concat:
        steps = at.step[:, None] + (cols // D)[None, :]
        real = (mask_m[:, None] & (cols < width)[None, :]) & (steps < length)
        if slots.padding_mask_ptr is not None:
            flags = (slots.padding_mask_ptr + at.sequence.to(tl.int64) * length)[:, None] + steps
            real &= tl.load(flags, mask=real, other=0) != 0
        offs = (cols // D).to(tl.int64) * x.stride_t + cols % D
    else:
        rows_real = real_steps(slots.padding_mask_ptr, at.sequence, at.step, mask_m, length)
        real = rows_real[:, None] & (cols < width)[None, :]
        offs = cols
    return tl.load((x.ptr + base)[:, None] + offs[None, :], mask=real, other=0.0)


@triton.jit
def store_segments(
    ptr,  # (top_k, B, T, D), contiguous
    value,  # (M, N)
    at,  # Steps
    mask_m,
    cols,  # (N,), up to P * D
    width,
    slots,
    length,
    stride_k,
    D: tl.constexpr,
):
    """Store rows that are whole segments, 0 at masked steps; steps past the end are dropped."""
    steps = at.step[:, None] + (cols // D)[None, :]
    inside = (mask_m[:, None] & (cols < width)[None, :]) & (steps < length)
    if slots.padding_mask_ptr is not None:
        flags = (slots.padding_mask_ptr + at.sequence.to(tl.int64) * length)[:, None] + steps
        value = tl.where(tl.load(flags, mask=inside, other=0) != 0, value, 0.0)
    # A segment is consecutive steps of a contiguous tensor, so its P * D columns are too.
    base = at.choice.to(tl.int64) * stride_k + (at.sequence.to(tl.int64) * length + at.step) * D
    tl.store((ptr + base)[:, None] + cols[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def place_steps(at, mask_m, slots, num_sequences, length):
    """Return the rows of steps in a contiguous (top_k, B, T, D).

    ``-1 - row`` for a masked step, -2**31 for one that isn't there. Computed before a kernel's
    loop: one 32-bit number a row stays alive through it, not four and two flags.
    """
    inside = mask_m & (at.step < length)
    real = real_steps(slots.padding_mask_ptr, at.sequence, at.step, mask_m, length)
    row = (at.choice * num_sequences + at.sequence) * length + at.step
    return tl.where(inside, tl.where(real, row, -1 - row), -2147483648)


@triton.jit
def store_steps(
    ptr,  # (top_k, B, T, D), contiguous
    value,  # (M, N)
    place,  # (M,)
    cols,  # (N,), up to D
    D: tl.constexpr,
):
    """Store steps where `place_steps` said, 0 where they are masked."""
    value = tl.where((place >= 0)[:, None], value, 0.0).to(ptr.dtype.element_ty)
    row = tl.where(place < 0, -1 - place, place)
    ptrs = (ptr + row.to(tl.int64) * D)[:, None] + cols[None, :]
    tl.store(ptrs, value, mask=(place != -2147483648)[:, None] & (cols < D)[None, :])
