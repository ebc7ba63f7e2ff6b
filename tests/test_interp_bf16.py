"""The interpreter's bfloat16 patch and its program order, against PyTorch."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.interpreter


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "where":
        out = tl.where(x < y, x, y)
    else:
        out = x * 2.0 - y
    tl.store(out_ptr + offs, out)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, cumsum_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    grid = offs[:, None] * BLOCK + offs[None, :]
    x = tl.load(x_ptr + grid)
    tl.store(sum_ptr + offs, tl.sum(x, 1))
    tl.store(max_ptr + offs, tl.max(x, 1))
    tl.store(cumsum_ptr + grid, tl.cumsum(x, 1))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _order_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0) * 10 + tl.program_id(1))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add", lambda x, y: x + y),
        ("mul", lambda x, y: x * y),
        ("where", torch.minimum),
        ("scale", lambda x, y: x * 2.0 - y),
    ],
)
def test_elementwise_equals_torch(op, expected):
    x, y = torch.randn(2, 128).bfloat16()
    out = torch.empty_like(x)
    _elementwise_kernel[(1,)](x, y, out, OP=op, BLOCK=128)
    assert torch.equal(out, expected(x, y))


def test_dot_equals_torch():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, BLOCK=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_reductions_round_once():
    x = torch.randn(16, 16).bfloat16()
    total, largest, running = torch.empty(16), torch.empty(16), torch.empty(16, 16)
    total, largest, running = (t.bfloat16() for t in (total, largest, running))
    _reduce_kernel[(1,)](x, total, largest, running, BLOCK=16)
    # One rounding of the float32 sum: half a unit in the last place of 8 bits.
    torch.testing.assert_close(total.float(), x.float().sum(1), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(running.float(), x.float().cumsum(1), rtol=2**-8, atol=1e-6)
    assert torch.equal(largest, x.amax(1))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_cast_to_bfloat16_rounds_to_nearest_even(source):
    x = (torch.randn(1024, dtype=torch.float64) * 100).to(source)
    out = torch.empty(1024, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, BLOCK=1024)
    assert torch.equal(out, x.float().bfloat16())


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64])
def test_cast_from_bfloat16_equals_torch(target):
    x = torch.randn(1024).bfloat16()
    out = torch.empty(1024, dtype=target)
    _cast_kernel[(1,)](x, out, BLOCK=1024)
    assert torch.equal(out, x.to(target))


@pytest.mark.parametrize(("kind", "last"), [("forward", 21), ("reverse", 0)])
def test_program_order_decides_who_writes_last(kind, last, program_order):
    out = torch.zeros(1, dtype=torch.int32)
    with program_order(kind):
        _order_kernel[(3, 2)](out)
    assert out.item() == last


def test_program_order_shuffled_visits_every_program(program_order):
    seen = []
    out = torch.zeros(1, dtype=torch.int32)
    for seed in range(40):
        with program_order("shuffled", seed):
            _order_kernel[(3, 2)](out)
        seen.append(out.item())
    assert set(seen) == {0, 1, 10, 11, 20, 21}
