"""ScatterMoE in the same model: its kernels and PyTorch operators, caught as ours are.

`peer_modules.ScatterMoE` is the whole layer: a PyTorch router before its experts. Its two kernels
are simulated; every operator between them moves its bytes at the share of HBM that ours get, or
from L2. The wait for its bincount on the host is left out, and its products of one row a batch
count as bytes alone: both in its favour.
"""

from typing import Any

import torch

from benchmarks.clock.capture import Capture, KernelLaunch, capture_calls, make_layer, nothing_runs
from benchmarks.clock.work import WORK, Programs, Work, cdiv
from benchmarks.peers import load_scattermoe
from benchmarks.shapes import Shape

__all__ = ["capture_scattermoe"]


def capture_scattermoe(
    shape: Shape, *, dtype: torch.dtype = torch.bfloat16, backward: bool = True, **options: Any
) -> Capture:
    """Catch what ScatterMoE launches for a layer.

    Args:
        shape: of the layer and its input.
        dtype: of both.
        backward: run the backward too.
        **options: of `SegMoE`.

    Raises:
        SkippedError: if its source is not there: see `benchmarks.peers`.
    """
    from benchmarks.peer_modules import ScatterMoE

    package = load_scattermoe(plain=True)
    layer = make_layer(shape, dtype, **options)
    with nothing_runs():
        peer = ScatterMoE(layer, package)
    return capture_calls(shape, peer, dtype, backward=backward)


def _scatter2scatter(launch: KernelLaunch, shape: Shape) -> Work:
    n, k, rows = launch["N"], launch["K"], shape.steps * shape.top_k
    tiles, columns = cdiv(rows, launch["BLOCK_M"]), cdiv(n, launch["BLOCK_N"])
    # A tile at the border of two experts runs through both.
    experts = 1 + (shape.num_experts - 1) / tiles
    moved = rows * (k + n) * 2
    l2 = rows * (k * columns + n) * 2 + tiles * columns * experts * launch["BLOCK_N"] * k * 2
    trips = {"E_idx": experts, "K_block_id": cdiv(k, launch["BLOCK_K"])}
    return Work((Programs(tiles * columns, trips),), moved, l2, swizzled=True)


def _group_xty(launch: KernelLaunch, shape: Shape) -> Work:
    n, k, rows = launch["N"], launch["K"], shape.steps * shape.top_k
    row_tiles, columns = cdiv(k, launch["BLOCK_K"]), cdiv(n, launch["BLOCK_N"])
    moved = rows * (k + n) * 2
    l2 = rows * (k * columns + n * row_tiles) * 2
    trips = {"i": cdiv(rows / shape.num_experts, launch["BLOCK_M"])}
    count = shape.num_experts * row_tiles * columns
    return Work((Programs(count, trips),), moved, l2, swizzled=True)


def _group(launch: KernelLaunch, shape: Shape) -> Work:
    rows = shape.steps * shape.top_k
    moved = 2 * rows * launch["K"] * 2
    trips = {"i": cdiv(launch["K"], launch["BLOCK_K"])}
    return Work((Programs(cdiv(rows, launch["BLOCK_N"]), trips),), moved, moved)


WORK.update({"scatter2scatter": _scatter2scatter, "groupXtY": _group_xty, "group": _group})
