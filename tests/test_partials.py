"""How rows are split among programs: every tile has one owner, whole experts where that is fair."""

import itertools
import random

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from segmoe_kernels._triton.partials import new_partials, reduce_partials, store_sum
from segmoe_kernels._triton.sequences import find_split

pytestmark = pytest.mark.interpreter


@triton.jit
def _split_kernel(
    expert_offsets_ptr, found_ptr, num_splits, num_experts, BLOCK_M: tl.constexpr, E2: tl.constexpr
):
    split = tl.program_id(0)
    first, last, first_expert, end_expert, before = find_split(
        split, num_splits, expert_offsets_ptr, num_experts, 1, BLOCK_M, E2
    )
    out = found_ptr + split * 5
    tl.store(out, first)
    tl.store(out + 1, last)
    tl.store(out + 2, first_expert)
    tl.store(out + 3, end_expert)
    tl.store(out + 4, before)


def splits_of(counts, num_splits, device, block_m=16):
    """Rows ``(first, last, first_expert, end_expert, before)``, and the tiles of each expert."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    found = torch.full((num_splits, 5), -1, dtype=torch.int32, device=device)
    experts = max(16, triton.next_power_of_2(len(counts)))
    _split_kernel[(num_splits,)](
        offsets, found, num_splits, len(counts), BLOCK_M=block_m, E2=experts
    )
    return found.tolist(), [-(-count // block_m) for count in counts]


def shared_experts(splits, tiles):
    """How many experts have tiles in more than one split."""
    shared, before = 0, 0
    for count in tiles:
        owners = [s for s in splits if max(s[0], before) < min(s[1], before + count)]
        shared += len(owners) > 1
        before += count
    return shared


def test_every_tile_has_one_owner(device):
    numbers = random.Random(0)
    for _ in range(40):
        experts = numbers.choice((1, 2, 5, 16, 20))
        counts = [numbers.choice((0, 1, 16, 17, 100, 400)) for _ in range(experts)]
        num_splits = numbers.choice((1, 2, 3, 7, 16, 33))
        splits, tiles = splits_of(counts, num_splits, device)
        assert splits[0][0] == 0
        assert splits[-1][1] == sum(tiles)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(splits))
        for first, last, first_expert, end_expert, before in splits:
            assert first <= last
            # A boundary moves by a quarter of a split at most.
            assert last - first <= 1.5 * sum(tiles) / num_splits + 1
            if first < last:
                assert before == sum(tiles[:first_expert]) <= first
                assert sum(tiles[:end_expert]) >= last
                assert tiles[first_expert] > 0


def test_products_of_splits_and_tiles_pass_32_bits(device):
    """Offsets alone: 2**27 tiles of 16 rows, times 40 splits."""
    splits, tiles = splits_of([2**30, 2**30 - 1], 40, device)
    assert sum(tiles) == splits[-1][1] == 2**27
    assert all(a[1] == b[0] for a, b in itertools.pairwise(splits))
    assert {last - first for first, last, *_ in splits} <= {2**27 // 40, 2**27 // 40 + 1}


def test_even_experts_are_not_shared_by_few_splits(device):
    splits, tiles = splits_of([192] * 16, 6, device)
    assert shared_experts(splits, tiles) == 0
    # More splits than experts, or an expert as large as all: rows are cut evenly.
    splits, tiles = splits_of([160] * 4, 5, device)
    assert [last - first for first, last, *_ in splits] == [8] * 5
    splits, tiles = splits_of([1600, 0, 0, 16], 4, device)
    assert shared_experts(splits, tiles) == 1
    assert max(last - first for first, last, *_ in splits) <= 26


@triton.jit
def _sum_kernel(
    rows_ptr, out_ptr, out2_ptr, out3_ptr, partials_ptr, expert_offsets_ptr, num_experts,
    num_splits, size, N: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    first, last, first_expert, end_expert, before = find_split(
        split, num_splits, expert_offsets_ptr, num_experts, 1, BLOCK_M, GROUPS
    )
    offs = tl.arange(0, N)
    for expert in range(first_expert, end_expert):
        lo = tl.load(expert_offsets_ptr + expert)
        hi = tl.load(expert_offsets_ptr + expert + 1)
        tiles = (hi - lo + BLOCK_M - 1) // BLOCK_M
        start = tl.maximum(first, before)
        stop = tl.minimum(last, before + tiles)
        if start < stop:
            acc = tl.zeros((N,), dtype=tl.float32)
            for tile in range(start, stop):
                rows = lo + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
                block = rows_ptr + rows[:, None] * N + offs[None, :]
                acc += tl.sum(tl.load(block, mask=(rows < hi)[:, None], other=0.0), 0)
            whole = (first <= before) & (before + tiles <= last)
            out = partials_ptr + (split + expert).to(tl.int64) * size
            if whole:
                store_sum(out_ptr + expert * N, offs, acc, offs < N)
                store_sum(out2_ptr + expert * N // 2, offs, 2 * acc, offs < N // 2)
                store_sum(out3_ptr + expert * N, offs, 3 * acc, offs < N)
            else:
                store_sum(out, offs, acc, offs < N)
                store_sum(out + N, offs, 2 * acc, offs < N // 2)
                store_sum(out + N + N // 2, offs, 3 * acc, offs < N)
        before += tiles


@pytest.mark.parametrize("num_splits", [1, 2, 3, 5, 8, 21])
@pytest.mark.parametrize(
    "counts", [[40], [0, 0], [33, 0, 70, 5], [100, 100, 100], [300, 1, 1, 1, 0]], ids=str
)
def test_sums_are_complete_whoever_owns_the_rows(counts, num_splits, device):
    size, experts = 32, len(counts)
    rows = torch.randn(sum(counts), size, device=device)
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    sizes = (size, size // 2, size)  # parts that differ in size, as weights and biases do
    outs = [torch.full((experts, n), torch.nan, device=device) for n in sizes]
    partials = new_partials(outs, num_splits, experts, torch.float32)
    assert partials.shape == (num_splits + experts - 1 if num_splits > 1 else 0, sum(sizes))
    partials.fill_(torch.nan)
    _sum_kernel[(num_splits,)](
        rows, *outs, partials, offsets, experts, num_splits, sum(sizes), N=size, BLOCK_M=16,
        GROUPS=16,
    )  # fmt: skip
    reduce_partials(partials, outs, offsets, num_splits, 1, 16)
    expected = torch.stack([part.double().sum(0) for part in rows.split(counts)]).float()
    torch.testing.assert_close(outs[0], expected)
    torch.testing.assert_close(outs[1], 2 * expected[:, : size // 2])
    torch.testing.assert_close(outs[2], 3 * expected)
