"""Stage 3' on the kernels: rows of each expert times its matrix, and every gradient."""

import importlib
import itertools

import pytest
import torch
from stage_runs import DTYPES, check_accuracy, check_exactness, check_same, draw, run_stage

from segmoe_kernels.functional import grouped_gemm

pytest.importorskip("triton")


def offsets_of(counts, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def make_stage(counts, activation=None, device="cpu"):
    """``counts``: rows of each expert."""
    offsets = offsets_of(counts, device)

    def stage(x, weight, bias=None, *, backend):
        return {"y": grouped_gemm(x, weight, offsets, bias, activation, backend=backend)}

    return stage


def make_tensors(counts, n, k, *, beyond=0, biased=True, dtype=torch.float64, device="cpu"):
    """``beyond``: rows without an expert."""
    options = {"dtype": dtype, "device": device}
    tensors = {
        "x": draw(sum(counts) + beyond, k, **options),
        "weight": draw(len(counts), n, k, **options) / k**0.5,
    }
    if biased:
        tensors["bias"] = draw(len(counts), n, **options)
    return tensors


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu", "relu"])
def test_grouped_gemm_equals_reference_in_float64(activation, biased, device):
    counts = [3, 0, 1, 17]
    tensors = make_tensors(counts, 7, 5, beyond=2, biased=biased, device=device)
    out = check_exactness(make_stage(counts, activation, device), tensors)
    assert not out["y"][21:].any()
    assert not out["dx"][21:].any()
    assert not out["dweight"][1].any()


@pytest.mark.parametrize(
    "counts",
    [[0, 0, 0], [0, 20, 0], [20, 0, 0], [0, 0, 20], [16, 16, 16], [15, 17, 1], [1] * 24],
    ids=lambda c: str(c) if len(c) < 5 else f"{len(c)} experts",
)
def test_grouped_gemm_of_any_split_of_rows_equals_reference(counts, device):
    """A tile of float64 has 16 rows."""
    for beyond in (3, 0)[: 1 + (sum(counts) == 0)]:
        tensors = make_tensors(counts, 6, 4, beyond=beyond, device=device)
        out = check_exactness(make_stage(counts, "silu", device), tensors)
    empty = [e for e, count in enumerate(counts) if count == 0]
    assert not out["dweight"][empty].any()
    assert not out["dbias"][empty].any()


# Rows around tiles of 32, 64 and 128; columns around 64 and 128; depth around 32 and 64.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("counts", "n", "k"),
    [
        ([1, 0, 6], 1, 7),
        ([31, 33, 0], 15, 33),
        ([65, 0, 63, 64], 65, 31),
        ([129, 127], 129, 65),
        ([40, 88, 0, 72], 128, 64),
    ],
    ids=str,
)
def test_grouped_gemm_is_as_accurate_as_eager(counts, n, k, dtype, device):
    tensors = make_tensors(counts, n, k, beyond=5, dtype=dtype, device=device)
    check_accuracy(make_stage(counts, "gelu", device), tensors)


def test_grouped_gemm_never_reads_rows_beyond(device):
    counts = [4, 2]
    tensors = make_tensors(counts, 5, 3, beyond=4, dtype=torch.float32, device=device)
    stage = make_stage(counts, "gelu", device)
    upstream = {}
    clean = run_stage(stage, tensors, upstream=upstream)
    tensors["x"][6:] = torch.nan
    actual = run_stage(stage, tensors, upstream=upstream)
    check_same(actual, clean)
    assert not actual["y"][6:].any()
    assert not actual["dx"][6:].any()


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("counts", [[40, 0, 35], [1, 70, 1]], ids=str)
def test_grouped_gemm_weight_gradient_of_any_number_of_splits(counts, splits, monkeypatch, device):
    """Without the hundreds of rows that it takes before the table splits them."""
    # The package exports the function under the module's name.
    module = importlib.import_module("segmoe_kernels.stages.grouped_gemm")
    monkeypatch.setattr(module, "num_row_splits", lambda *_: splits)
    tensors = make_tensors(counts, 19, 18, beyond=3, device=device)
    check_exactness(make_stage(counts, None, device), tensors)


@pytest.mark.parametrize("whole", [False, True])
def test_grouped_gemm_of_many_experts_leaves_nothing_to_add_up(whole, device, monkeypatch):
    module = importlib.import_module("segmoe_kernels.stages.grouped_gemm")
    monkeypatch.setattr(module, "num_row_splits", lambda *_: 3)
    # Programs of four experts and one tile of their matrices.
    monkeypatch.setattr(module, "GEMM_DW_WHOLE", 4 if whole else 5)
    sums, add_up = [], module.reduce_partials
    monkeypatch.setattr(module, "reduce_partials", lambda *args: (sums.append(1), add_up(*args)))
    counts = [20, 0, 37, 3]
    tensors = make_tensors(counts, 5, 6, beyond=2, device=device)
    check_exactness(make_stage(counts, None, device), tensors)
    assert len(sums) == (not whole)


def test_grouped_gemm_of_512_experts_equals_reference(device):
    """Without gradients: those of the weights take the interpreter minutes."""
    counts = [0] * 512
    counts[0] = counts[255] = counts[511] = 3
    tensors = make_tensors(counts, 4, 3, beyond=1, device=device)
    check_exactness(make_stage(counts, "gelu", device), tensors, wanted=set())
