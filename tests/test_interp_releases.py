"""The interpreter does what compiled kernels do, whatever its release."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402  triton has to be there

pytestmark = pytest.mark.interpreter


@triton.jit
def _masked_kernel(out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, 1, mask=(offs < BLOCK - 1) & (tl.sum(offs, 0) > 0))


def test_comparison_of_scalars_is_a_mask():
    out = torch.zeros(8, dtype=torch.int32)
    _masked_kernel[(1,)](out, BLOCK=8)
    assert out.tolist() == [1] * 7 + [0]


@triton.jit
def _loop_kernel(counts_ptr, out_ptr, BLOCK: tl.constexpr):
    count = tl.max(tl.load(counts_ptr + tl.arange(0, BLOCK)), 0)
    total = 0
    for i in range(count):
        total += i
    tl.store(out_ptr, total)


def test_loop_ends_at_a_number_that_was_loaded():
    counts, out = torch.tensor([3, 5, 1, 2]), torch.zeros(1, dtype=torch.int64)
    _loop_kernel[(1,)](counts, out, BLOCK=4)
    assert out.item() == 10
