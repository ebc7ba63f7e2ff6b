"""No address is computed in 32 bits: by construction, in the kernels' IR, without a GPU."""

import json

import pytest
import torch
from programs import ROOT, run_python

pytest.importorskip("triton")

from segmoe_kernels import functional
from segmoe_kernels._triton.launch import within_reach


def test_no_kernel_computes_an_address_in_32_bits():
    done = run_python("-m", "tests.addresses")
    kernels = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" 0 narrow")}
    defined = set()
    for path in (ROOT / "segmoe_kernels").rglob("*.py"):
        lines = path.read_text().splitlines()
        defined |= {
            line.removeprefix("def ").partition("(")[0]
            for line in lines
            if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
        }
    # Run only where the router left no histogram.
    elsewhere = {"_permute_count_kernel", "_combine_bwd_kernel"}
    assert defined - elsewhere <= kernels


def test_addresses_in_32_bits_are_found():
    done = run_python("tests/narrow_kernels.py")
    found = {"cast_before": 0, "cast_behind": 1, "loaded_row": 1, "within_a_tile": 0}
    assert json.loads(done.stdout) == found


def test_matrices_that_32_bits_cannot_span_are_copied():
    """Views whose rows lie far apart; nothing of that size is allocated."""
    near = torch.zeros(2, 3, 4)
    assert within_reach(near) is near
    far = torch.zeros(1).as_strided((2, 3, 4), (0, 0, 0))
    assert within_reach(far, rows=False) is far
    storage = torch.zeros(1, dtype=torch.int8).untyped_storage()
    assert storage.nbytes() == 1
    meta = torch.empty(2**31 + 8, device="meta", dtype=torch.int8)
    wide = meta.as_strided((2, 3, 4), (4, 2**30, 1))
    assert within_reach(wide).stride() == (12, 4, 1)
    assert within_reach(wide, rows=False).stride() == (12, 4, 1)
    assert within_reach(meta.as_strided((2, 3, 4), (4, 2**29, 1))).stride() == (4, 2**29, 1)


def test_matrices_of_2_to_the_31_elements_are_refused():
    x = torch.zeros(1).expand(4, 2**16)
    weight = torch.zeros(1).expand(1, 2**15, 2**16)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"at most 2147483647 elements.*32768 x 65536"):
        functional.grouped_gemm(x, weight, offsets, backend="triton")
