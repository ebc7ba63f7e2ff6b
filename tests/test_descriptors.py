"""Weights through tensor descriptors: the same bits as by address, and only where they can be."""

import importlib

import pytest
import torch
from stage_runs import check_accuracy, check_same, draw, run_stage
from test_experts import make_ids
from test_experts import make_stage as make_experts
from test_experts import make_tensors as make_expert_tensors
from test_grouped_gemm import make_stage, make_tensors

pytest.importorskip("triton")

from segmoe_kernels._triton import descriptors, tile_table
from segmoe_kernels._triton.descriptors import weight_operand
from segmoe_kernels._triton.tile_table import TileConfig

TILE = TileConfig(16, 32, 64, 4, 1)


@pytest.fixture(autouse=True)
def _descriptors(monkeypatch, device):
    if (
        torch.device(device).type == "cuda"
        and tile_table.architecture() not in descriptors.WITH_TMA
    ):
        pytest.skip(f"{tile_table.architecture()} has no tensor memory accelerator")
    monkeypatch.setenv("SEGMOE_DESCRIPTORS", "on")


@pytest.fixture
def layouts(monkeypatch):
    """How each weight was read, in the order of the launches."""
    found = []

    def spy(weight, tile):
        operand, layout = weight_operand(weight, tile)
        if weight is not None:
            found.append(layout)
        return operand, layout

    for name in ("grouped_gemm", "experts_launch"):
        module = importlib.import_module(f"segmoe_kernels.stages.{name}")
        monkeypatch.setattr(module, "weight_operand", spy)
    return found


def check_same_as_pointers(monkeypatch, stage, tensors):
    """Require the same numbers with descriptors and without; the sums of integers are exact."""
    tensors = {name: (2 * tensor).round() for name, tensor in tensors.items()}
    upstream = {}
    run_stage(stage, tensors, upstream=upstream)
    upstream = {name: (2 * dy).round() for name, dy in upstream.items()}
    actual = run_stage(stage, tensors, upstream=upstream)
    monkeypatch.setenv("SEGMOE_DESCRIPTORS", "off")
    check_same(actual, run_stage(stage, tensors, upstream=upstream))
    monkeypatch.setenv("SEGMOE_DESCRIPTORS", "on")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("counts", "n", "k"),
    [([1, 0, 6], 8, 8), ([40, 88, 0, 72], 128, 64), ([129, 127], 136, 72)],
    ids=str,
)
def test_grouped_gemm_is_the_same_through_descriptors(
    counts, n, k, dtype, layouts, monkeypatch, device
):
    """Edges of tiles in rows, columns and depth; forward reads (N, K), dx its transpose."""
    tensors = make_tensors(counts, n, k, beyond=3, dtype=dtype, device=device)
    check_same_as_pointers(monkeypatch, make_stage(counts, None, device), tensors)
    assert layouts == ["n k", "k n"] * 2 + ["strided"] * 2


@pytest.mark.parametrize("turned", [False, True], ids=["half", "transposed"])
def test_grouped_gemm_takes_descriptors_of_strided_weights(turned, layouts, monkeypatch, device):
    """Halves of a fused projection, and a transposed weight."""
    x = draw(8, 16, dtype=torch.bfloat16, device=device)
    fused = draw(2, 48, 16, dtype=torch.bfloat16, device=device)
    weight = fused.chunk(2, dim=1)[1]
    if turned:
        weight = fused.transpose(1, 2).contiguous().transpose(1, 2)
    y = make_stage([3, 5], None, device)(x, weight, backend="triton")["y"]
    monkeypatch.setenv("SEGMOE_DESCRIPTORS", "off")
    expected = make_stage([3, 5], None, device)(x, weight, backend="triton")["y"]
    assert layouts == ["k n" if turned else "n k", "strided"]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("scope", ["token", "segment"])
def test_expert_ffn_through_descriptors_is_as_accurate_as_eager(scope, gated, layouts, device):
    """Rows that the fused kernels don't take, with tiles that reach over every edge."""
    d_model = 264 if scope == "token" else 88
    ids = make_ids(8, 2, 3, device=device)
    tensors = make_expert_tensors(
        2, 11, d_model, 40, 3, scope=scope, gated=gated, dtype=torch.bfloat16, device=device
    )
    check_accuracy(make_experts(ids, 3, expert_scope=scope, activation="silu"), tensors)
    matrices = 3 if gated else 2
    # Up, gate and down forward; down, up and gate backward.
    assert layouts == ["n k"] * matrices + ["k n"] * matrices


def test_descriptors_are_off_by_default(monkeypatch):
    monkeypatch.delenv("SEGMOE_DESCRIPTORS")
    weight = torch.zeros(2, 16, 8, dtype=torch.bfloat16)
    assert weight_operand(weight, TILE) == (weight, "strided")


@pytest.mark.parametrize("name", ["sm_80", "sm_120", "gfx942"])
def test_gpus_without_descriptors_read_by_address(name, monkeypatch):
    monkeypatch.setenv("SEGMOE_ARCH", name)
    weight = torch.zeros(2, 16, 8, dtype=torch.bfloat16)
    assert weight_operand(weight, TILE) == (weight, "strided")


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 16, 8),
        torch.zeros(2, 16, 7, dtype=torch.bfloat16),
        torch.zeros(2 * 16 * 8 + 1, dtype=torch.bfloat16)[1:].view(2, 16, 8),
        torch.zeros(1, 16, 8, dtype=torch.bfloat16).expand(2, 16, 8),
        torch.zeros(2, 16, 16, dtype=torch.bfloat16)[..., ::2],
        torch.zeros(2, 0, 8, dtype=torch.bfloat16),
    ],
    ids=["float32", "odd row", "unaligned", "expanded", "every other", "empty"],
)
def test_weights_that_descriptors_cannot_describe_are_read_by_address(weight):
    operand, layout = weight_operand(weight, TILE)
    assert operand is weight
    assert layout == "strided"


def test_descriptors_refuse_an_unknown_value(monkeypatch):
    monkeypatch.setenv("SEGMOE_DESCRIPTORS", "yes")
    with pytest.raises(ValueError, match="SEGMOE_DESCRIPTORS"):
        weight_operand(torch.zeros(2, 16, 8, dtype=torch.bfloat16), TILE)
