"""Tile sizes, warps and stages for every kernel: one deterministic table.

The choice depends on widths, the number of experts and the dtype, never on the number of rows, so
that results don't change with the batch and nothing is compiled anew. Register and spill counts
behind the choices: ``python -m benchmarks.codegen``.
"""

from typing import NamedTuple

import torch
import triton


class TileConfig(NamedTuple):
    """What one program works on, and with how many warps.

    Attributes:
        block_m: rows (steps or segments).
        block_n: output columns, or the chunk of d_ff.
        block_k: contraction, or the padded width.
        num_warps: warps in a program.
        num_stages: software-pipelining depth.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def _power(size: int, least: int, most: int) -> int:
    return int(min(most, max(least, triton.next_power_of_2(size))))


def route_fwd_tile(d_model: int, num_experts: int, dtype: torch.dtype) -> TileConfig:
    """block_n columns of x at a time; block_m is fixed by `permute`'s histogram."""
    wide = dtype in {torch.float32, torch.float64}
    most = 64 if wide else 128
    return TileConfig(32, _power(d_model, 16, most), 0, 4 if num_experts <= 64 else 8, 2)


def route_bwd_tile(d_model: int, num_experts: int, dtype: torch.dtype) -> TileConfig:
    """block_m segments and block_n columns."""
    wide = dtype in {torch.float32, torch.float64}
    most = 64 if wide else 128
    if num_experts > 64:
        most = 32
    return TileConfig(32, _power(d_model, 16, most), 0, 4 if num_experts <= 64 else 8, 2)


# A row of at most this many columns stays on chip through the whole FFN.
MAX_FUSED_WIDTH = 256

# Programs that fill the largest GPU at hand; a constant, so that sums don't depend on the device.
_FULL_GPU = 264


def expert_ffn_fwd_tile(d_model: int, d_ff: int, dtype: torch.dtype) -> TileConfig:
    """block_m rows, block_n columns of d_ff at a time, block_k the padded width."""
    width = _power(d_model, 16, MAX_FUSED_WIDTH)
    if dtype == torch.float64:
        return TileConfig(16, 16, width, 4, 1)
    if dtype == torch.float32:
        block_m = 64 if width <= 64 else 32
        return TileConfig(block_m, _power(d_ff, 16, 32), width, 4 if width <= 128 else 8, 1)
    block_m = 128 if width >= 64 else 64
    chunk = 64 if width <= 128 else 32
    return TileConfig(block_m, _power(d_ff, 16, chunk), width, 8 if block_m == 128 else 4, 2)


def expert_ffn_dx_tile(d_model: int, d_ff: int, dtype: torch.dtype) -> TileConfig:
    """As the forward's."""
    width = _power(d_model, 16, MAX_FUSED_WIDTH)
    if dtype == torch.float64:
        return TileConfig(16, 16, width, 4, 1)
    if dtype == torch.float32:
        block_m = 64 if width <= 64 else 32
        return TileConfig(block_m, _power(d_ff, 16, 16), width, 8, 1)
    block_m = 64
    chunk = 64 if width <= 128 else 32
    return TileConfig(block_m, _power(d_ff, 16, chunk), width, 8 if width >= 64 else 4, 1)


def expert_ffn_dw_tile(d_model: int, d_ff: int, dtype: torch.dtype) -> TileConfig:
    """As the forward's; block_n columns of d_ff make a program's share."""
    width = _power(d_model, 16, MAX_FUSED_WIDTH)
    if dtype == torch.float64:
        return TileConfig(16, 16, width, 4, 1)
    if dtype == torch.float32:
        return TileConfig(32, _power(d_ff, 16, 32 if width <= 128 else 16), width, 8, 1)
    chunk = {16: 64, 32: 64, 64: 64, 128: 32, 256: 16}[width]
    return TileConfig(64, _power(d_ff, 16, chunk), width, 8, 1)


def grouped_gemm_tile(
    n: int, k: int, rows_per_expert: int, dtype: torch.dtype, *, gated: bool
) -> TileConfig:
    """block_m follows the rows that an expert can expect, bucketed to three sizes."""
    if dtype == torch.float64:
        return TileConfig(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        return TileConfig(64, _power(n, 16, 64), _power(k, 16, 32), 8, 2)
    block_m = 64 if rows_per_expert < 128 else 128
    block_n = _power(n, 16, 64 if gated else 128)
    return TileConfig(block_m, block_n, _power(k, 16, 64), 8 if block_m == 128 else 4, 3)


def grouped_gemm_dw_tile(n: int, k: int, dtype: torch.dtype) -> TileConfig:
    """block_m rows at a time into block_n x block_k sums."""
    if dtype == torch.float64:
        return TileConfig(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        return TileConfig(32, _power(n, 16, 64), _power(k, 16, 64), 8, 2)
    return TileConfig(64, _power(n, 16, 128), _power(k, 16, 128), 8, 2)


def num_row_splits(num_rows: int, block_m: int, column_programs: int) -> int:
    """Into how many runs of rows a weight gradient is split.

    Enough to fill a GPU together with the programs over columns, but at least 16 tiles of rows
    each, since every split writes and reads a whole gradient in float32.
    """
    wanted = triton.cdiv(_FULL_GPU, column_programs)
    return int(max(1, min(wanted, num_rows // (16 * block_m))))
