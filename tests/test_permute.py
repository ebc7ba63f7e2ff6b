"""Stage 2 on the kernels: a stable counting sort, its maps and its blocks."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segmoe_kernels.functional import permute, route

pytest.importorskip("triton")
from segmoe_kernels._triton import tiles

# The package exports the function under the module's name.
stage = importlib.import_module("segmoe_kernels.stages.permute")

BLOCK = tiles.SEGMENTS_AT_ONCE


@pytest.fixture(params=[1, 3])
def _blocks(request, monkeypatch):
    """Blocks of so many steps of the router, as with very many segments."""
    for name in ("permute", "route"):
        module = importlib.import_module(f"segmoe_kernels.stages.{name}")
        monkeypatch.setattr(module, "segments_per_block", lambda *_: request.param * BLOCK)


def ids_of(segments, top_k, num_experts, device="cpu", unrouted=True):
    low = -1 if unrouted else 0
    return torch.randint(low, num_experts, (segments, top_k)).int().to(device)


def check(out, ids, num_experts):
    """The definition: slots in the order (expert, slot), those without an expert last."""
    slots = [e if 0 <= e < num_experts else -1 for e in ids.flatten().tolist()]
    order = sorted(range(len(slots)), key=lambda s: (slots[s] % (num_experts + 1), s))
    counts = torch.tensor(slots, dtype=torch.int64).add(1).bincount(minlength=num_experts + 1)[1:]
    assert out.sorted_to_slot.tolist() == order
    assert [order[row] for row in out.slot_to_sorted.tolist()] == list(range(len(order)))
    assert out.expert_counts.tolist() == counts.tolist()
    assert out.expert_offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert {t.dtype for t in out} == {torch.int32}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    top_k=st.integers(1, 4),
    num_experts=st.integers(1, 20),
    segments=st.integers(0, 2 * BLOCK + 1),
    favourite=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_permute_orders_by_expert_then_slot(backend, top_k, num_experts, segments, favourite, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts, (segments, top_k), generator=generator).int()
    if favourite:
        ids[torch.rand(ids.shape, generator=generator) < 0.8] = num_experts - 1
    check(permute(ids, num_experts, backend=backend), ids, num_experts)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("segments", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_permute_at_block_boundaries(segments, top_k, device):
    ids = ids_of(segments, top_k, 5, device)
    check(permute(ids, 5, backend="triton"), ids, 5)


@pytest.mark.parametrize("expert", [-1, 0, 2, 3])
def test_permute_of_one_group_is_the_identity(expert, device):
    ids = torch.full((BLOCK + 9, 2), expert, dtype=torch.int32, device=device)
    out = permute(ids, 4, backend="triton")
    check(out, ids, 4)
    slots = torch.arange(ids.numel(), dtype=torch.int32, device=device)
    assert torch.equal(out.sorted_to_slot, slots)
    assert torch.equal(out.slot_to_sorted, slots)
    assert out.expert_counts.sum().item() == (ids.numel() if expert >= 0 else 0)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_permute_of_ids_that_name_no_expert(backend, device):
    """They count as -1, wherever they lie."""
    ids = ids_of(2 * BLOCK + 1, 2, 20, device)
    ids[:70:7, 0] = torch.tensor([4, 7, 100_000, 2**31 - 1, -5, -(2**31), 16, 15, 17, 4])
    check(permute(ids, 4, backend=backend), ids, 4)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("num_experts", [1, 15, 16, 512, 1023])
def test_permute_of_many_experts(num_experts, device):
    """Groups fill their power of two, or spill into the next; histograms come in several turns."""
    ids = ids_of(17 * BLOCK + 3 if num_experts == 1023 else 3 * BLOCK, 1, num_experts, device)
    check(permute(ids, num_experts, backend="triton"), ids, num_experts)


@pytest.mark.parametrize("segments", [1, 65_535, 65_536, 200_000, 2**31 - 1])
@pytest.mark.parametrize(("experts", "least"), [(64, BLOCK), (65, 32)])
def test_there_are_at_most_1024_blocks(segments, experts, least):
    size = tiles.segments_per_block(segments, experts)
    assert size % least == 0
    assert -(-segments // size) <= 1024
    assert size == least or segments > 511 * size


@pytest.mark.parametrize("shape", [(0, 1), (0, 3)], ids=str)
def test_permute_of_nothing(shape, device):
    ids = torch.empty(shape, dtype=torch.int32, device=device)
    out = permute(ids, 5, backend="triton")
    check(out, ids, 5)
    assert out.expert_offsets.tolist() == [0] * 6


def test_permute_reads_any_strides(device):
    wide = ids_of(BLOCK + 5, 7, 6, device)
    for ids in (wide[:, 1:6:2], wide[::2, :3], wide[:3].t(), wide[:, :1].expand(-1, 4)):
        check(permute(ids, 6, backend="triton"), ids, 6)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_permute_takes_the_histogram_of_route(masked, device):
    x = torch.randn(5, 2 * BLOCK - 1, 3, device=device)
    mask = torch.rand(x.shape[:2], device=device) < 0.4 if masked else None
    routed = route(
        x,
        torch.randn(6, 6, device=device),
        segment_size=2,
        top_k=2,
        padding_mask=mask,
        backend="triton",
    )
    assert masked == bool((routed.topk_ids < 0).any())
    check(stage.permute(routed.topk_ids, 6, routed.block_counts), routed.topk_ids, 6)


@pytest.mark.interpreter
@pytest.mark.usefixtures("_blocks")
def test_permute_touches_its_tensors_alone():
    from benchmarks.traffic_meter import TrafficMeter

    ids = ids_of(3 * BLOCK + 5, 3, 5)
    with TrafficMeter():
        check(permute(ids, 5, backend="triton"), ids, 5)
