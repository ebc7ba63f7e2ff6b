"""The model held against published times, and how far it moves with what is from memory.

========================  ====================================================================
products                  grouped products of Liger-Kernel's pull request 1294: up and down of
                          E 128, H 2048, I 768, top 8, 8,192 tokens on an H100, here as plain
                          products of the same size; no gather, activation or gating
attention                 FlashAttention-2's loop in Triton, forward, D 128: 400 to 550 TFLOP/s
                          on H100s in Triton's and PyTorch's posts (memory)
serial loads              the difference between two lengths of the loops that count and place
                          ids one after the other in sglang's ``moe_align_block_size``, pull
                          request 14133, 8 experts, 8,192 tokens, top 8 against top 4; H100s
                          and an H200 in pull requests 2767 and 4327 of the same kernels
========================  ====================================================================
"""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.clock import check_kernels
from benchmarks.clock.capture import KernelLaunch, caught
from benchmarks.clock.chip import time_kernel
from benchmarks.clock.machine import H200, Machine
from benchmarks.clock.work import Programs, Work, cdiv


@dataclass(frozen=True)
class Check:
    """A published figure.

    Attributes:
        name: of what is modelled.
        unit: of all three numbers: "us", "TFLOP/s" or "ns an iteration".
        low: published, the least.
        high: published, the most.
        modelled: by this model.
        tolerance: how far outside the model may lie, as a share.
    """

    name: str
    unit: str
    low: float
    high: float
    modelled: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the model comes near enough."""
        near = (1 - self.tolerance) * self.low <= self.modelled
        return near and self.modelled <= (1 + self.tolerance) * self.high


def launch(kernel: Any, *args: Any, grid: tuple[int, ...] = (1,), **options: Any) -> KernelLaunch:
    """Catch one launch of a kernel."""
    found: list[KernelLaunch] = []
    with caught(found.append):
        kernel[grid](*args, **options)
    return found[0]


def _product(m: int, n: int, k: int, machine: Machine) -> float:
    """Microseconds of a plain product with 128 x 256 tiles, as Liger's and ours."""
    a, b, c = (torch.empty(s, dtype=torch.bfloat16) for s in ((m, k), (k, n), (m, n)))
    tile: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8}
    options: dict[str, Any] = {**tile, "num_warps": 8, "num_stages": 3}
    call = launch(check_kernels.matmul_kernel, a, b, c, m, N=n, K=k, **options)
    count = cdiv(m, 128) * cdiv(n, 256)
    l2 = 2 * (count * (128 + 256) * k + m * n)
    work = Work((Programs(count, {"_k0": k / 64}),), 2 * (m * k + k * n + m * n), l2, swizzled=True)
    return time_kernel(call, work, machine).us


def _attention(machine: Machine) -> float:
    """TFLOP/s of 64 heads of 8,192 rows."""
    heads, length, d = 64, 8192, 128
    size = (heads, length, d)
    q, k, v, out = (torch.empty(size, dtype=torch.bfloat16) for _ in range(4))
    options: dict[str, Any] = {
        "D": d,
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "num_warps": 8,
        "num_stages": 3,
    }
    call = launch(check_kernels.attention_kernel, q, k, v, out, length, 0.1, **options)
    count = heads * length // 128
    l2 = 2 * count * d * (2 * 128 + 2 * length)
    loops = frozenset({"n0"})  # keys of a head come from L2: 64 programs read them
    work = Work((Programs(count, {"n0": length / 128}),), 8 * heads * length * d, l2, loops, True)
    return 4 * heads * length**2 * d / time_kernel(call, work, machine).us / 1e6


def _serial(machine: Machine) -> float:
    """Nanoseconds of an iteration of the count and one of the placement."""
    ids = torch.empty(65536, dtype=torch.int32)
    counts, starts = torch.empty(9, 8, dtype=torch.int32), torch.empty(9, dtype=torch.int32)
    in_l1 = frozenset({"ids_ptr", "counts_ptr", "starts_ptr"})
    total = 0.0
    for kernel, args in (
        (check_kernels.count_kernel, (ids, counts)),
        (check_kernels.place_kernel, (ids, torch.empty_like(ids), counts, starts)),
    ):
        times = []
        for slots in (8192, 4096):
            call = launch(kernel, *args, 8 * slots, slots, E=8)
            work = Work((Programs(8, {"slot": slots}),), in_l1=in_l1)
            times.append(time_kernel(call, work, machine).us)
        total += (times[0] - times[1]) / 4096 * 1e3
    return total


def checks(machine: Machine = H200) -> list[Check]:
    """Model all that has a published time."""
    rows = 8192 * 8
    return [
        Check(
            "product, up of Liger 1294", "us", 840, 840, _product(rows, 1536, 2048, machine), 0.2
        ),
        Check(
            "product, down of Liger 1294", "us", 460, 460, _product(rows, 2048, 768, machine), 0.2
        ),
        Check("attention, D 128", "TFLOP/s", 400, 550, _attention(machine), 0.15),
        Check("serial loads of sglang 14133", "ns an iteration", 159, 159, _serial(machine), 0.35),
    ]
