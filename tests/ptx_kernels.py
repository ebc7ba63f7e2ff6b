"""Small Triton kernels, executed by the emulator and compared with PyTorch: is it to be trusted?"""

import torch
import triton
import triton.language as tl
from ptx.harness import emulated


@triton.jit
def along_kernel(x_ptr, sum_ptr, max_ptr, where_ptr, scan_ptr, sort_ptr, M: tl.constexpr,
                 N: tl.constexpr):  # fmt: skip
    """Reductions along both axes, a scan and a sort of M x N numbers."""
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    offs = rows[:, None] * N + cols[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(sum_ptr + rows, tl.sum(x, 1))
    tl.store(max_ptr + cols, tl.max(x, 0))
    tl.store(where_ptr + rows, tl.argmin(x, 1))
    tl.store(scan_ptr + offs, tl.cumsum(x, 0))
    tl.store(sort_ptr + offs, tl.sort(x, 1))


@triton.jit
def float_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Functions of one number, behind a mask."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count, other=1.0)
    y = tl.exp(-x * x) + tl.log(1 + tl.abs(x)) + tl.erf(x) + tl.rsqrt(x * x + 1)
    y = tl.where(x > 0.5, y / (2 + x), tl.floor(x) + tl.maximum(y, tl.fma(x, y, 1.0)))
    tl.store(out_ptr + offs, y, mask=offs < count)


@triton.jit
def integer_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    """Arithmetic of whole numbers."""
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    bits = (x & 1023) ^ (y | 5)
    z = x // y + (x % y) * 7 + (bits << 3) - (x >> 2) + tl.minimum(x, y)
    tl.store(out_ptr + offs, tl.where((x > y) & (y != 3), z, -z))


@triton.jit
def cast_kernel(x_ptr, to16_ptr, to_bf16_ptr, to32_ptr, to64_ptr, BLOCK: tl.constexpr):
    """Conversions, each back to float32."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(to16_ptr + offs, x.to(tl.float16).to(tl.float32))
    tl.store(to_bf16_ptr + offs, x.to(tl.bfloat16).to(tl.float32))
    tl.store(to32_ptr + offs, (x * 100).to(tl.int32).to(tl.int8).to(tl.float32))
    tl.store(to64_ptr + offs, (x.to(tl.float64) * 1e6).to(tl.int64).to(tl.float32))


@triton.jit
def gather_kernel(x_ptr, index_ptr, out_ptr, count, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of x by their numbers; none for a negative one."""
    rows, cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    index = tl.load(index_ptr + rows, mask=rows < count, other=-1)
    x = tl.load(x_ptr + index[:, None] * D + cols[None, :], mask=(index >= 0)[:, None], other=0)
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], x, mask=(rows < count)[:, None])


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
               BLOCK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """C = a b, and c.T of another product, over blocks of K."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros((M, N), dtype=ACC)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :])
        b = tl.load(b_ptr + n[:, None] * K + k[None, :])
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


DOTS = [
    (torch.float16, 16, 32, 64, 32, "ieee"),
    (torch.bfloat16, 64, 64, 128, 64, "ieee"),
    (torch.float32, 16, 16, 32, 16, "ieee"),
    (torch.float32, 64, 32, 64, 32, "tf32"),
    (torch.float64, 16, 16, 32, 16, "ieee"),
]


def _agree(name, pairs):
    """Fail unless every result is near what PyTorch says; whole numbers equal it."""
    for number, (actual, expected) in enumerate(pairs):
        near = {torch.float32: 2e-6, torch.float64: 1e-14}.get(actual.dtype, 0.0)
        if not torch.allclose(actual, expected.to(actual.dtype), rtol=near, atol=near * 8):
            raise AssertionError(f"{name}: result {number} differs from PyTorch's")


def check(arch):
    """Run all of them; the names of the kernels, and what was found in them."""
    launches = []
    torch.manual_seed(0)
    with emulated(arch, launches):
        x = torch.randn(32, 64)
        out = [torch.zeros(32), torch.zeros(64), torch.zeros(32, dtype=torch.int32)]
        out += [torch.zeros(32, 64), torch.zeros(32, 64)]
        along_kernel[(1,)](x, *out, M=32, N=64)
        exact = [x.sum(1), x.amax(0), x.argmin(1), x.cumsum(0), x.sort(1).values]
        _agree("along", zip(out, exact, strict=True))

        for dtype in (torch.float32, torch.float64):
            x = 3 * torch.randn(1000, dtype=dtype)
            y = torch.zeros_like(x)
            float_kernel[(4,)](x, y, 1000, BLOCK=256)
            d = x.double()
            e = (-d * d).exp() + (1 + d.abs()).log() + d.erf() + (d * d + 1).rsqrt()
            e = torch.where(x > 0.5, e / (2 + d), d.floor() + torch.maximum(e, d * e + 1))
            _agree("float", [(y, e)])

        for dtype in (torch.int32, torch.int64):
            x, y = torch.randint(-(2**20), 2**20, (2, 256), dtype=dtype)
            y[y == 0] = 3
            z = torch.zeros_like(x)
            integer_kernel[(1,)](x, y, z, BLOCK=256)
            quotient = torch.div(x, y, rounding_mode="trunc")
            e = quotient + (x - quotient * y) * 7 + (((x & 1023) ^ (y | 5)) << 3) - (x >> 2)
            e = e + torch.minimum(x, y)
            _agree("integer", [(z, torch.where((x > y) & (y != 3), e, -e))])

        x = torch.randn(256)
        out = [torch.zeros(256) for _ in range(4)]
        cast_kernel[(1,)](x, *out, BLOCK=256)
        exact = [x.half(), x.bfloat16(), (x * 100).int().to(torch.int8), (x.double() * 1e6).long()]
        _agree("cast", zip(out, exact, strict=True))

        x, index = torch.randn(50, 32), torch.randint(-1, 50, (70,), dtype=torch.int32)
        out = torch.empty(70, 32)
        gather_kernel[(3,)](x, index, out, 70, D=32, BLOCK=32)
        _agree("gather", [(out, torch.where((index >= 0)[:, None], x[index.clamp_min(0)], 0))])

        for dtype, m, n, k, block, precision in DOTS:
            a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            double = dtype == torch.float64
            c = torch.zeros(m, n, dtype=dtype if double else torch.float32)
            dot_kernel[(1,)](a, b, c, M=m, N=n, K=k, BLOCK=block, PRECISION=precision,
                             ACC=tl.float64 if double else tl.float32)  # fmt: skip
            if precision == "tf32":
                a, b = ((t.view(torch.int32) & -0x2000).view(torch.float32) for t in (a, b))
            _agree(f"dot {dtype}", [(c, a.double() @ b.double().T)])
    return sorted({launch.kernel for launch in launches}), [
        f for launch in launches for f in launch.findings
    ]
