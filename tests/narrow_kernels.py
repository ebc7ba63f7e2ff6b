"""Kernels with and without an address in 32 bits, for `test_addresses`; run as a program.

Prints which of them `addresses` finds fault with, as JSON. In a process of its own,
since the interpreter, which the tests run in, makes no IR.
"""

import json
import os

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from addresses import narrow_addresses

from benchmarks.codegen import caught_launches


@triton.jit
def cast_before(x_ptr, y_ptr, length, stride_t, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs = rows.to(tl.int64) * stride_t
    tl.store(y_ptr + rows, tl.load(x_ptr + offs, mask=rows < length), mask=rows < length)


@triton.jit
def cast_behind(x_ptr, y_ptr, length, stride_t, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs = (rows * stride_t).to(tl.int64)
    tl.store(y_ptr + rows, tl.load(x_ptr + offs, mask=rows < length), mask=rows < length)


@triton.jit
def loaded_row(x_ptr, y_ptr, rows_ptr, BLOCK: tl.constexpr):
    inner = tl.arange(0, BLOCK)
    rows = tl.load(rows_ptr + inner)
    tl.store(y_ptr + inner, tl.load(x_ptr + rows * 200))


@triton.jit
def within_a_tile(x_ptr, y_ptr, stride_t, BLOCK: tl.constexpr):
    inner = tl.arange(0, BLOCK)
    base = x_ptr + tl.program_id(0).to(tl.int64) * stride_t
    tl.store(y_ptr + inner, tl.load(base + inner * 200))


def main() -> None:
    x, rows = torch.zeros(8), torch.zeros(8, dtype=torch.int32)
    found = {}
    for kernel, arguments in (
        (cast_before, (x, x, 1000, 24)),
        (cast_behind, (x, x, 1000, 24)),
        (loaded_row, (x, x, rows)),
        (within_a_tile, (x, x, 24)),
    ):
        launches = []
        with caught_launches(launches.append):
            kernel[(1,)](*arguments, BLOCK=64)
        found[kernel.__name__] = len(narrow_addresses(launches[0]))
    print(json.dumps(found))  # noqa: T201  the result


if __name__ == "__main__":
    main()
